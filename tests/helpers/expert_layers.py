"""Random packed expert layers and a float64 reference, for the tests of kernels and plugin."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from mcmoe_kernels.activations import Activation, activate
from mcmoe_kernels.formats.packing import pack, pack_scale
from mcmoe_kernels.layer import ExpertLayer, ExpertMatrices, local_ids

SILU = Activation("silu")
GPT_OSS = Activation("silu", limit=7.0, alpha=1.702, up_offset=1.0)
DEEPSEEK_V4 = Activation("silu", limit=10.0)
STEP = Activation("silu", limit=7.0, limit_after=True)
RELU2 = Activation("relu2", gated=False)


def random_matrices(
    bits: Sequence[int], rows: int, columns: int, group_size: int, seed: int
) -> ExpertMatrices:
    """Random codes of every value, scales exact in bfloat16, every zero that is allowed."""
    generator = torch.Generator().manual_seed(seed)
    packed, scales = [], []
    for b in bits:
        groups = columns // group_size
        if b == 0:
            packed.append(torch.empty(rows, 0, dtype=torch.uint8))
            scales.append(torch.empty(rows, 0, dtype=torch.int16))
            continue
        codes = torch.randint(0, 1 << b, (rows, columns), generator=generator)
        scale = torch.rand(rows, groups, generator=generator).add(0.1).mul(0.1 / b)
        zero = torch.randint(0, 1 << b, (rows, groups), generator=generator).float()
        if b == 1:
            zero = torch.full_like(zero, 0.5)
        if b == 2:
            zero = torch.randint(0, 7, zero.shape, generator=generator) / 2
        packed.append(pack(codes, b))
        scales.append(pack_scale(scale.bfloat16(), zero, b))
    return ExpertMatrices(tuple(bits), tuple(packed), tuple(scales))


def random_layer(
    bits13: Sequence[int],
    bits2: Sequence[int] | None = None,
    hidden: int = 256,
    intermediate: int = 128,
    group_size: int = 128,
    seed: int = 0,
    activation: Activation = SILU,
    biases: bool = False,
) -> ExpertLayer:
    bits2 = bits13 if bits2 is None else bits2
    w13 = random_matrices(bits13, activation.rows * intermediate, hidden, group_size, 2 * seed)
    w2 = random_matrices(bits2, hidden, intermediate, group_size, 2 * seed + 1)
    if biases:
        w13, w2 = (replace(m, bias=random_bias(m, seed)) for m in (w13, w2))
    return ExpertLayer(hidden, intermediate, w13, w2, activation)


def random_bias(matrices: ExpertMatrices, seed: int) -> torch.Tensor:
    """bfloat16 [experts, N] that every 16-bit format holds, about as large as what it is added to;
    NaN for dropped experts."""
    rows = matrices.packed[0].shape[0]
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(len(matrices), rows, generator=generator).mul(4).bfloat16()
    bias[[e for e, b in enumerate(matrices.bits) if not b]] = float("nan")
    return bias


def to_device(layer: ExpertLayer, device: str) -> ExpertLayer:
    def move(matrices: ExpertMatrices) -> ExpertMatrices:
        packed, scale = (
            tuple(t.to(device) for t in ts) for ts in (matrices.packed, matrices.scale)
        )
        bias = None if matrices.bias is None else matrices.bias.to(device)
        return replace(matrices, packed=packed, scale=scale, bias=bias)

    expert_map = None if layer.expert_map is None else layer.expert_map.to(device)
    return replace(layer, w13=move(layer.w13), w2=move(layer.w2), expert_map=expert_map)


def random_routing(
    tokens: int, experts: int, top_k: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 [T, k] that sum to 1 and distinct ids int32 [T, k]."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, ids = scores.topk(top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), ids.int()


def random_input(
    tokens: int, hidden: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> torch.Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def experts_float64(
    x: torch.Tensor, layer: ExpertLayer, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """Expert by expert in float64, with exact weights."""
    ids = local_ids(topk_ids, layer.expert_map)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(layer.num_experts):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        if not token.numel() or not layer.present(expert):
            continue
        bias13, bias2 = (
            0.0 if m.bias is None else m.bias[expert].double() for m in (layer.w13, layer.w2)
        )
        h = x[token].double() @ layer.w13.dequantize(expert).double().t() + bias13
        y = activate(h, layer.activation) @ layer.w2.dequantize(expert).double().t() + bias2
        out.index_add_(0, token, y * topk_weights[token, slot].double().unsqueeze(-1))
    return out


def experts_rounded(
    x: torch.Tensor, layer: ExpertLayer, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """What plain torch gives on weights dequantized to x.dtype: the error that is granted."""
    ids = local_ids(topk_ids, layer.expert_map)
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in range(layer.num_experts):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        if not token.numel() or not layer.present(expert):
            continue
        w13, w2 = (m.dequantize(expert).to(x.dtype) for m in (layer.w13, layer.w2))
        bias13, bias2 = (
            None if m.bias is None else m.bias[expert].to(x.dtype) for m in (layer.w13, layer.w2)
        )
        h = torch.nn.functional.linear(x[token], w13, bias13)
        a = activate(h.float(), layer.activation).to(x.dtype)
        y = torch.nn.functional.linear(a, w2, bias2)
        out.index_add_(0, token, y.float() * topk_weights[token, slot].unsqueeze(-1))
    return out.to(x.dtype)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square error over root mean square of the reference."""
    return float((value.double() - reference).norm() / reference.norm())
