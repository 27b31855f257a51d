"""Hashes of tensors and shards, and the manifest that holds them."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mcmoe_vllm.checkpoint.format import MANIFEST_FILE, MANIFEST_VERSION
from mcmoe_vllm.disk import explain_os_errors, read_json, write_json
from mcmoe_vllm.errors import UserError


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes as safetensors stores them."""
    flat = tensor.detach().contiguous().cpu().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_manifest(folder: Path, shards: Iterable[str]) -> None:
    """Write the hashes of finished shards and of their tensors; the last that is written of a
    checkpoint, so that nothing is hashed twice."""
    tensor_hashes: dict[str, str] = {}
    shard_hashes: dict[str, dict[str, Any]] = {}
    for shard in shards:
        file = folder / shard
        shard_hashes[shard] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        with safe_open(file, framework="pt") as f:
            for name in sorted(f.keys()):
                tensor_hashes[name] = tensor_sha256(f.get_tensor(name))
    with explain_os_errors(f"writing {folder / MANIFEST_FILE}"):
        write_json(
            folder / MANIFEST_FILE,
            {
                "format_version": MANIFEST_VERSION,
                "shards": shard_hashes,
                "tensors": tensor_hashes,
            },
        )


def read_manifest(path: Path) -> dict[str, Any]:
    """A folder's hash manifest: {"shards": {file: {"bytes", "sha256"}}, "tensors": {name: sha256}}.

    Raises UserError if it is missing, of a newer version, or of another structure.
    """
    file = path / MANIFEST_FILE
    manifest = read_json(file)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version > MANIFEST_VERSION:
        raise UserError(
            f"{file} has format_version {version}, this mcmoe-vllm reads up to "
            f"{MANIFEST_VERSION}: upgrade with pip install -U mcmoe-vllm"
        )
    sound = (
        version == MANIFEST_VERSION
        and isinstance(manifest.get("shards"), dict)
        and isinstance(manifest.get("tensors"), dict)
        and all(
            isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry)
            for entry in manifest["shards"].values()
        )
    )
    if not sound:
        raise UserError(f"{file} is no manifest of hashes; download the checkpoint again")
    return manifest
