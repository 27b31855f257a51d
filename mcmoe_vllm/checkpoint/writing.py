"""Shards and the weight index, written whole or not at all."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from mcmoe_vllm.checkpoint.files import read_header
from mcmoe_vllm.checkpoint.format import INDEX_FILE
from mcmoe_vllm.disk import explain_os_errors, replacing, write_json


def write_shard(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all. metadata: of its header, more than usual."""
    with explain_os_errors(f"writing {path}"), replacing(path) as temporary:
        save_file(
            {name: t.contiguous() for name, t in tensors.items()},
            temporary,
            metadata={"format": "pt", **(metadata or {})},
        )


def shard_name(index: int, count: int) -> str:
    """`model-00001-of-00033.safetensors`, index from 1."""
    return f"model-{index:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, shards: Iterable[str]) -> None:
    """Write the weight index of finished shards, from their headers."""
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        for name, info in sorted(read_header(folder / shard).items()):
            weight_map[name] = shard
            total += info.nbytes
    with explain_os_errors(f"writing {folder / INDEX_FILE}"):
        write_json(
            folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
