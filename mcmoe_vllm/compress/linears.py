"""Attention, shared experts and router of one layer, quantized in the layer itself.

Each function returns what report.json says, and the tensors that replace the 16-bit weights, by
their name in the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from mcmoe_kernels.formats import packing
from mcmoe_vllm.checkpoint.format import DENSE_WIDTH
from mcmoe_vllm.model.decoder_layer import DecoderLayer
from mcmoe_vllm.model.runner import watch_inputs
from mcmoe_vllm.quantize import quantizer
from mcmoe_vllm.quantize.codes import relative_error
from mcmoe_vllm.quantize.hessians import gram
from mcmoe_vllm.quantize.refine import DENSE_DAMPING, answer_inputs
from mcmoe_vllm.recipes import Recipe

Tensors = dict[str, torch.Tensor]
Inputs = dict[str, list[torch.Tensor]]


def dense_groups(layer: DecoderLayer, linears: Sequence[Sequence[str]]) -> list[list[str]]:
    """The linears that the layer has, grouped by the input that they share."""
    present = {name for name, _ in layer.module.named_modules()}
    groups = ([name for name in group if name in present] for group in linears)
    return [group for group in groups if group]


def quantize_dense(
    layer: DecoderLayer,
    groups: Sequence[Sequence[str]],
    blocks: Sequence[torch.Tensor],
    wanted: Inputs | None,
    group_size: int,
    recipe: Recipe,
) -> tuple[dict[str, Any], dict[str, Tensors]]:
    """Linears to symmetric int4; linear -> {"qweight", "scales"}.

    blocks: what the layer is given; wanted: what the 16-bit model gives the first linear of each
    group, where that is what their outputs are fitted to: each group after those before it are
    quantized.
    """
    report: dict[str, Any] = {}
    stored: dict[str, Tensors] = {}
    for together in [groups] if wanted is None else [[group] for group in groups]:
        hessians = _input_grams(layer, blocks, [group[0] for group in together], wanted)
        for group in together:
            hessian, cross = hessians[group[0]]
            for name in group:
                linear: Any = layer.module.get_submodule(name)
                weight = linear.weight.detach().float().unsqueeze(0)
                if cross is not None:
                    weight = answer_inputs(weight, hessian, cross, DENSE_DAMPING)
                q = quantizer.quantize(
                    weight, hessian, DENSE_WIDTH, group_size,
                    method=recipe.method, symmetric=True, recipe=recipe,
                )  # fmt: skip
                linear.weight.data = q.dequantize()[0].to(linear.weight.dtype)
                stored[name] = {
                    "qweight": packing.pack_int4_linear(q.codes[0].cpu()),
                    "scales": q.scale[0].t().to(torch.float16).cpu().contiguous(),
                }
                report[name] = {
                    "error": relative_error(weight, hessian, q.error),
                    "rounding_kept": int((~q.gptq_kept).sum()),
                }
    return report, stored


def quantize_router(
    layer: DecoderLayer,
    blocks: Sequence[torch.Tensor],
    dtype: torch.dtype,
    group_size: int,
    recipe: Recipe,
) -> tuple[dict[str, Any], torch.Tensor]:
    """The router to the recipe's width, dequantized in the checkpoint's own dtype, which the format
    wants of a router."""
    router, name = layer.router, layer.router_name
    assert name is not None
    weight = router.weight.detach().float().unsqueeze(0)
    hessian, _ = _input_grams(layer, blocks, [name], None)[name]
    q = quantizer.quantize(
        weight, hessian, recipe.router_bits, group_size, method=recipe.method, recipe=recipe
    )
    stored = q.dequantize()[0].to(dtype).cpu()
    router.weight.data = stored.to(router.weight)
    return {"bits": recipe.router_bits, "error": relative_error(weight, hessian, q.error)}, stored


class _Seen(Exception):
    """All that was looked for in a layer has been seen."""


def _input_grams(
    layer: DecoderLayer,
    blocks: Sequence[torch.Tensor],
    names: Sequence[str],
    wanted: Inputs | None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """X^T X and Y^T X [1, K, K] of what each of the layer's linears is given, X, and what the
    16-bit model gives it, Y; None without `wanted`."""
    found: dict[str, list[torch.Tensor]] = {}
    seen: list[str] = []

    def see(name: str, rows: torch.Tensor) -> None:
        products = [gram(rows)]
        if wanted is not None:
            exact = wanted[name][seen.count(name)].to(rows.device)
            products.append(gram(rows, exact))
        if name in found:
            products = [a + b for a, b in zip(found[name], products, strict=True)]
        found[name] = products
        seen.append(name)
        if len(seen) % len(names) == 0:
            raise _Seen

    with watch_inputs(layer, names, see):
        for block in blocks:
            with suppress(_Seen):
                layer.run(block.to(layer.device))
    return {
        name: (products[0].unsqueeze(0), None if wanted is None else products[1].unsqueeze(0))
        for name, products in found.items()
    }
