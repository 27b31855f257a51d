"""The experts of a layer on a CPU: dequantized while the budget lasts, else codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.logger import init_logger

from mcmoe_kernels.activations import Activation, activate
from mcmoe_kernels.cpu.experts import (
    CpuExperts,
    dense_bytes,
    fused_experts_cpu,
    int4_supported,
    prepare,
    prepare_dense,
)
from mcmoe_kernels.layer import ExpertLayer
from mcmoe_vllm.plugin.prepared import CacheBudget, Compute, PreparedExperts

logger = init_logger("vllm.mcmoe")

# What vLLM's fused kernel calls the activations that it computes as they are meant here.
NAMES = {Activation(name): name for name in ("gelu", "gelu_tanh", "silu")}


def prepare_on_cpu(layer: ExpertLayer, dtype: torch.dtype, cache: CacheBudget) -> PreparedExperts:
    """Dequantized weights while the budget lasts, else codes."""
    mode = choose_mode(layer, dtype, cache)
    if mode == "dense":
        dense = prepare_dense(layer, dtype)
        biases = tuple(m.bias for m in (layer.w13, layer.w2) if m.bias is not None)
        kernel = None if biases else vllm_kernel(*dense, layer.activation)
        experts = prepare(layer, mode, None if kernel else dense, kernel)
        path = f"CPU, weights dequantized to {_short(dtype)} at load"
        path += " (vLLM's fused kernel)" if kernel else ""
        held = (*dense, *biases) if kernel is None else (kernel.packed13, kernel.packed2)
        return PreparedExperts(path, _bind(experts), False, held, dense_bytes(layer, dtype))
    experts = prepare(layer, mode)
    path = "CPU, int4" if mode == "int4" else f"CPU, dequantized to {_short(dtype)} per call"
    codes = [m for side in (experts.w13, experts.w2) for m in (() if side is None else side)]
    tensors = (
        *layer.w13.tensors,
        *layer.w2.tensors,
        *(t for matrix in codes for t in (matrix.code, matrix.scale)),
    )
    return PreparedExperts(path, _bind(experts), True, tensors)


def choose_mode(layer: ExpertLayer, dtype: torch.dtype, cache: CacheBudget) -> str:
    """The CPU mode of a layer; a layer that is kept dequantized is paid for from `cache`."""
    if cache.take(dense_bytes(layer, dtype)):
        return "dense"
    return "int4" if int4_supported(layer, dtype) else "packed"


@dataclass(frozen=True, eq=False)
class VllmKernel:
    """vLLM's fused kernel on weights that it has repacked: a `DenseKernel`."""

    packed13: torch.Tensor
    packed2: torch.Tensor
    activation: str
    isa: str

    def __call__(self, x: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        from vllm import _custom_ops as ops

        out = torch.empty_like(x)
        ops.cpu_fused_moe(
            out,
            x.contiguous(),
            self.packed13,
            self.packed2,
            None,
            None,
            weights.to(torch.float32).contiguous(),
            slots.to(torch.int32).contiguous(),
            self.activation,
            self.isa,
        )
        return out


def vllm_kernel(w13: torch.Tensor, w2: torch.Tensor, activation: Activation) -> VllmKernel | None:
    """vLLM's fused kernel over dequantized experts, or None where this vLLM or CPU has none, or
    none for the activation.

    The kernel holds a repacked copy of w13 [S, 2I, H] and w2 [S, H, I]. vLLM's interface differs
    between versions, so the kernel is tried on one token before it is trusted.
    """
    from vllm import _custom_ops as ops

    isa = "amx" if w13.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"
    if activation not in NAMES or not w13.shape[0]:
        return None
    if any(size % 32 for size in (*w13.shape[1:], *w2.shape[1:])):
        return None
    if not all(hasattr(ops, f) for f in ("cpu_fused_moe", "cpu_prepack_moe_weight")):
        return None
    probe = torch.linspace(-1, 1, w13.shape[2]).to(w13.dtype).unsqueeze(0)
    expected = _one_expert(probe, w13[0], w2[0], activation)
    try:
        packed13, packed2 = (ops.cpu_prepack_moe_weight(w, isa) for w in (w13, w2))
        kernel = VllmKernel(packed13, packed2, NAMES[activation], isa)
        got = kernel(probe, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
    except (AttributeError, RuntimeError, TypeError) as e:
        logger.warning_once("mcmoe: vLLM's fused CPU kernel is not used: %s", str(e))
        return None
    tolerance = 0.05 * float(expected.abs().max())
    if not torch.allclose(got.float(), expected.float(), rtol=0.05, atol=tolerance):
        logger.warning_once("mcmoe: vLLM's fused CPU kernel is not used: it gives another result")
        return None
    if _rounds_down(got, expected):
        logger.warning_once(
            "mcmoe: vLLM's fused CPU kernel is not used: on this CPU it cuts %s off instead of "
            "rounding it",
            _short(w13.dtype),
        )
        return None
    return kernel


def _rounds_down(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether results are smaller than expected on average, not just scattered around it.

    Cutting off loses half a unit in the last place on average at every rounding; rounding to
    nearest loses nothing but noise.
    """
    loss = ((expected - got.float()) * expected.sign()).mean() / expected.abs().mean()
    return float(loss) > max(torch.finfo(got.dtype).eps / 4, 1e-5)


def _one_expert(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, activation: Activation
) -> torch.Tensor:
    return activate(x.float() @ w13.float().t(), activation) @ w2.float().t()


def _bind(experts: CpuExperts) -> Compute:
    return lambda x, weights, ids: fused_experts_cpu(x, experts, weights, ids)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
