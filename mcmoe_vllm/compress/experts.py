"""The routed experts of one layer, quantized."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mcmoe_kernels.formats import packing
from mcmoe_vllm.model.streaming import Routing, experts_output
from mcmoe_vllm.quantize import quantizer
from mcmoe_vllm.quantize.codes import Quantized
from mcmoe_vllm.quantize.hessians import (
    count_tokens,
    expert_chunks,
    inner_hessians,
    input_hessians,
    shared_gram,
    starved_experts,
)
from mcmoe_vllm.quantize.refine import answer_inputs

if TYPE_CHECKING:
    from mcmoe_vllm.compress.job import Job


@dataclass(frozen=True)
class QuantizedExpert:
    """w13 [2I, H] and w2 [H, I], each as a batch of one."""

    w13: Quantized
    w2: Quantized


def quantize_experts(
    job: Job,
    index: int,
    routing: Routing,
    bits: Sequence[tuple[int, int]],
    exact: torch.Tensor | None,
) -> tuple[dict[str, Any], dict[int, QuantizedExpert]]:
    """All routed experts of a layer at their widths (w13, w2), dropped ones left out. exact: what
    the 16-bit model gives them, [T, H], where that is what their outputs are fitted to."""
    options, activation = job.options, job.model.activation()
    traits = options.traits
    found: dict[int, QuantizedExpert] = {}
    error = signal = 0.0
    rounding_kept = matrices = 0
    damping = 0.0
    quantize = partial(
        quantizer.quantize, group_size=options.group_size, method=traits.method, recipe=traits
    )
    kept = [e for e in range(job.num_experts) if bits[e][0]]
    share = partial(shared_gram, routing, traits.shared_tokens, job.model.device)
    shared, shared_cross = share(), None if exact is None else share(exact)
    for chunk in expert_chunks(len(kept), job.hidden_size, job.expert_width):
        experts = [kept[i] for i in chunk]
        pairs = [job.read_expert(index, e) for e in experts]
        w13, w2 = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
        del pairs
        weighting = traits.hessian_weighting
        hessian13 = input_hessians(routing, experts, weighting, shared)
        widths = torch.tensor([bits[e] for e in experts], device=w13.device).unbind(1)
        wanted13 = w13
        if shared_cross is not None:
            cross13 = input_hessians(routing, experts, weighting, shared_cross, exact)
            w13 = answer_inputs(w13, hessian13, cross13)
            del cross13
        q13 = quantize(w13, hessian13, widths[0], splits=2)
        given = q13.dequantize() if traits.answers else wanted13
        hessian2, cross = inner_hessians(
            routing, experts, given, wanted13, activation, weighting, exact
        )
        if traits.answers:
            w2 = answer_inputs(w2, hessian2, cross)
        q2 = quantize(w2, hessian2, widths[1], splits=1)
        for weight, hessian, q in ((w13, hessian13, q13), (w2, hessian2, q2)):
            error += float(q.error.sum())
            signal += float(((weight.float() @ hessian) * weight).sum())
            rounding_kept += int((~q.gptq_kept).sum())
            matrices += q.gptq_kept.numel()
            damping = max(damping, float(q.damping.max()))
        del hessian13, hessian2, cross, given, wanted13, w13, w2
        for position, expert in enumerate(experts):
            found[expert] = QuantizedExpert(q13.matrix(position), q2.matrix(position))
    tokens = count_tokens(routing, job.num_experts)
    return {
        "bits": [list(pair) for pair in bits],
        "error": math.sqrt(max(error, 0.0) / signal) if signal else 0.0,
        "rounding_kept": rounding_kept,
        "matrices": matrices,
        "damping": damping,
        "tokens": tokens,
        "starved": starved_experts(tokens),
    }, found


def store_experts(
    job: Job,
    index: int,
    experts: Mapping[int, QuantizedExpert],
    bits: Sequence[tuple[int, int]],
    tensors: dict[str, torch.Tensor],
) -> None:
    """The experts' packed codes, scales and zeros into `tensors`."""
    for expert, matrices in experts.items():
        half = matrices.w13.codes.shape[1] // 2
        parts = (
            matrices.w13.select(slice(0, half)),
            matrices.w13.select(slice(half, None)),
            matrices.w2,
        )
        names = job.architecture.expert_weights(index, expert)
        w13, w2 = bits[expert]
        for name, part, width in zip(names, parts, (w13, w13, w2), strict=True):
            prefix = name.removesuffix("weight")
            tensors[prefix + "weight_packed"] = packing.pack(part.codes[0], width).cpu()
            tensors[prefix + "weight_scale"] = packing.pack_scale(
                part.scale[0], part.zero[0], width
            ).cpu()


def routed_output(
    job: Job, routing: Routing, experts: Mapping[int, QuantizedExpert]
) -> torch.Tensor:
    """What the quantized experts put out, [T, H]."""

    def dequantize(expert: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        if expert not in experts:
            return None
        pair = (experts[expert].w13, experts[expert].w2)
        w13, w2 = (q.dequantize()[0].to(job.model.dtype) for q in pair)
        return w13, w2

    return experts_output(routing, dequantize, job.num_experts, job.model.activation())
