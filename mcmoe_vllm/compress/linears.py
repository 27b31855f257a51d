"""Attention, shared experts and router of one layer, quantized."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from mcmoe_kernels.formats import packing
from mcmoe_vllm.checkpoint.format import DENSE_WIDTH
from mcmoe_vllm.model.architectures import ROUTER, dense_weight
from mcmoe_vllm.model.states import ExactLayer, Seen, observing
from mcmoe_vllm.quantize import quantizer
from mcmoe_vllm.quantize.codes import relative_error
from mcmoe_vllm.quantize.hessians import gram
from mcmoe_vllm.quantize.refine import DENSE_DAMPING, answer_inputs

if TYPE_CHECKING:
    from mcmoe_vllm.compress.job import Job


def dense_groups(job: Job, layer: torch.nn.Module) -> list[list[str]]:
    """The linears of a layer that become int4, grouped by the input that they share."""
    groups = (
        [name for name in group if _has_module(layer, name)]
        for group in job.architecture.dense_linears
    )
    return [group for group in groups if group]


def quantize_dense(
    job: Job,
    layer: torch.nn.Module,
    index: int,
    blocks: list[torch.Tensor],
    tensors: dict[str, torch.Tensor],
    groups: list[list[str]],
    wanted: ExactLayer | None,
) -> dict[str, Any]:
    """Attention and shared experts to symmetric int4, in the layer and in `tensors`. wanted: whose
    outputs they are fitted to, each group after those before it are quantized."""
    traits = job.options.traits
    result: dict[str, Any] = {}
    for together in [groups] if wanted is None else [[group] for group in groups]:
        names = [group[0] for group in together]
        hessians = _input_grams(job, layer, index, blocks, names, wanted)
        for group in together:
            hessian, cross = hessians[group[0]]
            for name in group:
                linear: Any = layer.get_submodule(name)
                weight = linear.weight.detach().float().unsqueeze(0)
                if cross is not None:
                    damping = DENSE_DAMPING
                    weight = answer_inputs(weight, hessian, cross, damping)
                q = quantizer.quantize(
                    weight,
                    hessian,
                    DENSE_WIDTH,
                    job.options.group_size,
                    method=traits.method,
                    symmetric=True,
                    recipe=traits,
                )
                linear.weight.data = q.dequantize()[0].to(linear.weight.dtype)
                stored = dense_weight(job, index, name)
                del tensors[stored]
                prefix = stored.removesuffix("weight")
                tensors[prefix + "qweight"] = packing.pack_int4_linear(q.codes[0].cpu())
                tensors[prefix + "scales"] = q.scale[0].t().to(torch.float16).cpu().contiguous()
                result[name] = {
                    "error": relative_error(weight, hessian, q.error),
                    "rounding_kept": int((~q.gptq_kept).sum()),
                }
    return result


def quantize_router(
    job: Job,
    layer: torch.nn.Module,
    index: int,
    blocks: list[torch.Tensor],
    tensors: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """The router to the recipe's bits, in the layer and in `tensors`: dequantized in the
    checkpoint's own dtype, which the format wants of a router."""
    traits = job.options.traits
    router: Any = layer.get_submodule(ROUTER)
    stored = dense_weight(job, index, ROUTER)
    weight = router.weight.detach().float().unsqueeze(0)
    hessian, _ = _input_grams(job, layer, index, blocks, [ROUTER], None)[ROUTER]
    q = quantizer.quantize(
        weight,
        hessian,
        traits.router_bits,
        job.options.group_size,
        method=traits.method,
        recipe=traits,
    )
    tensors[stored] = q.dequantize()[0].to(tensors[stored].dtype).cpu()
    router.weight.data = tensors[stored].to(router.weight)
    return {"bits": traits.router_bits, "error": relative_error(weight, hessian, q.error)}


def _input_grams(
    job: Job,
    layer: torch.nn.Module,
    index: int,
    blocks: list[torch.Tensor],
    names: Sequence[str],
    wanted: ExactLayer | None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """X^T X and Y^T X [1, K, K] of what each of the layer's linears is given, X, and what the
    16-bit model gives it, Y; None without `wanted`."""
    found: dict[str, list[torch.Tensor]] = {}
    seen: list[str] = []

    def see(name: str, rows: torch.Tensor) -> None:
        products = [gram(rows)]
        if wanted is not None:
            exact = wanted.inputs[name][seen.count(name)].to(rows.device)
            products.append(gram(rows, exact))
        if name in found:
            products = [a + b for a, b in zip(found[name], products, strict=True)]
        found[name] = products
        seen.append(name)
        if len(seen) % len(names) == 0:
            raise Seen

    with observing(layer, names, see):
        for block in blocks:
            with suppress(Seen):
                job.model.run_layer(layer, index, block.to(job.model.device))
    return {
        name: (products[0].unsqueeze(0), products[1].unsqueeze(0) if wanted else None)
        for name, products in found.items()
    }


def _has_module(layer: torch.nn.Module, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True
