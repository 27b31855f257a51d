"""The files beside weights and config.json, which a compressed checkpoint takes along.

Everything that is not known to be something else: tokenizers, chat templates and licences have too
many names to list. What is neither known nor small is left out, by name.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mcmoe_vllm.checkpoint.format import INDEX_FILE, MANIFEST_FILE
from mcmoe_vllm.disk import explain_os_errors
from mcmoe_vllm.errors import UserError, some

WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".gguf", ".ggml",
    ".onnx", ".onnx_data", ".onnx.data", ".h5", ".hdf5", ".msgpack", ".npy", ".npz", ".tflite",
    ".mlmodel", ".pb", ".pdparams", ".nemo", ".ot", ".engine", ".llamafile",
)  # fmt: skip
CODE_SUFFIXES = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe")
# Files of a compressed checkpoint, which take the place of the original's.
OWN_FILES = (
    "config.json", INDEX_FILE, MANIFEST_FILE, "report.json", "plan.json", "README.md",
    "allocation.png",
)  # fmt: skip
MOST_BYTES, MOST_BYTES_IN_ALL = 128 << 20, 512 << 20
MOST_FILES, MOST_SEEN, MOST_FOLDERS_DEEP = 1000, 20_000, 3

# What is not fetched of a model on the Hub: weights that are never read, and hidden files.
HUB_IGNORED = [
    *(f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors"),
    "*/*.safetensors",
    "consolidated*.safetensors",  # the same weights once more, in another layout
    ".*",
    "*/.*",
]


@dataclass(frozen=True)
class SideFiles:
    """Names relative to the folder, with slashes; left_out: too large or too many to copy."""

    names: tuple[str, ...]
    left_out: tuple[str, ...]


def find_side_files(folder: Path, trust_remote_code: bool = False) -> SideFiles:
    """The files of a checkpoint folder and its subfolders that a copy needs: no weights of any
    format, none of a compressed checkpoint's own, nothing hidden, code only if it is trusted.

    Raises UserError listing links that lead out of the folder (and of the Hub's cache, if it lies
    in that), what is no regular file, and what cannot be read.
    """
    roots = _roots(folder.resolve())
    found: list[tuple[str, int]] = []
    strange = []
    for name, path in _walk(folder):
        if not _is_wanted(name, trust_remote_code):
            continue
        size = _regular_size(path, roots)
        if size is None:
            strange.append(name)
        else:
            found.append((name, size))
    if strange:
        raise UserError(
            f"{folder} holds files that would be copied but are links to elsewhere, no regular "
            f"files, or not readable: {some(strange)}\n"
            "Replace them by copies (cp -L), or remove them"
        )
    # The upper folders' first, which tokenizers and engines read.
    found.sort(key=lambda entry: (entry[0].count("/"), entry[0]))
    names: list[str] = []
    left_out: list[str] = []
    room = MOST_BYTES_IN_ALL
    for name, size in found:
        if size > min(MOST_BYTES, room) or len(names) == MOST_FILES:
            left_out.append(name)
        else:
            names.append(name)
            room -= size
    return SideFiles(tuple(names), tuple(left_out))


def copy_side_files(source: Path, target: Path, trust_remote_code: bool = False) -> SideFiles:
    """Copy what `find_side_files` finds; that. Raises UserError like it, and for a full disk."""
    found = find_side_files(source, trust_remote_code)
    with explain_os_errors(f"copying the tokenizer's files to {target}"):
        for name in found.names:
            if "/" in name:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile((source / name).resolve(), target / name)
    return found


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Relative names and paths of all files that are not hidden, links to folders among them."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}")

    seen = 0
    for top, folders, files in os.walk(folder, onerror=fail):
        above = Path(top).relative_to(folder).parts
        links = [name for name in folders if os.path.islink(os.path.join(top, name))]
        folders[:] = sorted(
            name
            for name in folders
            if name not in links
            and not name.startswith(".")
            and not name.endswith(".work")  # of an interrupted job that plans
            and len(above) < MOST_FOLDERS_DEEP
        )
        for name in sorted([*files, *links]):
            seen += 1
            if seen > MOST_SEEN:
                return
            if not name.startswith("."):
                yield PurePosixPath(*above, name).as_posix(), Path(top) / name


def _is_wanted(name: str, trust_remote_code: bool) -> bool:
    lower = name.lower()
    return (
        name not in OWN_FILES
        and not lower.endswith(".index.json")
        and not lower.endswith(WEIGHT_SUFFIXES)
        and (trust_remote_code or not lower.endswith(CODE_SUFFIXES))
    )


def _roots(folder: Path) -> list[Path]:
    """Where links may lead: into the folder, and from a snapshot of the Hub's cache to its blobs,
    models--NAME/snapshots/COMMIT -> models--NAME/blobs."""
    model = folder.parent.parent
    if folder.parent.name == "snapshots" and model.name.startswith("models--"):
        return [folder, model / "blobs"]
    return [folder]


def _regular_size(path: Path, roots: list[Path]) -> int | None:
    """The size of a regular file that can be read, None for all else; of a link the target's, if
    that lies in one of `roots`."""
    try:
        target = path.resolve(strict=True) if path.is_symlink() else path
        found = target.stat()
    except (OSError, RuntimeError):
        return None
    inside = target == path or any(root in target.parents for root in roots)
    usable = inside and stat.S_ISREG(found.st_mode) and os.access(target, os.R_OK)
    return found.st_size if usable else None
