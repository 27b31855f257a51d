"""Compressed checkpoints that hold what their config promises, made without a quantizer."""

from pathlib import Path
from typing import Any

import torch

from mcmoe_kernels.formats.packing import pack_scale
from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.checkpoint.manifest import write_manifest
from mcmoe_vllm.checkpoint.writing import shard_name, write_index, write_shard
from mcmoe_vllm.disk import write_json
from mcmoe_vllm.model.agreement import Promise, open_layout, promised_tensors
from tests.conftest import make_tiny_model

SHARD = shard_name(1, 1)
SMALL = {"vocab_size": 128}


def make_checkpoint(
    folder: Path, model_type: str, widths: str = "3210", dense_bits: int = 4, **settings: Any
) -> Path:
    """A folder with random codes and weights: two layers, whose experts have `widths`; the last of
    them is repeated for as many experts as there are."""
    source = make_tiny_model(folder.with_name(f"{folder.name}-16"), model_type, **SMALL, **settings)
    original = open_checkpoint(source)
    layout = open_layout(original, None)
    config, skeleton = original.config, layout.skeleton
    digits = (widths + widths[-1] * skeleton.num_experts)[: skeleton.num_experts]
    quantization = QuantizationConfig(
        group_size=dict.fromkeys(("w13", "w2", "dense"), 32),
        expert_bits=dict.fromkeys(skeleton.moe_layers, (digits, digits)),
        dense_bits=dense_bits,
        dense_modules=layout.dense if dense_bits == 4 else (),
        format_version=layout.format_version,
    )
    promised = promised_tensors(layout, quantization)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    write_shard(folder / SHARD, {n: _tensor(p, generator) for n, p in promised.items()})
    write_json(folder / "config.json", {**config, "quantization_config": quantization.to_dict()})
    write_index(folder, [SHARD])
    write_manifest(folder, [SHARD])
    return folder


def _tensor(promise: Promise, generator: torch.Generator) -> torch.Tensor:
    dtype = promise.dtypes[0]
    if dtype == "I16":
        ones = torch.ones(promise.shape)
        bits = promise.matrix.width
        return pack_scale(ones * 2.0**-8, ones * 0.5 if bits == 1 else ones, bits=bits)
    if dtype == "F16":
        return torch.full(promise.shape, 2.0**-6, dtype=torch.float16)
    if dtype in ("U8", "I32"):
        kind, least, most = {
            "U8": (torch.uint8, 0, 1 << 8),
            "I32": (torch.int32, -(1 << 31), 1 << 31),
        }[dtype]
        return torch.randint(least, most, promise.shape, dtype=kind, generator=generator)
    return (torch.randn(promise.shape, generator=generator) / 8).to(torch.bfloat16)
