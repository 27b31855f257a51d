"""The layers and routes that kernels are timed on: shapes of real models, random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mcmoe_kernels.activations import Activation
from mcmoe_kernels.formats.format import find
from mcmoe_kernels.formats.packing import pack_scale
from mcmoe_kernels.formats.records import TILE_ROWS, meta_bytes
from mcmoe_kernels.gpu.tiled import (
    KernelFormats,
    TiledLayer,
    TiledMatrices,
    kernel_formats,
    look_up,
    matrix_bytes,
)

# experts, top_k, hidden size, intermediate size
SHAPES = {
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "deepseek-v2-lite": (64, 6, 2048, 1408),
    "gpt-oss-20b": (32, 4, 2880, 2880),
}
MIXED = (1, 2, 2, 3, 3, 3, 3, 3)  # 2.5 bits on average
MEAN_BITS, TOLERANCE = 2.5, 0.05


@dataclass(frozen=True)
class Traits:
    """What experts have beside a shape."""

    group_size: int = 128
    activation: Activation = Activation("silu")
    biases: bool = False


# Of the shapes whose experts peers do not compute.
OTHERS = {
    "gpt-oss-20b": Traits(64, Activation("silu", limit=7.0, alpha=1.702, up_offset=1.0), True),
}
PLAIN_SHAPES = [shape for shape in SHAPES if shape not in OTHERS]


def traits_of(shape: str) -> Traits:
    return OTHERS.get(shape, Traits())


class MixedMatrices(TiledMatrices):
    """Compiled for 1, 2 and 3 bits, whatever it holds: what mixing costs a uniform model."""

    @property
    def formats(self) -> KernelFormats:
        return kernel_formats((find(1), find(2), find(3)))


@dataclass(frozen=True)
class Route:
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


def random_layer(
    shape: str, bits: int | None = None, kind: type = TiledMatrices, seed: int = 0
) -> TiledLayer:
    """bits for every expert or, with None, 2.5 on average, spread over the experts at random."""
    experts, _, hidden, intermediate = SHAPES[shape]
    widths = tuple(sorted((bits or MIXED[e % len(MIXED)] for e in range(experts)), reverse=True))
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    traits = traits_of(shape)
    w13 = random_matrices(traits.activation.rows * intermediate, hidden, widths, kind, traits)
    w2 = random_matrices(hidden, intermediate, widths, kind, traits)
    lookup = look_up(order.cuda(), w13, w2)
    return TiledLayer(hidden, intermediate, w13, w2, lookup, traits.activation)


def random_matrices(
    rows: int, columns: int, widths: tuple[int, ...], kind: type, traits: Traits
) -> TiledMatrices:
    group_size = traits.group_size
    starts = [0]
    for b in widths:
        starts.append(starts[-1] + matrix_bytes(rows, columns, b, group_size))
    records = torch.randint(-128, 128, (starts[-1],), dtype=torch.int8, device="cuda")
    for i, b in enumerate(widths):
        record = records[starts[i] : starts[i + 1]].view(-1, find(b).record_bytes(group_size))
        # Scales of about 0.01, zeros of 1, of the groups of a step.
        words = 256 // group_size * TILE_ROWS
        scale = torch.rand(len(record), words, device="cuda").mul(0.01).add(0.001)
        zero = torch.full_like(scale, 0.5 if b == 1 else 1)
        meta = pack_scale(scale.bfloat16(), zero, b)
        record[:, : meta_bytes(group_size)] = meta.view(torch.int8)
    table = [start // 256 * 8 + b for start, b in zip(starts, widths, strict=False)]
    table = torch.tensor(table, dtype=torch.int32, device="cuda")
    bias = torch.randn(len(widths), rows, device="cuda").bfloat16() if traits.biases else None
    return kind(rows, columns, group_size, widths, records, table, bias=bias)


def active_slots(layer: TiledLayer, route: Route) -> list[int]:
    return layer.slot_of[route.topk_ids.flatten().long()].unique().tolist()


def touched_bits(layer: TiledLayer, route: Route) -> float:
    slots = active_slots(layer, route)
    return sum(layer.w13.bits[s] for s in slots) / len(slots)


def touched_bytes(layer: TiledLayer, route: Route) -> int:
    """Bytes of the active experts' weights, scales and zeros in the GPU layout."""
    return sum(
        matrix_bytes(m.rows, m.columns, m.bits[s], m.group_size)
        for m in (layer.w13, layer.w2)
        for s in active_slots(layer, route)
    )


def random_routes(shape: str, tokens: int, count: int, layer: TiledLayer) -> list[Route]:
    """Uniform routing from the first seed whose touched experts have 2.5 bits on average, if the
    layer is mixed."""
    experts, top_k, _, _ = SHAPES[shape]
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        routes = []
        for _ in range(count):
            scores = torch.rand(tokens, experts, generator=generator)
            weights, ids = scores.topk(top_k)
            weights = (weights / weights.sum(1, keepdim=True)).float()
            routes.append(Route(weights.cuda(), ids.int().cuda()))
        mean = sum(touched_bits(layer, r) for r in routes) / count
        if len(set(layer.w13.bits)) == 1 or abs(mean - MEAN_BITS) <= TOLERANCE:
            return routes
    raise AssertionError(f"no seed gives routes of {MEAN_BITS} bits for {shape} at {tokens} tokens")
