"""The experts of a layer as one opaque operator: `torch.ops.mcmoe.experts`.

On a CPU vLLM compiles the model as a whole, so what happens inside must be hidden from the
compiler. The graph holds the layer's name, not its weights; the same name in the same process is
the same layer, so a compiled graph from the cache finds its weights again.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.logger import init_logger

from mcmoe_kernels.experts import ExpertLayer, fused_experts_static, gated_activation
from mcmoe_kernels.experts_cpu import (
    CpuExperts,
    DenseKernel,
    dense_bytes,
    fused_experts_cpu,
    int4_supported,
    prepare,
    prepare_dense,
)
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin.cache import CacheBudget
from mcmoe_vllm.plugin.pruning import LayerPruning

logger = init_logger("vllm.mcmoe")

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class PreparedExperts:
    """What the operator runs for a layer. `path` names it for the log."""

    path: str
    compute: Compute
    keeps_packed: bool


_layers: weakref.WeakValueDictionary[str, PreparedExperts] = weakref.WeakValueDictionary()


def add_layer(name: str, prepared: PreparedExperts) -> None:
    """Let the operator find a layer by name for as long as `prepared` is alive.

    Raises UserError if another live layer has the name: a second engine in this process would
    otherwise compute with the weights of the first.
    """
    if name in _layers:
        gc.collect()  # a deleted engine's objects refer to each other and wait for the collector
    if name in _layers:
        raise UserError(
            f"{name} is already loaded in this process: two mcmoe engines cannot share one "
            f"process. Delete the first one, or start each in a process of its own."
        )
    _layers[name] = prepared


def run_experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str
) -> torch.Tensor:
    """x [T, H], topk_weights float [T, k], topk_ids int [T, k] (-1: skipped) -> new [T, H]."""
    return _layers[layer_name].compute(x, topk_weights, topk_ids)


def _fake_experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str
) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def define_operator() -> None:
    """Define `mcmoe::experts`, once per process even if this module is imported twice."""
    if hasattr(torch.ops.mcmoe, "experts"):
        return
    torch.library.define(
        "mcmoe::experts",
        "(Tensor x, Tensor topk_weights, Tensor topk_ids, str layer_name) -> Tensor",
        tags=(torch.Tag.needs_fixed_stride_order,),
    )
    torch.library.impl("mcmoe::experts", ("cpu", "cuda"))(run_experts)
    torch.library.register_fake("mcmoe::experts")(_fake_experts)


def prepare_experts(
    layer: ExpertLayer,
    dtype: torch.dtype,
    cache: CacheBudget,
    top_k: int,
    pruning: LayerPruning | None = None,
) -> PreparedExperts:
    """Choose and prepare the compute path for the device that holds the packed weights."""
    if layer.w13.scale[0].device.type != "cpu":
        return prepare_on_gpu(layer, dtype, top_k, pruning)
    return add_pruning(prepare_on_cpu(layer, dtype, cache), pruning)


def prepare_on_cpu(layer: ExpertLayer, dtype: torch.dtype, cache: CacheBudget) -> PreparedExperts:
    """Dequantized weights while the budget lasts, else codes."""
    mode = choose_mode(layer, dtype, cache)
    if mode == "dense":
        dense = prepare_dense(layer, dtype)
        kernel = vllm_kernel(*dense, layer.activation)
        experts = prepare(layer, mode, None if kernel else dense, kernel)
        path = f"CPU, weights dequantized to {_short(dtype)} at load"
        path += " (vLLM's fused kernel)" if kernel else ""
    else:
        experts = prepare(layer, mode)
        path = {"int4": "CPU, int4", "packed": f"CPU, dequantized to {_short(dtype)} per call"}[
            mode
        ]
    return PreparedExperts(path, _bind(experts), keeps_packed=mode != "dense")


def add_pruning(prepared: PreparedExperts, pruning: LayerPruning | None) -> PreparedExperts:
    """The same experts behind the pruning rule in plain torch."""
    if pruning is None:
        return prepared
    compute = prepared.compute

    def pruned(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return compute(x, *pruning(weights, ids))

    return PreparedExperts(prepared.path, pruned, prepared.keeps_packed)


def prepare_on_gpu(
    layer: ExpertLayer, dtype: torch.dtype, top_k: int, pruning: LayerPruning | None
) -> PreparedExperts:
    """The Triton kernels, compiled for every batch size; plain torch where they cannot run."""
    problems = why_not_triton(layer, dtype)
    if problems:
        logger.warning_once(
            "mcmoe: the Triton kernels are not used, plain torch computes every expert on every "
            "token: %s",
            "; ".join(problems),
        )
        plain = PreparedExperts(
            "plain torch (every expert on every token)",
            lambda x, weights, ids: fused_experts_static(x, layer, weights, ids),
            keeps_packed=True,
        )
        return add_pruning(plain, pruning)
    from mcmoe_kernels.experts_gpu import fused_experts, warm_up
    from mcmoe_kernels.tiles import tile_layer

    tiled = tile_layer(layer)
    if pruning is None or pruning.renormalize:  # the kernels leave weights as they are
        warm_up(tiled, top_k, dtype)
        prepared = PreparedExperts(
            "Triton kernels",
            lambda x, weights, ids: fused_experts(x, tiled, weights, ids),
            keeps_packed=False,
        )
        return add_pruning(prepared, pruning)
    ratio, counts = pruning.ratio, pruning.counts
    warm_up(tiled, top_k, dtype, ratio, counting=counts is not None)

    def compute(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        row = None if counts is None else counts.row()
        out = fused_experts(x, tiled, weights, ids, prune_ratio=ratio, counts=row)
        if counts is not None:
            counts.show()
        return out

    return PreparedExperts("Triton kernels", compute, keeps_packed=False)


def why_not_triton(layer: ExpertLayer, dtype: torch.dtype) -> list[str]:
    """Reasons why the Triton kernels cannot run a layer; none if they can."""
    try:
        from mcmoe_kernels.experts_gpu import why_not_gpu
    except ImportError as e:
        return [f"triton cannot be imported ({e})"]
    from mcmoe_kernels.tiles import why_not_tiled

    return why_not_gpu(layer.w13.scale[0].device, dtype) + why_not_tiled(layer)


def choose_mode(layer: ExpertLayer, dtype: torch.dtype, cache: CacheBudget) -> str:
    """The CPU mode of a layer; a layer that is kept dequantized is paid for from `cache`."""
    if cache.take(dense_bytes(layer, dtype)):
        return "dense"
    return "int4" if int4_supported(layer, dtype) else "packed"


def vllm_kernel(w13: torch.Tensor, w2: torch.Tensor, activation: str) -> DenseKernel | None:
    """vLLM's fused kernel over dense experts, or None where this vLLM or CPU has none for them.

    The kernel holds a repacked copy of w13 [S, 2I, H] and w2 [S, H, I]. vLLM's interface differs
    between versions, so the kernel is tried on one token before it is trusted.
    """
    from vllm import _custom_ops as ops

    isa = "amx" if w13.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"
    if any(size % 32 for size in (*w13.shape[1:], *w2.shape[1:])) or not w13.shape[0]:
        return None
    if not all(hasattr(ops, f) for f in ("cpu_fused_moe", "cpu_prepack_moe_weight")):
        return None
    probe = torch.linspace(-1, 1, w13.shape[2]).to(w13.dtype).unsqueeze(0)
    expected = _one_expert(probe, w13[0], w2[0], activation)
    try:
        packed13 = ops.cpu_prepack_moe_weight(w13, isa)
        packed2 = ops.cpu_prepack_moe_weight(w2, isa)

        def kernel(x: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(x)
            ops.cpu_fused_moe(
                out,
                x.contiguous(),
                packed13,
                packed2,
                None,
                None,
                weights.to(torch.float32).contiguous(),
                slots.to(torch.int32).contiguous(),
                activation,
                isa,
            )
            return out

        got = kernel(probe, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
    except (AttributeError, RuntimeError, TypeError) as e:
        logger.warning_once("mcmoe: vLLM's fused CPU kernel is not used: %s", str(e))
        return None
    tolerance = 0.05 * float(expected.abs().max())
    if not torch.allclose(got.float(), expected.float(), rtol=0.05, atol=tolerance):
        logger.warning_once("mcmoe: vLLM's fused CPU kernel is not used: it gives another result")
        return None
    return kernel


def _one_expert(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, activation: str
) -> torch.Tensor:
    return gated_activation(x.float() @ w13.float().t(), activation) @ w2.float().t()


def _bind(experts: CpuExperts) -> Compute:
    return lambda x, weights, ids: fused_experts_cpu(x, experts, weights, ids)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


define_operator()
