"""The folder beside the output in which an unfinished job lives, so that it can be resumed.

    job.json                     what the job was started with
    significance/layer-003.json  measured layers
    plan.json                    the allocation, once all layers are measured
    layers/layer-003.json        quantized layers
    hidden/<phase>-004.safetensors   what the next layer of a phase is given, by name
    checkpoint/                  the output, renamed to its place at the end

Every file is written beside and renamed, so a job that is killed at any moment finds only whole
files. A step is done when the hidden states after it exist.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mcmoe_vllm.checkpoint.writing import write_shard
from mcmoe_vllm.disk import explain_os_errors, read_json, write_json
from mcmoe_vllm.errors import UserError

JOB_FILE = "job.json"
WORK_VERSION = 2  # of the files in the folder; a job of another version starts again
SEPARATOR = "/"


@dataclass(frozen=True)
class WorkDirectory:
    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    def layer_file(self, kind: str, layer: int) -> Path:
        """kind: "significance" or "layers"."""
        return self.path / kind / f"layer-{layer:03d}.json"

    def save_layer(self, kind: str, layer: int, value: Mapping[str, Any]) -> None:
        with explain_os_errors(f"writing to {self.path}"):
            write_json(self.layer_file(kind, layer), value)

    def load_layer(self, kind: str, layer: int) -> dict[str, Any]:
        return read_json(self.layer_file(kind, layer))

    def save_states(self, phase: str, layer: int, states: Mapping[str, list[torch.Tensor]]) -> None:
        """Keep what `layer` is given, blocks by name; the states before it are then of no use."""
        file = self._hidden(phase, layer)
        write_shard(
            file,
            {
                f"{name}{SEPARATOR}{position:06d}": block
                for name, blocks in states.items()
                for position, block in enumerate(blocks)
            },
        )
        for other in file.parent.glob(f"{phase}-*.safetensors"):
            if other != file:
                other.unlink()

    def load_states(self, phase: str) -> tuple[int, dict[str, list[torch.Tensor]]] | None:
        """The furthest layer of a phase and what it is given, or None before the first."""
        files = sorted((self.path / "hidden").glob(f"{phase}-*.safetensors"))
        if not files:
            return None
        blocks = load_file(files[-1])
        layer = int(files[-1].stem.rsplit("-", 1)[1])
        states: dict[str, list[torch.Tensor]] = {}
        for name in sorted(blocks):
            states.setdefault(name.rpartition(SEPARATOR)[0], []).append(blocks[name].clone())
        return layer, states

    def _hidden(self, phase: str, layer: int) -> Path:
        return self.path / "hidden" / f"{phase}-{layer:05d}.safetensors"

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def progress_of(path: Path) -> str:
    """How far an unfinished job got, in words."""
    measured = len(list(path.glob("significance/layer-*.json")))
    quantized = len(list(path.glob("layers/layer-*.json")))
    if quantized:
        return f"{quantized} layers quantized"
    return f"{measured} layers measured"


def open_work_directory(path: Path, job: Mapping[str, Any], resume: bool) -> WorkDirectory:
    """Start a job's folder, or take an unfinished one up again.

    Raises UserError if an unfinished job is found without `resume`, or with settings that differ
    from `job` (all of them are listed), or if the folder holds something else.
    """
    work = WorkDirectory(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"work directory {path} is a file")
    if (path / JOB_FILE).exists():
        if not resume:
            raise UserError(
                f"found an unfinished job in {path} ({progress_of(path)}). "
                "Add --resume to continue it, or remove the folder to start again"
            )
        found = read_json(path / JOB_FILE)
        if not isinstance(found, dict):
            raise UserError(f"{path / JOB_FILE} holds no job; remove the folder to start again")
        changed = [
            f"{key} was {found.get(key)!r}, is now {job.get(key)!r}"
            for key in sorted(set(found) | set(job))
            if found.get(key) != job.get(key)
        ]
        if changed:
            raise UserError(
                f"the job in {path} was started with other settings:\n  - "
                + "\n  - ".join(changed)
                + "\nGive the same settings, or remove the folder to start again"
            )
        _make_folders(path)
        return work
    if path.exists() and any(path.iterdir()):
        raise UserError(f"work directory {path} is not empty and holds no job; choose another")
    with explain_os_errors(f"creating {path}"):
        path.mkdir(parents=True, exist_ok=True)
        # First of all, so that a job killed right here is still recognised as one.
        write_json(path / JOB_FILE, dict(job))
    _make_folders(path)
    return work


def _make_folders(path: Path) -> None:
    with explain_os_errors(f"creating {path}"):
        for folder in ("significance", "layers", "hidden", "checkpoint"):
            (path / folder).mkdir(exist_ok=True)
