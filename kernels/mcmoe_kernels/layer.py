"""The routed experts of one layer on packed weights: data, definition, and a static-shape twin.

    out[t] = sum over slots j of  topk_weights[t, j] * (W2[e] @ act(W13[e] @ x[t] + b13[e]) + b2[e])
    with e = topk_ids[t, j], and biases where the model has them

`fused_experts_torch` is the definition that every other path is tested against. Its rounding
points: weights are dequantized exactly (float32), both products accumulate in float32, where their
biases are added too, the activation is computed in float32 and rounded to x.dtype (the input of the
second product), the slots are weighted and summed in float32, and the sum is rounded to x.dtype
once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mcmoe_kernels.activations import Activation, activate
from mcmoe_kernels.formats.format import find


@dataclass(frozen=True)
class ExpertMatrices:
    """One matrix [N, K] per local expert, each with a width of its own, and perhaps a bias.

    bits: numbers of formats, 1 to 4 for codes of as many bits, 0 for an expert that was dropped.
    packed: uint8 [N, K*width/8] each, views of one flat buffer (no columns where bits is 0).
    scale: int16 [N, K/G] each, scale and zero as `scales` stores them (no columns where bits is 0).
    model_bits: what other layers of the model have: layers that share them share compiled kernels.
    bias: None, or floating point [experts, N] in the order of rows, contiguous, dropped experts
        included, whose rows are not read.
    """

    bits: tuple[int, ...]
    packed: tuple[torch.Tensor, ...]
    scale: tuple[torch.Tensor, ...]
    model_bits: tuple[int, ...] = ()
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        assert len(self.bits) == len(self.packed) == len(self.scale), (
            f"{len(self.bits)} widths, {len(self.packed)} matrices, {len(self.scale)} scales"
        )
        assert self.bias is None or len(self.bias) == len(self.bits), (
            f"{len(self.bits)} widths, biases {list(self.bias.shape)}"
        )

    def __len__(self) -> int:
        return len(self.bits)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that there are."""
        return (*self.packed, *self.scale, *(() if self.bias is None else (self.bias,)))

    def dequantize(self, expert: int) -> torch.Tensor:
        """The float32 [N, K] matrix of a local expert that was not dropped: exact."""
        return find(self.bits[expert]).dequantize(self.packed[expert], self.scale[expert])

    def add_bias(self, y: torch.Tensor, expert: int) -> torch.Tensor:
        """y [..., N] plus the expert's bias, if there are any, in float32."""
        return y.float() if self.bias is None else y.float() + self.bias[expert].float()


@dataclass(frozen=True)
class ExpertLayer:
    """The local experts of one layer.

    w13: gate rows above up rows, N = 2 * intermediate_size, or up rows alone if the activation is
        not gated, N = intermediate_size; K = hidden_size.
    w2: N = hidden_size, K = intermediate_size. Its widths may differ from those of w13. Of ranks
        that share an expert's columns, one alone is given its bias.
    expert_map: None, or int32 [global experts] -> local index, -1 for experts held elsewhere.
    """

    hidden_size: int
    intermediate_size: int
    w13: ExpertMatrices
    w2: ExpertMatrices
    activation: Activation = Activation()
    expert_map: torch.Tensor | None = None

    def __post_init__(self) -> None:
        assert len(self.w13) == len(self.w2), f"{len(self.w13)} w13, {len(self.w2)} w2"

    @property
    def num_experts(self) -> int:
        """How many experts are held here."""
        return len(self.w13)

    @property
    def rows13(self) -> int:
        """Rows of w13."""
        return self.activation.rows * self.intermediate_size

    def present(self, expert: int) -> bool:
        """Whether a local expert has weights; a dropped one contributes zero."""
        return self.w13.bits[expert] > 0


def split_flat(
    flat: torch.Tensor, scale: torch.Tensor, bits: Sequence[int], rows: int, columns: int
) -> ExpertMatrices:
    """Views of one matrix [rows, columns] per expert into a flat buffer.

    flat: uint8, expert e at byte `packed_offsets(bits, rows, columns)[e]`.
    scale: int16 [experts that are present, rows, columns/G], in order.
    """
    offsets = packed_offsets(bits, rows, columns)
    packed, scales, slot = [], [], 0
    for b, start in zip(bits, offsets[:-1], strict=True):
        row_bytes = _row_bytes(b, columns)
        packed.append(flat[start : start + rows * row_bytes].view(rows, row_bytes))
        scales.append(scale[slot] if b else scale.new_empty(rows, 0))
        slot += b > 0
    return ExpertMatrices(tuple(bits), tuple(packed), tuple(scales))


def packed_offsets(bits: Sequence[int], rows: int, columns: int) -> tuple[int, ...]:
    """Byte offset of each expert in the flat buffer, and the buffer's size as the last entry.

    Every expert starts at a multiple of 256 bytes.
    """
    offsets = [0]
    for b in bits:
        offsets.append(offsets[-1] + -(-(rows * _row_bytes(b, columns)) // 256) * 256)
    return tuple(offsets)


def _row_bytes(bits: int, columns: int) -> int:
    return columns * find(bits).width // 8 if bits else 0


def local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Global ids [T, k] to local ids [T, k]; -1 stays -1 and stands for remote experts too."""
    if expert_map is None:
        return topk_ids
    mapped = expert_map[topk_ids.clamp(min=0).long()].to(topk_ids.dtype)
    return torch.where(topk_ids < 0, topk_ids, mapped)


def fused_experts_torch(
    x: torch.Tensor, layer: ExpertLayer, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """THE definition: x [T, H] -> [T, H] in x.dtype; x is not modified.

    topk_weights: float [T, k]. topk_ids: integer [T, k], global ids; -1 is skipped, an id may
    repeat within a row. Rows without any valid id are exact zeros.
    """
    ids = local_ids(topk_ids, layer.expert_map)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in ids[ids >= 0].unique().tolist():
        if not layer.present(expert):
            continue
        token, slot = (ids == expert).nonzero(as_tuple=True)
        h = layer.w13.add_bias(x[token].float() @ layer.w13.dequantize(expert).t(), expert)
        a = activate(h, layer.activation).to(x.dtype)
        y = layer.w2.add_bias(a.float() @ layer.w2.dequantize(expert).t(), expert)
        out.index_add_(0, token, y * topk_weights[token, slot].float().unsqueeze(-1))
    return out.to(x.dtype)


def fused_experts_static(
    x: torch.Tensor, layer: ExpertLayer, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """The same function with shapes that depend on T and k alone: no host synchronisation.

    Every expert computes every token and a mask keeps what was routed to it, so that a CUDA
    graph can capture it. Weights are rounded to x.dtype. Rows of x without a valid id may hold
    anything, NaN included.
    """
    ids = local_ids(topk_ids, layer.expert_map)
    x = torch.where((ids >= 0).any(-1, keepdim=True), x, torch.zeros_like(x))
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(layer.num_experts):
        if not layer.present(expert):
            continue
        weight = topk_weights.float().masked_fill(ids != expert, 0.0).sum(-1, keepdim=True)
        h = F.linear(x, layer.w13.dequantize(expert).to(x.dtype))
        a = activate(layer.w13.add_bias(h, expert), layer.activation).to(x.dtype)
        y = layer.w2.add_bias(F.linear(a, layer.w2.dequantize(expert).to(x.dtype)), expert)
        out += torch.where(weight != 0, y * weight, torch.zeros_like(out))
    return out.to(x.dtype)
