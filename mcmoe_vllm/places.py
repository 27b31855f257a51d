"""Where results go: checked before the work, by what stands there and against each other."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection
from itertools import permutations
from pathlib import Path

from mcmoe_vllm.disk import StrPath, is_stream
from mcmoe_vllm.errors import UserError

JOB_FILE = "job.json"  # tells the folder of an unfinished job
WORK_SUFFIX = ".work"
WORK_INSIDE = ".mcmoe-work"  # in an output folder that nothing can stand beside
WORK_OF_STREAM = "mcmoe.work"  # in the working folder


def require_result(path: StrPath, *inputs: StrPath | None) -> None:
    """A file that a command is to write, and the files that it reads.

    Raises UserError if the file could not be written in the end, if it is one of the inputs, or a
    file that lies in the folder of a model.
    """
    if not os.fspath(path):
        raise UserError("the name of a file to write is empty")
    if is_stream(path):
        if not os.access(path, os.W_OK):
            raise UserError(f"{path} is not writable")
        return
    file = Path(path).absolute()
    _require_room_beside(file)
    if not file.exists():
        return
    if not os.access(file, os.W_OK):
        raise UserError(f"{path} is write-protected; choose another name")
    if any(other is not None and _is_same(file, other) for other in inputs):
        raise UserError(f"{path} is what the command reads; choose another name for its result")
    if (file.parent / "config.json").exists():
        raise UserError(
            f"{path} is there already, in the folder of a model: it may be a file of the model; "
            "choose another name, or remove it first"
        )


def require_changeable(file: Path) -> None:
    """Raises UserError if a file of a model, which a command changes, cannot be replaced."""
    if file.is_symlink():
        raise UserError(
            f"{file} is a link, as in the Hub's cache, whose files are not changed; copy the "
            f"folder first: cp -rL {file.parent} COPY"
        )
    is_stream(file)
    _require_room_in(file.parent)


def output_folder(name: StrPath, own: Collection[str] = ()) -> Path:
    """A folder that a job is to make or fill, links followed. own: what in it is the job's.

    Raises UserError if it holds anything else, and if it cannot be made.
    """
    path = _resolve(name)
    if not os.path.exists(path):  # which is false where it cannot be told
        _require_room_beside(path)
        return path
    if not path.is_dir():
        raise UserError(f"output {name} is a file; choose a folder")
    made_with_the_disk = {"lost+found"} if os.path.ismount(path) else set()
    if strange := sorted(set(os.listdir(path)) - set(own) - made_with_the_disk):
        raise UserError(
            f"output {name} exists and is not empty (it holds {strange[0]!r:.100}); "
            "choose another folder"
        )
    _require_room_in(path)
    return path


def work_folder(output: StrPath, work_dir: StrPath | None = None) -> Path:
    """Where a job's unfinished work lives, links followed: beside its output, unless the user
    says otherwise. Nothing is checked."""
    if work_dir is not None:
        return _resolve(work_dir)
    if os.fspath(output) and not os.path.isdir(output) and is_stream(output):
        return Path(WORK_OF_STREAM).absolute()
    path = _resolve(output)
    inside = path / WORK_INSIDE
    if inside.is_dir():
        return inside
    if path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK)):
        # Beside a mount point is another disk: in a container, one that goes with it.
        return inside
    return path.with_name(path.name + WORK_SUFFIX)


def require_work_folder(path: Path) -> None:
    """Raises UserError if a work directory cannot be made, or its files cannot."""
    if not os.path.exists(path):
        _require_room_beside(path)
    elif path.is_dir():
        _require_room_in(path)
    else:
        raise UserError(f"work directory {path} is a file; choose a folder with --work-dir")


def require_apart(output: Path, work: Path, model: StrPath | None = None) -> None:
    """An output, the work directory and the model's folder must not lie in each other: they are
    moved, removed and copied along as a whole.

    Raises UserError. A work directory right in the output is no such case: it goes when the rest
    comes.
    """
    places = {"the output": output.resolve(), "the work directory": work}
    if model is not None:
        places["the model"] = Path(model).resolve()
    wrong = []
    for (one, path), (other, outer) in permutations(places.items(), 2):
        if path == outer and one < other:
            wrong.append(f"{one} and {other} are both {path}")
        elif outer in path.parents and not (path == work and path.parent == output):
            wrong.append(f"{one} {path} lies in {other}, {outer}")
    if wrong:
        raise UserError(f"{'; '.join(wrong)}: choose another output or --work-dir")


def _resolve(name: StrPath) -> Path:
    if not os.fspath(name):
        raise UserError("the name of a folder is empty")
    try:
        path = Path(name).resolve()
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{os.fspath(name)!r} is no UTF-8; choose another name") from None
    except (OSError, RuntimeError, ValueError) as e:  # of a link to itself; of a NUL
        raise UserError(f"{name} cannot be used: {getattr(e, 'strerror', None) or e}") from None
    return path


def _require_room_beside(path: Path) -> None:
    """Raises UserError if nothing of this name can be made in its folder."""
    parent = path.parent
    if not parent.is_dir():
        raise UserError(f"{parent}, the folder for {path.name}, does not exist; create it first")
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as e:
        raise UserError(f"{path} cannot be made: {e.strerror}") from None
    _require_room_in(parent)


def _require_room_in(folder: Path) -> None:
    """Raises UserError if no file can be made in a folder: tried, as permissions tell little of
    disks that are mounted read-only, of quotas and of what is no real folder."""
    probe = folder / f".{secrets.token_hex(8)}.partial"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        probe.unlink()
    except OSError as e:
        raise UserError(f"no file can be made in {folder}: {e.strerror}") from None


def _is_same(one: StrPath, other: StrPath) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False
