"""What tells one checkpoint's weights from another's, without reading all of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from mcmoe_vllm.checkpoint.files import Checkpoint
from mcmoe_vllm.disk import explain_os_errors, open_regular

BLOCK = 4096  # what a disk reads at least
STRIDE = 4 << 20  # Mixtral-8x7B's 93 GB are 27,000 blocks, 2 s of a solid-state disk


def weights_fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of the names, dtypes and shapes of all tensors and of samples of their bytes: the
    first and last block of each, and one of every STRIDE bytes between them.

    The same content gives the same fingerprint whatever its files are called, wherever and
    whenever they were written. Another step of a training, another model of the same shape, a file
    that is zeros from somewhere on: all change whole tensors, and no tensor is left out. A change
    of less than STRIDE bytes within a tensor can go unseen.
    """
    digest = hashlib.sha256()
    by_shard: dict[str, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        by_shard.setdefault(info.shard, []).append(name)
    of_tensor = {}
    for shard, names in by_shard.items():
        file = checkpoint.path / shard
        with explain_os_errors(f"reading {file}"), open_regular(file) as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            places = _places(file)
            for name in names:
                sampled = hashlib.sha256()
                for offset, length in _blocks(*places[name]):
                    sampled.update(os.pread(f.fileno(), length, offset))
                of_tensor[name] = sampled.hexdigest()
    for name, content in sorted(of_tensor.items()):
        info = checkpoint.tensors[name]
        digest.update(json.dumps([name, info.dtype, info.shape, content]).encode())
    return digest.hexdigest()


def _places(file: Path) -> dict[str, tuple[int, int]]:
    """Where in a shard, whose header was read before, each tensor begins and ends."""
    with open_regular(file) as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in header.items()
    }


def _blocks(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Offsets and lengths of what is read of bytes begin to end."""
    for offset in range(begin, end, STRIDE):
        yield offset, min(BLOCK, end - offset)
    yield max(begin, end - BLOCK), min(BLOCK, end - begin)
