"""The folder in which an unfinished job lives, so that it can be resumed.

    job.json                     what the job was started with, and whether its output is moving
    lock                         held by the process that works here
    significance/layer-003.json  measured layers
    plan.json                    the allocation, once all layers are measured
    layers/layer-003.json        quantized layers
    hidden/<phase>-004.safetensors   what the next layer of a phase is given, by name
    finetuned.json, finetuned.safetensors   what finetuning changed
    checkpoint/                  the output, moved to its place at the end

Every file is written beside and renamed, so a job that is killed at any moment finds only whole
files. Results carry a hash of their own, which tells whether a disk gives back what it was given. A
step is done when the hidden states after it exist. The folder is its owner's alone: hidden states
tell the calibration text.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from mcmoe_vllm.checkpoint.manifest import tensor_sha256
from mcmoe_vllm.checkpoint.writing import write_shard
from mcmoe_vllm.disk import (
    explain_os_errors,
    is_integer,
    is_partial,
    read_json,
    require_regular,
    write_json,
)
from mcmoe_vllm.errors import UserError, some
from mcmoe_vllm.places import JOB_FILE, require_work_folder

LOCK_FILE = "lock"
REMOVED_FILE = f".{JOB_FILE}.removed.partial"  # what job.json becomes before the rest is deleted
WORK_VERSION = 4  # of the files in the folder; a job of another version starts again
SEPARATOR = "/"
HASH = "sha256"  # a file of tensors holds it in its metadata
PRIVATE_FOLDERS = ("significance", "layers", "hidden")
FOLDERS = (*PRIVATE_FOLDERS, "checkpoint")
# All that a job leaves here in the end, its output apart: what it may delete.
MADE = (
    "plan.json", "finetuned.json", "finetuned.safetensors", "significance/layer-*.json",
    "layers/layer-*.json", "hidden/*-*.safetensors",
)  # fmt: skip
DIFFERENCES = {  # entries of a job's description whose values say nothing to people
    "model_fingerprint": "the model's weights or config.json are others than at its start",
    "calibration_fingerprint": "the calibration text gives other tokens than at its start",
    "plan": "the plan holds something else than at its start",
}


@dataclass(frozen=True)
class Job:
    """What job.json holds.

    description: all that decides the result; flags: what the user asked for, by option;
    made_folder: whether the job made its folder; threads: of every process that worked on it.
    moving: the output, once files may have been moved there; files: those, relative to it.
    """

    description: Mapping[str, Any]
    flags: Mapping[str, Any]
    made_folder: bool
    threads: tuple[int, ...]
    moving: str | None = None
    files: tuple[str, ...] = ()
    work_version: int = WORK_VERSION


@dataclass(frozen=True)
class WorkDirectory:
    """A job's folder, held by this process until the block ends; `notes` are for the user."""

    path: Path
    lock: BinaryIO
    notes: tuple[str, ...] = ()

    def __enter__(self) -> WorkDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.lock.close()

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def job(self) -> Job:
        return read_job(self.path)

    def save(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep a result as NAME.json with its hash."""
        with explain_os_errors(f"writing to {self.path}"):
            write_json(self.path / f"{name}.json", {"sha256": _sha256(value), "value": value})

    def load(self, name: str) -> dict[str, Any]:
        """Raises UserError for a file that does not hold what was saved."""
        file = self.path / f"{name}.json"
        found = read_json(file)
        value = found.get("value") if isinstance(found, dict) else None
        if not isinstance(value, dict) or found.get("sha256") != _sha256(value):
            raise UserError(f"{file} is damaged; {_again(self.path)}")
        return value

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.json").exists()

    def save_layer(self, kind: str, layer: int, value: Mapping[str, Any]) -> None:
        """kind: "significance" or "layers"."""
        self.save(f"{kind}/layer-{layer:03d}", value)

    def load_layer(self, kind: str, layer: int) -> dict[str, Any]:
        return self.load(f"{kind}/layer-{layer:03d}")

    def save_states(self, phase: str, layer: int, states: Mapping[str, list[torch.Tensor]]) -> None:
        """Keep what `layer` is given, blocks by name; the states before it are then of no use."""
        stem = f"{phase}-{layer:05d}"
        self.save_tensors(
            f"hidden/{stem}",
            {
                f"{name}{SEPARATOR}{position:06d}": block
                for name, blocks in states.items()
                for position, block in enumerate(blocks)
            },
        )
        for other in (self.path / "hidden").glob(f"{phase}-*.safetensors"):
            if other.stem != stem:
                other.unlink()

    def load_states(self, phase: str) -> tuple[int, dict[str, list[torch.Tensor]]] | None:
        """The furthest layer of a phase and what it is given, or None before the first."""
        files = sorted((self.path / "hidden").glob(f"{phase}-*.safetensors"))
        if not files:
            return None
        blocks = self.load_tensors(f"hidden/{files[-1].stem}")
        layer = int(files[-1].stem.rsplit("-", 1)[1])
        states: dict[str, list[torch.Tensor]] = {}
        for name in sorted(blocks):
            states.setdefault(name.rpartition(SEPARATOR)[0], []).append(blocks[name].clone())
        return layer, states

    def save_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors as NAME.safetensors with a hash of all that they are."""
        hashed = {HASH: _tensors_sha256(tensors)}
        write_shard(self.path / f"{name}.safetensors", tensors, hashed)

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """NAME.safetensors. Raises UserError for a file that does not hold what was saved."""
        file = self.path / f"{name}.safetensors"
        require_regular(file)
        try:
            with explain_os_errors("reading"), safe_open(file, framework="pt") as f:
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
                hashed = (f.metadata() or {}).get(HASH)
        except UserError as e:
            raise UserError(f"{file} is damaged ({e}); {_again(self.path)}") from None
        if hashed != _tensors_sha256(tensors):
            raise UserError(f"{file} is damaged, its hash is another; {_again(self.path)}")
        return tensors

    def note_moving(self, output: Path, files: Sequence[str]) -> None:
        """From now on the output is what `files` in it and in the checkpoint are together."""
        job = self.job
        self._write_job(job, moving=str(output), files=tuple(files))

    def _write_job(self, job: Job, **changes: Any) -> None:
        with explain_os_errors(f"writing to {self.path}"):
            write_json(self.path / JOB_FILE, {**vars(job), **changes})

    def remove(self) -> list[str]:
        """Delete what the job made, and the folder if it made that; what it did not make stays,
        and is returned."""
        if not (self.path / JOB_FILE).exists():
            return []
        made_folder = self.job.made_folder
        with explain_os_errors(f"removing what is left in {self.path}"):
            # A job that is killed from here on left a rest, which the next one in here deletes.
            os.replace(self.path / JOB_FILE, self.path / REMOVED_FILE)
            _delete_rest(self.path)
            kept = sorted(os.listdir(self.path))
            if made_folder and not kept:
                self.path.rmdir()
        return kept


def progress_of(path: Path) -> str:
    """How far an unfinished job got, in words."""
    measured = len(list(path.glob("significance/layer-*.json")))
    quantized = len(list(path.glob("layers/layer-*.json")))
    if quantized:
        return f"{quantized} layers quantized"
    return f"{measured} layers measured"


def read_job(path: Path) -> Job:
    """Raises UserError if job.json is none of this version."""
    file = path / JOB_FILE
    found = read_json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no job; {_again(path)}")
    if (version := found.get("work_version")) != WORK_VERSION:
        raise UserError(
            f"the job in {path} was begun by another version of mcmoe-vllm (work_version "
            f"{version!r:.20}, this one has {WORK_VERSION}); {_again(path)}"
        )
    kinds = {"description": dict, "flags": dict, "made_folder": bool, "threads": list,
             "files": list}  # fmt: skip
    sound = (
        set(found) == set(Job.__dataclass_fields__)
        and all(isinstance(found[name], kind) for name, kind in kinds.items())
        and all(is_integer(n) for n in found["threads"])
        and all(isinstance(name, str) for name in found["files"])
        and isinstance(found["moving"], str | None)
    )
    if not sound:
        raise UserError(f"{file} is damaged; {_again(path)}")
    return Job(**{**found, "threads": tuple(found["threads"]), "files": tuple(found["files"])})


def moved_into(output: Path, path: Path) -> tuple[str, ...]:
    """The entries of an output folder that the job in `path` may have put there before it was
    stopped, half copied ones among them."""
    if not (path / JOB_FILE).exists():
        return ()
    job = read_job(path)
    if job.moving != str(output):
        return ()
    names = {name.partition("/")[0] for name in job.files}
    partial = [n for n in os.listdir(output) if is_partial(n)] if output.is_dir() else []
    return (*sorted(names), *(n for n in partial if any(is_partial(n, of) for of in names)))


def require_startable(path: Path, resume: bool) -> None:
    """Raises UserError if no job can be started in a folder, or resumed: an unfinished job lies
    there, or none, or another process works on it, or the folder holds something else."""
    require_work_folder(path)
    if (path / LOCK_FILE).exists():
        _take_lock(path).close()
    _require_state(path, resume)


def _require_state(path: Path, resume: bool) -> None:
    names = set(os.listdir(path)) - {LOCK_FILE} if path.exists() else set()
    traces = {name for name in names if _is_trace(name)}
    if JOB_FILE in names:
        if not resume:
            raise UserError(
                f"found an unfinished job in {path} ({progress_of(path)}). "
                "Add --resume to continue it, or remove the folder to start again"
            )
    elif names and not traces:
        raise UserError(
            f"work directory {path} is not empty and holds no job (it holds "
            f"{min(names)!r:.100}); choose another with --work-dir"
        )
    elif resume and not traces:
        raise UserError(
            f"nothing to resume: there is no unfinished job in {path}. It was not begun, has "
            "finished, or has another --work-dir; leave --resume out to begin one"
        )


def open_work_directory(
    path: Path,
    description: Mapping[str, Any],
    resume: bool,
    flags: Mapping[str, Any] | None = None,
) -> WorkDirectory:
    """Start a job's folder, or take an unfinished one up again.

    Raises UserError as `require_startable` does, and for a job that was started with settings that
    differ from `description`; all of them are listed.
    """
    require_startable(path, resume)
    made = not path.exists()
    with explain_os_errors(f"creating {path}"):
        path.mkdir(mode=0o700, exist_ok=True)
    lock = _take_lock(path)
    try:
        _require_state(path, resume)
        if (path / JOB_FILE).exists():
            job, notes = _resumed(read_job(path), description, path)
        else:
            # Of a job that was killed before it had begun, or after it had ended.
            with explain_os_errors(f"clearing {path}"):
                _delete_rest(path, but_lock=True)
            job, notes = Job(description, flags or {}, made, (torch.get_num_threads(),)), ()
        with explain_os_errors(f"creating {path}"):
            write_json(path / JOB_FILE, vars(job))
            for folder in FOLDERS:
                mode = 0o700 if folder in PRIVATE_FOLDERS else 0o777
                (path / folder).mkdir(mode=mode, exist_ok=True)
            for file in _partials(path):
                file.unlink()
    except BaseException:
        lock.close()
        raise
    return WorkDirectory(path, lock, notes)


def _resumed(job: Job, description: Mapping[str, Any], path: Path) -> tuple[Job, tuple[str, ...]]:
    """The job as this process takes it up, and what the user has to know."""
    before = job.description
    changed = [
        DIFFERENCES.get(key, f"{key} was {before.get(key)!r}, is now {description.get(key)!r}")
        for key in sorted(set(before) | set(description))
        if before.get(key) != description.get(key)
    ]
    if changed:
        raise UserError(
            f"the job in {path} was started with other settings:{some(changed)}"
            f"\nGive the same settings, or remove the folder to start again"
        )
    threads = torch.get_num_threads()
    if threads in job.threads:
        return job, ()
    note = f"the job was begun with {job.threads[0]} threads and goes on with {threads}: last bits"
    return (
        Job(**{**vars(job), "threads": (*job.threads, threads)}),
        (f"{note} of sums may differ from those of an undisturbed job",),
    )


def _take_lock(path: Path) -> BinaryIO:
    """The lock of a folder, held while the file is open; the kernel frees it with the process."""
    try:
        descriptor = os.open(
            path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        file = os.fdopen(descriptor, "r+b")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that ended in between has deleted what was locked just now.
            if not os.path.samestat(os.fstat(descriptor), os.stat(path / LOCK_FILE)):
                raise BlockingIOError
        except BaseException:
            file.close()
            raise
    except (BlockingIOError, FileNotFoundError):
        raise UserError(
            f"another process works in {path}; wait for its end, or stop it, then try again"
        ) from None
    except OSError as e:
        raise UserError(
            f"work directory {path} cannot be locked ({e.strerror}), so that two jobs could work "
            "in it at once; choose one on another disk with --work-dir"
        ) from None
    return file


def _is_trace(name: str) -> bool:
    """Whether a file tells that a job was killed in here before job.json existed, or after."""
    return name.startswith(f".{JOB_FILE}.") and name.endswith(".partial")


def _partials(path: Path) -> Iterator[Path]:
    """What a killed process was writing in a job's folder, itself or by way of safetensors."""
    for folder in (path, *(path / name for name in FOLDERS)):
        if folder.is_dir():
            for file in folder.iterdir():
                of_safetensors = file.name.startswith(".tmp") and len(file.name) == 10
                if is_partial(file.name) or (of_safetensors and folder != path):
                    yield file


def _delete_rest(path: Path, but_lock: bool = False) -> None:
    for file in [*(f for pattern in MADE for f in path.glob(pattern)), *_partials(path)]:
        file.unlink()
    for folder in FOLDERS:
        if (path / folder).is_dir() and not os.listdir(path / folder):
            (path / folder).rmdir()
    for name in os.listdir(path):
        if _is_trace(name) or (name == LOCK_FILE and not but_lock):
            (path / name).unlink()


def _again(path: Path) -> str:
    return f"remove {path} to start again"


def _sha256(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of their names, dtypes, shapes and bytes, in the order of the names."""
    described = [
        [name, str(t.dtype), list(t.shape), tensor_sha256(t)] for name, t in sorted(tensors.items())
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
