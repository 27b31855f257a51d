"""Hashes of tensors and shards, and the manifest that holds them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open

from mcmoe_vllm.checkpoint.files import read_header
from mcmoe_vllm.checkpoint.format import MANIFEST_FILE, MANIFEST_VERSION
from mcmoe_vllm.disk import check_version, explain_os_errors, is_integer, read_json, write_json
from mcmoe_vllm.errors import UserError

UNCOVERED = {
    1: f"{MANIFEST_FILE} is of version 1, which records no tensor's dtype and shape: a header that "
    "names others for the same bytes cannot be told by it. Compress the model again for version 2."
}
_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class RecordedShard:
    """What a manifest says of a shard: its size and the SHA-256 of the file."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class RecordedTensor:
    """What a manifest says of a tensor: the SHA-256 of its bytes as stored, its dtype by
    safetensors' name and its shape. Version 1 records neither of these, which are then None."""

    sha256: str
    dtype: str | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Manifest:
    """mcmoe_manifest.json of a compressed checkpoint (docs/FORMAT.md)."""

    version: int
    shards: Mapping[str, RecordedShard]
    tensors: Mapping[str, RecordedTensor]

    @property
    def uncovered(self) -> str | None:
        """A sentence on what this version does not record; None for the newest."""
        return UNCOVERED.get(self.version)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes as safetensors stores them."""
    flat = tensor.detach().contiguous().cpu().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_manifest(folder: Path, shards: Iterable[str]) -> None:
    """Record finished shards and their tensors; the last that is written of a checkpoint, so that
    nothing is hashed twice."""
    tensors: dict[str, dict[str, Any]] = {}
    recorded: dict[str, dict[str, Any]] = {}
    for shard in shards:
        file = folder / shard
        recorded[shard] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        with safe_open(file, framework="pt") as f:
            for name, info in sorted(read_header(file).items()):
                tensors[name] = {
                    "dtype": info.dtype,
                    "shape": list(info.shape),
                    "sha256": tensor_sha256(f.get_tensor(name)),
                }
    with explain_os_errors(f"writing {folder / MANIFEST_FILE}"):
        write_json(
            folder / MANIFEST_FILE,
            {"format_version": MANIFEST_VERSION, "shards": recorded, "tensors": tensors},
        )


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint folder, of any version up to this one.

    Raises UserError if it is missing, of a newer version, or of another structure.
    """
    file = path / MANIFEST_FILE
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object; download the checkpoint again")
    check_version(content.get("format_version"), str(file), MANIFEST_VERSION)
    version: int = content["format_version"]
    shards = _entries(content.get("shards"), _shard)
    tensors = _entries(content.get("tensors"), _TENSORS[version])
    if shards is None or tensors is None:
        raise UserError(
            f"{file} is no manifest of version {version}: shards and tensors must be objects whose "
            "entries docs/FORMAT.md describes; download the checkpoint again"
        )
    return Manifest(version, shards, tensors)


def _entries(value: Any, read: Callable[[Any], _Entry | None]) -> dict[str, _Entry] | None:
    """Every entry as `read` sees it; None if there is no object or an entry is none."""
    if not isinstance(value, dict):
        return None
    found = {name: read(entry) for name, entry in value.items()}
    return None if None in found.values() else found  # type: ignore[return-value]


def _shard(value: Any) -> RecordedShard | None:
    if not (isinstance(value, dict) and value.keys() == {"bytes", "sha256"}):
        return None
    good = is_integer(value["bytes"]) and _is_sha256(value["sha256"])
    return RecordedShard(value["bytes"], value["sha256"]) if good else None


def _hash_alone(value: Any) -> RecordedTensor | None:
    return RecordedTensor(value) if _is_sha256(value) else None


def _tensor(value: Any) -> RecordedTensor | None:
    if not (isinstance(value, dict) and value.keys() == {"dtype", "shape", "sha256"}):
        return None
    dtype, shape = value["dtype"], value["shape"]
    good = (
        isinstance(dtype, str)
        and isinstance(shape, list)
        and all(is_integer(size) and size >= 0 for size in shape)
        and _is_sha256(value["sha256"])
    )
    return RecordedTensor(value["sha256"], dtype, tuple(shape)) if good else None


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


_TENSORS = {1: _hash_alone, 2: _tensor}
