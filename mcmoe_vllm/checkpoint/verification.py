"""A compressed checkpoint against its manifest and docs/FORMAT.md: headers alone, or every byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from mcmoe_kernels.formats import packing
from mcmoe_kernels.formats.format import find
from mcmoe_vllm.checkpoint.files import Checkpoint, TensorInfo
from mcmoe_vllm.checkpoint.format import INDEX_FILE, MANIFEST_FILE
from mcmoe_vllm.checkpoint.manifest import Manifest, file_sha256, read_manifest, tensor_sha256
from mcmoe_vllm.disk import explain_os_errors, read_json
from mcmoe_vllm.widths import in_words

HALVES = {"float16": "F16", "bfloat16": "BF16"}  # 16-bit dtypes as config.json and headers say
QUANTIZED = ("weight_packed", "weight_scale", ".qweight", ".scales")  # docs/FORMAT.md has theirs


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


def wrong_headers(checkpoint: Checkpoint, manifest: Manifest | None) -> list[str]:
    """Names, dtypes and shapes of the headers against the manifest; no tensor is read.

    Where it records no dtypes, or there is none, what is stored as in the original model must be
    F32 or the 16-bit dtype that config.json names, or that most have if it names none.
    """
    recorded = {} if manifest is None else manifest.tensors
    wrong = []
    if manifest is not None:
        wrong += [f"{n} is in {MANIFEST_FILE} alone" for n in recorded if n not in checkpoint]
        wrong += [f"{n} is not in {MANIFEST_FILE}" for n in checkpoint.names() if n not in recorded]
    unrecorded = {}
    for name, info in checkpoint.tensors.items():
        entry = recorded.get(name)
        if entry is None or entry.dtype is None or entry.shape is None:
            unrecorded[name] = info
        elif (info.dtype, info.shape) != (entry.dtype, entry.shape):
            wrong.append(
                f"{name} is {info.dtype} {list(info.shape)}, {MANIFEST_FILE} says {entry.dtype} "
                f"{list(entry.shape)}"
            )
    return wrong + _mixed_halves(unrecorded, checkpoint.config)


def wrong_content(checkpoint: Checkpoint, pairs: list[Pair]) -> Iterator[str]:
    """Every shard and tensor against the manifest, every scale and zero against the format."""
    yield from _wrong_index(checkpoint)
    manifest = read_manifest(checkpoint.path)
    yield from wrong_headers(checkpoint, manifest)
    by_shard = names_by_shard(checkpoint)
    yield from (
        f"{name} is in {MANIFEST_FILE} alone"
        for name in sorted(set(manifest.shards) - set(by_shard))
    )
    scales = {pair.scales: pair for pair in pairs}
    for shard, names in sorted(by_shard.items()):
        yield from _wrong_shard(checkpoint, manifest, shard)
        file = checkpoint.path / shard
        with explain_os_errors(f"reading {file}"), safe_open(file, framework="pt") as f:
            for name in names:
                tensor, entry = f.get_tensor(name), manifest.tensors.get(name)
                if entry is not None and tensor_sha256(tensor) != entry.sha256:
                    yield f"{name} has another SHA-256 than the manifest says"
                if name in scales:
                    yield from wrong_values(name, tensor, scales[name].bits)


def wrong_values(name: str, tensor: torch.Tensor, bits: int) -> Iterator[str]:
    """Scales and zeros that docs/FORMAT.md does not allow for codes of so many bits. tensor:
    `weight_scale` of an expert (float16 in version 1) or `scales` of a linear."""
    scale, zero = tensor.float(), None
    if name.endswith("weight_scale"):
        if tensor.dtype == torch.float16:
            scale, zero = scale[:, ::2], scale[:, 1::2]
        else:
            scale, zero = packing.unpack_scale(tensor, bits)
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bad.any():
        yield f"{name} has {int(bad.sum())} scales that are not finite and positive"
    for dtype in (torch.bfloat16, torch.float16):
        inexact = ~bad & (scale.to(dtype).float() != scale)
        if inexact.any():
            kind = str(dtype).removeprefix("torch.")
            yield f"{name} has {int(inexact.sum())} scales that {kind} cannot hold"
    if zero is None:
        return
    format_ = find(bits)
    if format_.levels == 2:
        bad, allowed = zero != 0.5, "0.5"
    else:
        most, steps = format_.levels - 1, format_.zero_steps
        # A comparison with NaN is false: written so that NaN is bad.
        bad = ~((zero >= 0) & (zero <= most) & (steps * zero == (steps * zero).round()))
        allowed = f"multiples of {1 / steps} in 0..{most}" if steps > 1 else f"integers 0..{most}"
    if bad.any():
        yield (
            f"{name} has {int(bad.sum())} zeros out of range, allowed at "
            f"{in_words(bits)}: {allowed}"
        )


def names_by_shard(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The tensors of each shard."""
    found: dict[str, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        found.setdefault(info.shard, []).append(name)
    return found


def _mixed_halves(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> list[str]:
    """Tensors of the original model whose dtype is neither F32 nor its 16-bit one."""
    original = {n: t.dtype for n, t in tensors.items() if not n.endswith(QUANTIZED)}
    told = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    half, source = HALVES.get(told), "config.json says"
    if half is None:
        halves = Counter(dtype for dtype in original.values() if dtype in HALVES.values())
        half, source = max(halves, key=lambda d: (halves[d], d), default="F32"), "most others are"
    return [
        f"{name} is {dtype}, {source} {half}"
        for name, dtype in original.items()
        if dtype not in (half, "F32")
    ]


def _wrong_shard(checkpoint: Checkpoint, manifest: Manifest, shard: str) -> Iterator[str]:
    file, expected = checkpoint.path / shard, manifest.shards.get(shard)
    if expected is None:
        yield f"{shard} is not in {MANIFEST_FILE}"
    elif file.stat().st_size != expected.nbytes:
        yield f"{shard} has {file.stat().st_size} bytes, the manifest says {expected.nbytes}"
    elif file_sha256(file) != expected.sha256:
        yield f"{shard} has another SHA-256 than the manifest says"


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
