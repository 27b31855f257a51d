"""Shards and the weight index, written atomically; the files beside them, copied."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from mcmoe_vllm.checkpoint.files import read_header
from mcmoe_vllm.checkpoint.format import (
    INDEX_FILE,
    OWN_FILES,
    SIDE_FILE_STEMS,
    SIDE_FILE_SUFFIXES,
)
from mcmoe_vllm.disk import explain_os_errors, replacing, write_json


def side_files(path: Path, trust_remote_code: bool = False) -> list[Path]:
    """The files of a checkpoint folder, besides weights and config, that a copy needs."""
    return sorted(
        f
        for f in path.iterdir()
        if f.is_file()
        and not f.name.startswith(".")
        and f.name not in OWN_FILES
        and not f.name.endswith(".index.json")
        and (
            f.suffix in SIDE_FILE_SUFFIXES
            or f.name.split(".")[0].upper() in SIDE_FILE_STEMS
            or (trust_remote_code and f.suffix == ".py")
        )
    )


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    with explain_os_errors(f"writing {path}"), replacing(path) as temporary:
        save_file(
            {name: t.contiguous() for name, t in tensors.items()},
            temporary,
            metadata={"format": "pt"},
        )
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read


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


def copy_side_files(source: Path, target: Path, trust_remote_code: bool = False) -> list[str]:
    """Copy tokenizer, generation config, chat template and licence files; their names."""
    files = side_files(source, trust_remote_code)
    with explain_os_errors(f"copying the tokenizer's files to {target}"):
        for file in files:
            shutil.copyfile(file, target / file.name)
    return [f.name for f in files]
