"""The routed experts of one layer, quantized."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mcmoe_kernels.formats import packing
from mcmoe_vllm.model.decoder_layer import DecoderLayer
from mcmoe_vllm.model.expert_reader import LayerExperts
from mcmoe_vllm.model.experts import (
    Expert,
    Routing,
    count_tokens,
    experts_output,
    interleave,
)
from mcmoe_vllm.quantize import quantizer
from mcmoe_vllm.quantize.codes import Quantized
from mcmoe_vllm.quantize.hessians import (
    expert_chunks,
    inner_hessians,
    input_hessians,
    shared_gram,
    starved_experts,
)
from mcmoe_vllm.quantize.refine import answer_inputs
from mcmoe_vllm.recipes import Recipe


@dataclass(frozen=True)
class QuantizedExpert:
    """w13 [2I, H] and w2 [H, I], each as a batch of one; biases as in `Expert`, which stay as they
    are."""

    w13: Quantized
    w2: Quantized
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None


@dataclass
class _Losses:
    """What quantizing lost, summed over matrices."""

    error: float = 0.0
    signal: float = 0.0
    rounding_kept: int = 0
    matrices: int = 0
    damping: float = 0.0

    def add(self, weight: torch.Tensor, hessian: torch.Tensor, q: Quantized) -> None:
        self.error += float(q.error.sum())
        self.signal += float(((weight.float() @ hessian) * weight).sum())
        self.rounding_kept += int((~q.gptq_kept).sum())
        self.matrices += q.gptq_kept.numel()
        self.damping = max(self.damping, float(q.damping.max()))

    def to_dict(self) -> dict[str, Any]:
        share = math.sqrt(max(self.error, 0.0) / self.signal) if self.signal else 0.0
        return {
            "error": share,
            "rounding_kept": self.rounding_kept,
            "matrices": self.matrices,
            "damping": self.damping,
        }


def quantize_experts(
    layer: DecoderLayer,
    routing: Routing,
    widths: Sequence[tuple[int, int]],
    group_size: Mapping[str, int],
    recipe: Recipe,
    exact: torch.Tensor | None,
) -> tuple[dict[str, Any], dict[int, QuantizedExpert]]:
    """All routed experts of a layer at their widths (w13, w2), dropped ones left out; and what
    report.json says of them.

    routing: of the calibration tokens; exact: what the 16-bit model gives the experts, [T, H],
    where that is what their outputs are fitted to.
    """
    found: dict[int, QuantizedExpert] = {}
    losses = _Losses()
    quantize = partial(quantizer.quantize, method=recipe.method, recipe=recipe)
    weighting, activation = recipe.hessian_weighting, layer.activation
    kept = [e for e in range(layer.num_experts) if widths[e][0]]
    share = partial(shared_gram, routing, recipe.shared_tokens, layer.device)
    shared, shared_cross = share(), None if exact is None else share(exact)
    for chunk in expert_chunks(len(kept), *_shape(layer.experts)):
        experts = [kept[i] for i in chunk]
        batch = [layer.experts.present(e).to(layer.device, torch.float32) for e in experts]
        w13, w2 = torch.stack([e.w13 for e in batch]), torch.stack([e.w2 for e in batch])
        biases = [(e.w13_bias, e.w2_bias) for e in batch]
        del batch
        hessian13 = input_hessians(routing, experts, weighting, shared)
        width13, width2 = torch.tensor([widths[e] for e in experts], device=w13.device).unbind(1)
        wanted13 = w13
        if shared_cross is not None:
            cross13 = input_hessians(routing, experts, weighting, shared_cross, exact)
            w13 = answer_inputs(w13, hessian13, cross13)
            del cross13
        q13 = quantize(w13, hessian13, width13, group_size["w13"], splits=2)
        given = q13.dequantize() if recipe.answers else wanted13
        hessian2, cross = inner_hessians(
            routing, experts, given, wanted13, activation, weighting, exact, [b for b, _ in biases]
        )
        if recipe.answers:
            w2 = answer_inputs(w2, hessian2, cross)
        q2 = quantize(w2, hessian2, width2, group_size["w2"], splits=1)
        losses.add(w13, hessian13, q13)
        losses.add(w2, hessian2, q2)
        del hessian13, hessian2, cross, given, wanted13, w13, w2
        for position, expert in enumerate(experts):
            matrices = q13.matrix(position), q2.matrix(position)
            found[expert] = QuantizedExpert(*matrices, *biases[position])
    tokens = count_tokens(routing, layer.num_experts)
    return {
        "bits": [list(pair) for pair in widths],
        **losses.to_dict(),
        "tokens": tokens,
        "starved": starved_experts(tokens),
    }, found


def routed_output(
    layer: DecoderLayer, routing: Routing, experts: Mapping[int, QuantizedExpert]
) -> torch.Tensor:
    """What the quantized experts put out, float32 [T, H]."""

    def dequantize(expert: int) -> Expert | None:
        if expert not in experts:
            return None
        found = experts[expert]
        w13, w2 = (q.dequantize()[0] for q in (found.w13, found.w2))
        return Expert(w13, w2, found.w13_bias, found.w2_bias).to(w13.device, layer.dtype)

    return experts_output(routing, dequantize, layer.num_experts, layer.activation)


def pack_expert(
    names: Sequence[str], expert: QuantizedExpert, widths: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """An expert's packed codes, scales and zeros by checkpoint name. names: of the gate, up and
    down weight, or of both in pairs of rows and of down; widths: of w13 and w2."""
    rows = torch.arange(expert.w13.codes.shape[1])
    halves = rows.chunk(2) if len(names) == 3 else (interleave(rows),)
    parts = (*(expert.w13.select(half) for half in halves), expert.w2)
    each = (*[widths[0]] * len(halves), widths[1])
    tensors = {}
    for name, part, width in zip(names, parts, each, strict=True):
        tensors[f"{name}_packed"] = packing.pack(part.codes[0], width).cpu()
        tensors[f"{name}_scale"] = packing.pack_scale(part.scale[0], part.zero[0], width).cpu()
    return tensors


def _shape(experts: LayerExperts) -> tuple[int, int]:
    """Hidden size and width of a layer's experts."""
    hidden, width = experts.present(0).w2.shape
    return hidden, width
