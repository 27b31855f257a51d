"""Hashes of tensors and shards, and the manifest that holds them."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from mcmoe_vllm.checkpoint.format import MANIFEST_FILE, MANIFEST_VERSION
from mcmoe_vllm.disk import read_json
from mcmoe_vllm.errors import UserError


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes as safetensors stores them."""
    flat = tensor.detach().contiguous().cpu().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


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
