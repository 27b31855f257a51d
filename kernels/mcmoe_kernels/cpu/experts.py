"""The routed experts of one layer on a CPU, from weights prepared once at load.

    mode      kept in memory                               used for
    "dense"   every present expert in the activation dtype any dtype; fastest where memory allows
    "int4"    packed + the int4 form of torch's CPU op     bfloat16; at least 4.25 bits/weight more
    "packed"  packed alone                                 any dtype; smallest, slowest

The int4 form is for codes that are their own values. It holds signed codes q - z in -8..7 with the
scale as it is, so the op's (code - 8) * scale + 0 is the stored weight exactly: 3 bits fit as they
are, 1 and 2 bits in steps of their zeros, with half the scale, and 4 bits, whose q - z spans
-15..15, become twice its half plus the remainder, laid side by side along K and multiplied by
[x, x].

Rounding against `fused_experts_torch`: both products are rounded to x.dtype, and the second one's
bias with it; "dense" and "packed" round each weight to x.dtype, "int4" does not.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from mcmoe_kernels.activations import activate
from mcmoe_kernels.formats.format import find
from mcmoe_kernels.layer import ExpertLayer, ExpertMatrices

MODES = ("dense", "int4", "packed")

# Rows of one expert (twice its tokens at 4 bits) up to which the int4 op beats dequantizing the
# expert for one matmul. 96: the two meet between 64 and 128 rows on one Zen 4 core (AVX-512, torch
# 2.13) at H x I = 384 x 640 (T = 64: 1.3 ms against 1.8 to 2.4 ms, T = 128: 2.4 against 2.3 to
# 2.9 ms) and at 2048 x 2048 (T = 64: 20 against 25 to 34 ms, T = 128: 39 against 32 to 41 ms).
INT4_MAX_ROWS = 96

INT4_RANGE = 16  # of codes in steps of their zeros: from -15 to 15, they are two of the op's

# (x [T, H], topk_weights float32 [T, k], slots int32 [T, k], all valid) -> [T, H]
DenseKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Int4Matrix:
    """One matrix [N, K] in the op's form: code uint8 [N, K'/2], scale bfloat16 [K'/G, N, 2],
    K' = halves * K."""

    code: torch.Tensor
    scale: torch.Tensor
    group_size: int
    halves: int

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x bfloat16 [T, K] -> [T, N]."""
        x = torch.cat([x, x], dim=-1) if self.halves == 2 else x
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.code, self.group_size, self.scale)


@dataclass(frozen=True)
class CpuExperts:
    """What `fused_experts_cpu` needs of a layer. A slot is a present local expert, in order.

    slots: None if every id 0..E-1 is its own slot, or int32 [global experts + 1] -> slot, or -1
    for an expert held elsewhere or dropped; the last entry is -1, so that id -1 finds it. "dense"
    gives dropped experts a slot of zeros instead, which costs a fused kernel less than a gap.
    w13, w2: "dense": [slots, N, K] in the activation dtype; "int4": a list of Int4Matrix;
    else None.
    kernel: "dense": a fused kernel that holds the weights, or None for one matmul per expert.
    """

    layer: ExpertLayer
    mode: str
    experts: tuple[int, ...]
    slots: torch.Tensor | None
    w13: torch.Tensor | tuple[Int4Matrix, ...] | None = None
    w2: torch.Tensor | tuple[Int4Matrix, ...] | None = None
    kernel: DenseKernel | None = None


def dense_bytes(layer: ExpertLayer, dtype: torch.dtype) -> int:
    """Bytes that the "dense" mode keeps of a layer."""
    present = sum(layer.present(e) for e in range(layer.num_experts))
    slots = present + (present < layer.num_experts)
    weights = (layer.rows13 + layer.intermediate_size) * layer.hidden_size
    return slots * weights * dtype.itemsize


def int4_supported(layer: ExpertLayer, dtype: torch.dtype) -> bool:
    """Whether the int4 op is fast (bfloat16 has vector code) and takes these shapes and codes."""
    formats = [find(b) for b in {*layer.w13.bits, *layer.w2.bits} if b]
    return (
        dtype == torch.bfloat16
        and all(f.values is None and f.levels * f.zero_steps <= INT4_RANGE for f in formats)
        and layer.hidden_size % 32 == 0
        and layer.intermediate_size % 32 == 0
    )


def prepare_dense(layer: ExpertLayer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The present experts' w13 [slots, N, H] and w2 [slots, H, I] in dtype, with a last slot of
    zeros if an expert was dropped."""
    experts = [e for e in range(layer.num_experts) if layer.present(e)]
    slots = len(experts) + (len(experts) < layer.num_experts)
    rows, columns = layer.rows13, layer.hidden_size
    w13 = torch.zeros(slots, rows, columns, dtype=dtype)
    w2 = torch.zeros(slots, columns, layer.intermediate_size, dtype=dtype)
    for slot, expert in enumerate(experts):
        w13[slot] = dequantize_to(layer.w13, expert, dtype)
        w2[slot] = dequantize_to(layer.w2, expert, dtype)
    return w13, w2


def prepare(
    layer: ExpertLayer,
    mode: str,
    dense: tuple[torch.Tensor, torch.Tensor] | None = None,
    kernel: DenseKernel | None = None,
) -> CpuExperts:
    """Prepare a layer for a mode.

    "dense" takes what `prepare_dense` returned or a kernel that holds it, and lets the packed
    weights go.
    """
    assert mode in MODES, f"mode {mode!r}, use one of {MODES}"
    assert (mode == "dense") == (dense is not None or kernel is not None)
    experts = tuple(e for e in range(layer.num_experts) if layer.present(e))
    slots = _slots(layer, experts, len(experts) if mode == "dense" else -1)
    if mode == "dense":
        layer = replace(layer, w13=_without_weights(layer.w13), w2=_without_weights(layer.w2))
        w13, w2 = dense if dense is not None else (None, None)
        return CpuExperts(layer, mode, experts, slots, w13, w2, kernel)
    if mode == "int4":
        w13 = tuple(encode_int4(layer.w13, e) for e in experts)
        w2 = tuple(encode_int4(layer.w2, e) for e in experts)
        return CpuExperts(layer, mode, experts, slots, w13, w2)
    return CpuExperts(layer, mode, experts, slots)


def fused_experts_cpu(
    x: torch.Tensor, experts: CpuExperts, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """x [T, H] -> a new [T, H]; the arguments of `fused_experts_torch`, on prepared weights."""
    if x.shape[0] == 0 or not experts.experts:
        return torch.zeros_like(x)
    ids = topk_ids if experts.slots is None else experts.slots[topk_ids.long()]
    if experts.kernel is not None:
        return _run_kernel(x, experts.kernel, topk_weights, ids)
    if x.shape[0] == 1:
        return _one_token(x, experts, topk_weights, ids)
    return _grouped(x, experts, topk_weights, ids)


def dequantize_to(matrices: ExpertMatrices, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's [N, K] in dtype, rounded once.

    In bfloat16 q - z is exact and so is the stored scale, so the product is the only rounding;
    it is computed in bfloat16 because half the memory traffic is nearly twice the speed.
    """
    format_ = find(matrices.bits[expert])
    if not format_.exact16:
        return matrices.dequantize(expert).to(dtype)
    scale, zero = format_.unpack_scale(matrices.scale[expert])
    groups = scale.shape[-1]
    work = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    codes = format_.unpack(matrices.packed[expert]).unflatten(-1, (groups, -1)).to(work)
    codes.sub_(zero.to(work).unsqueeze(-1)).mul_(scale.to(work).unsqueeze(-1))
    return codes.flatten(-2).to(dtype)


def encode_int4(matrices: ExpertMatrices, expert: int) -> Int4Matrix:
    """Re-encode one expert for the int4 op, exactly."""
    format_ = find(matrices.bits[expert])
    scale, zero = format_.unpack_scale(matrices.scale[expert])
    groups = scale.shape[-1]
    q = format_.unpack(matrices.packed[expert]).unflatten(-1, (groups, -1)).float()
    signed = (q - zero.unsqueeze(-1)).flatten(-2)  # [N, K]
    group_size = signed.shape[-1] // groups
    signed, scale = signed * format_.zero_steps, scale / format_.zero_steps
    signed = signed.to(torch.int32)
    fits = int(signed.min()) >= -8 and int(signed.max()) <= 7
    if not fits:
        half = torch.div(signed, 2, rounding_mode="floor")  # -8..7, the remainder is 0 or 1
        signed = torch.cat([half, signed - 2 * half], dim=-1)
        scale = torch.cat([scale * 2, scale], dim=-1)
    code = torch.ops.aten._convert_weight_to_int4pack_for_cpu(signed + 8, 1)
    pairs = torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1)
    return Int4Matrix(code, pairs.contiguous().to(torch.bfloat16), group_size, 1 if fits else 2)


def _without_weights(matrices: ExpertMatrices) -> ExpertMatrices:
    nothing = (torch.empty(0),) * len(matrices)
    return replace(matrices, packed=nothing, scale=nothing)


def _slots(layer: ExpertLayer, experts: tuple[int, ...], dropped: int) -> torch.Tensor | None:
    """The `slots` of CpuExperts; `dropped` is the slot of experts without weights."""
    if layer.expert_map is None and len(experts) == layer.num_experts:
        return None
    slots = torch.full((layer.num_experts + 1,), dropped, dtype=torch.int32)
    slots[list(experts)] = torch.arange(len(experts), dtype=torch.int32)
    slots[-1] = -1
    if layer.expert_map is None:
        return slots
    expert_map = layer.expert_map.cpu().long()
    return torch.cat([slots[expert_map], slots[-1:]])


def _run_kernel(
    x: torch.Tensor, kernel: DenseKernel, topk_weights: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """A kernel that knows no -1: in rows that have one, each other pair becomes a row of its own.

    Which way a row goes depends on that row alone, and so do its bits if the kernel's do.
    """
    valid = slots >= 0
    whole = valid.all(1)
    if whole.all():
        return kernel(x, topk_weights, slots)
    token, choice = (valid & ~whole.unsqueeze(1)).nonzero(as_tuple=True)
    total = torch.zeros(x.shape, dtype=torch.float32)
    if token.numel():
        pairs = (token, choice)
        y = kernel(x[token], topk_weights[pairs].unsqueeze(-1), slots[pairs].unsqueeze(-1))
        total.index_add_(0, token, y.float())
    out = total.to(x.dtype)
    if whole.any():
        out[whole] = kernel(x[whole], topk_weights[whole], slots[whole])
    return out


def _one_token(
    x: torch.Tensor, experts: CpuExperts, topk_weights: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """`_grouped` for decoding one sequence, where sorting costs as much as computing."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for slot, weight in zip(slots[0].tolist(), topk_weights[0].tolist(), strict=True):
        if slot >= 0:
            out.add_(_expert(x, experts, slot), alpha=weight)
    return out.to(x.dtype)


def _grouped(
    x: torch.Tensor, experts: CpuExperts, topk_weights: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """One pair of matmuls per active expert, on tokens sorted by expert."""
    tokens, k = slots.shape
    flat = slots.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat + 1).tolist()
    skipped = counts[0]
    order = order[skipped:]
    rows = x[order // k]
    results, start = [], 0
    for slot, count in enumerate(counts[1:]):
        if count:
            results.append(_expert(rows[start : start + count], experts, slot))
            start += count
    if not results:
        return torch.zeros_like(x)
    y = x.new_zeros(flat.numel(), x.shape[-1]) if skipped else torch.empty_like(rows)
    y[order] = torch.cat(results)
    weights = topk_weights.float()
    if skipped:
        weights = weights.masked_fill(slots < 0, 0.0)
    y = y.view(tokens, k, -1).float() * weights.unsqueeze(-1)
    return y.sum(1).to(x.dtype)


def _expert(x: torch.Tensor, experts: CpuExperts, slot: int) -> torch.Tensor:
    """act(x @ w13) @ w2 of one expert, with its biases: [T, H] -> [T, H]."""
    if slot == len(experts.experts):  # of those that were dropped
        return torch.zeros_like(x)
    layer, expert = experts.layer, experts.experts[slot]
    if experts.mode == "int4":
        w13, w2 = experts.w13[slot], experts.w2[slot]
        if x.shape[0] * max(w13.halves, w2.halves) <= INT4_MAX_ROWS:
            h = layer.w13.add_bias(w13.matmul(x), expert)
            y = w2.matmul(activate(h, layer.activation).to(x.dtype))
            return y if layer.w2.bias is None else layer.w2.add_bias(y, expert).to(x.dtype)
    w13, w2 = _dense_weights(experts, slot, x.dtype)
    h = layer.w13.add_bias(F.linear(x, w13), expert)
    bias = None if layer.w2.bias is None else layer.w2.bias[expert].to(x.dtype)
    return F.linear(activate(h, layer.activation).to(x.dtype), w2, bias)


def _dense_weights(
    experts: CpuExperts, slot: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    if experts.mode == "dense":
        return experts.w13[slot], experts.w2[slot]
    expert = experts.experts[slot]
    return (
        dequantize_to(experts.layer.w13, expert, dtype),
        dequantize_to(experts.layer.w2, expert, dtype),
    )
