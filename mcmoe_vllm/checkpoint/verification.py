"""Every byte of a compressed checkpoint against its manifest and docs/FORMAT.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import safe_open

from mcmoe_kernels.formats import packing
from mcmoe_kernels.formats.format import find
from mcmoe_vllm.checkpoint.files import Checkpoint
from mcmoe_vllm.checkpoint.format import INDEX_FILE, MANIFEST_FILE
from mcmoe_vllm.checkpoint.manifest import file_sha256, read_manifest, tensor_sha256
from mcmoe_vllm.disk import explain_os_errors, read_json
from mcmoe_vllm.widths import in_words


@dataclass(frozen=True)
class Pair:
    """Two tensors that store one matrix [rows, columns]: codes and scales.

    bits: the codes' width; group_size: columns that share a scale.
    """

    codes: str
    scales: str
    rows: int
    columns: int
    bits: int
    group_size: int


def wrong_content(checkpoint: Checkpoint, pairs: list[Pair]) -> Iterator[str]:
    """Every shard and tensor against the manifest, every scale and zero against the format."""
    yield from _wrong_index(checkpoint)
    manifest = read_manifest(checkpoint.path)
    shards, tensors = manifest["shards"], manifest["tensors"]
    by_shard: dict[str, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        by_shard.setdefault(info.shard, []).append(name)
    yield from (
        f"{name} is in {MANIFEST_FILE} alone" for name in sorted(set(shards) - set(by_shard))
    )
    yield from (
        f"{name} is in {MANIFEST_FILE} alone"
        for name in sorted(set(tensors) - set(checkpoint.tensors))
    )
    scales = {pair.scales: pair for pair in pairs}
    for shard, names in sorted(by_shard.items()):
        file = checkpoint.path / shard
        expected = shards.get(shard)
        if expected is None:
            yield f"{shard} is not in {MANIFEST_FILE}"
        elif file.stat().st_size != expected["bytes"]:
            yield f"{shard} has {file.stat().st_size} bytes, the manifest says {expected['bytes']}"
        elif file_sha256(file) != expected["sha256"]:
            yield f"{shard} has another SHA-256 than the manifest says"
        with explain_os_errors(f"reading {file}"), safe_open(file, framework="pt") as f:
            for name in names:
                tensor = f.get_tensor(name)
                if name not in tensors:
                    yield f"{name} is not in {MANIFEST_FILE}"
                elif tensor_sha256(tensor) != tensors[name]:
                    yield f"{name} has another SHA-256 than the manifest says"
                if name in scales:
                    yield from _wrong_values(tensor, scales[name])


def _wrong_index(checkpoint: Checkpoint) -> list[str]:
    """What the weight index leaves out; `open_checkpoint` has checked what it does say."""
    if not (checkpoint.path / INDEX_FILE).exists():
        return [f"{INDEX_FILE} is missing"]
    index = read_json(checkpoint.path / INDEX_FILE)
    wrong = [
        f"{n} is not in {INDEX_FILE}" for n in checkpoint.tensors if n not in index["weight_map"]
    ]
    told = index["metadata"].get("total_size") if isinstance(index.get("metadata"), dict) else None
    if told != checkpoint.nbytes:
        wrong.append(f"{INDEX_FILE} has total_size {told}, the tensors take {checkpoint.nbytes}")
    return wrong


def _wrong_values(tensor: torch.Tensor, pair: Pair) -> Iterator[str]:
    """tensor: `weight_scale` of an expert (float16 in version 1) or `scales` of a linear."""
    scale, zero = tensor.float(), None
    if pair.codes.endswith(".weight_packed"):
        if tensor.dtype == torch.float16:
            scale, zero = scale[:, ::2], scale[:, 1::2]
        else:
            scale, zero = packing.unpack_scale(tensor, pair.bits)
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bad.any():
        yield f"{pair.scales} has {int(bad.sum())} scales that are not finite and positive"
    for dtype in (torch.bfloat16, torch.float16):
        inexact = ~bad & (scale.to(dtype).float() != scale)
        if inexact.any():
            name = str(dtype).removeprefix("torch.")
            yield f"{pair.scales} has {int(inexact.sum())} scales that {name} cannot hold"
    if zero is None:
        return
    format_ = find(pair.bits)
    if format_.levels == 2:
        bad, allowed = zero != 0.5, "0.5"
    else:
        most, steps = format_.levels - 1, format_.zero_steps
        # A comparison with NaN is false: written so that NaN is bad.
        bad = ~((zero >= 0) & (zero <= most) & (steps * zero == (steps * zero).round()))
        allowed = f"multiples of {1 / steps} in 0..{most}" if steps > 1 else f"integers 0..{most}"
    if bad.any():
        yield (
            f"{pair.scales} has {int(bad.sum())} zeros out of range, allowed at "
            f"{in_words(pair.bits)}: {allowed}"
        )
