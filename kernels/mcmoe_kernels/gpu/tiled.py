"""A layer as the GPU kernels read it: records (`formats.records`), and tables that find them.

Rows of w13 alternate in blocks of 8: eight of gate, eight of up. They land in one thread of the
accumulator, which makes the gated activation a matter of registers. Without a gate they stay as
they are.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from mcmoe_kernels.activations import Activation
from mcmoe_kernels.formats.format import NUMBERS, Format, find
from mcmoe_kernels.formats.records import BLOCK_COLUMNS, TILE_ROWS, num_steps
from mcmoe_kernels.layer import ExpertLayer, ExpertMatrices

CODES_AT_ONCE = 1 << 24  # bounds the memory of repacking: about 16 bytes a code
ALIGNMENT = 256  # of a slot's first byte


@dataclass(frozen=True, repr=False)
class KernelFormat:
    """A format as kernels are compiled for it."""

    name: str
    number: int
    width: int
    zero_steps: int
    codes8: Any
    weights16: Any

    def __repr__(self) -> str:
        return f"{self.name}#{self.number}"

    @cached_property
    def cache_key(self) -> str:
        functions = (f.cache_key for f in (self.codes8, self.weights16) if f is not None)
        return "-".join([repr(self), str(self.width), str(self.zero_steps), *functions])


@dataclass(frozen=True)
class KernelFormats:
    """The formats that a kernel chooses from: a tl.constexpr, and no tuple, which Triton takes
    apart."""

    formats: tuple[KernelFormat, ...]

    @cached_property
    def cache_key(self) -> str:
        """What Triton's cache on disk goes by: as text, a function would be no more than a name."""
        return "+".join(f.cache_key for f in self.formats)

    @cached_property
    def _hash(self) -> int:
        return hash(self.cache_key)

    def __hash__(self) -> int:  # asked for at every launch
        return self._hash


@lru_cache
def kernel_formats(formats: tuple[Format, ...]) -> KernelFormats:
    """One and the same object for the same formats."""
    return KernelFormats(
        tuple(KernelFormat(f.name, f.number, f.width, f.zero_steps, *f.device()) for f in formats)
    )


@dataclass(frozen=True)
class TiledMatrices:
    """One matrix [rows, columns] per slot, a slot being a local expert that has weights.

    records: int8, flat. table: int32 [slots], 8 * (first byte of the slot / 256) + the number of
    its format. bits: those numbers, on the host. model_bits: as in `ExpertMatrices`. bias: None, or
    [slots, rows], rows as tiled.
    """

    rows: int
    columns: int
    group_size: int
    bits: tuple[int, ...]
    records: torch.Tensor
    table: torch.Tensor
    model_bits: tuple[int, ...] = ()
    bias: torch.Tensor | None = None

    @cached_property
    def formats(self) -> KernelFormats:
        """Those that kernels are compiled for."""
        return kernel_formats(tuple(find(b) for b in sorted({*self.bits, *self.model_bits}) if b))


@dataclass(frozen=True)
class TiledLayer:
    """The local experts of one layer, widest first.

    lookup: int32 [global experts, 4]: the expert's slot, its entries in the tables of w13 and w2,
    and a 0. One load finds what a program needs of an expert. -1, 0, 0, 0: remote or dropped.
    """

    hidden_size: int
    intermediate_size: int
    w13: TiledMatrices
    w2: TiledMatrices
    lookup: torch.Tensor
    activation: Activation = Activation()

    @property
    def slot_of(self) -> torch.Tensor:
        """int32 [global experts]; a view."""
        return self.lookup[:, 0]

    @property
    def num_slots(self) -> int:
        return len(self.w13.bits)

    @cached_property
    def has_codes8(self) -> bool:
        """Whether kernels for few tokens can run it (`format.Device`)."""
        return all(f.codes8 is not None for m in (self.w13, self.w2) for f in m.formats.formats)

    @property
    def sizes(self) -> tuple[int, int, int, tuple[int, int]]:
        """What cuts go by: rows of w13, hidden size, intermediate size, and group sizes of w13 and
        of w2."""
        group_sizes = (self.w13.group_size, self.w2.group_size)
        return self.w13.rows, self.hidden_size, self.intermediate_size, group_sizes

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that there are."""
        found = [t for m in (self.w13, self.w2) for t in (m.records, m.table, m.bias)]
        return (*(t for t in found if t is not None), self.lookup)


def tile_layer(layer: ExpertLayer) -> TiledLayer:
    """Repack a layer, on the device that holds it. Raises ValueError listing all that is wrong."""
    problems = why_not_tiled(layer)
    if problems:
        raise ValueError("; ".join(problems))
    present = [e for e in range(layer.num_experts) if layer.present(e)]
    order = sorted(
        present, key=lambda e: -(2 * find(layer.w13.bits[e]).width + find(layer.w2.bits[e]).width)
    )
    device = layer.w13.scale[0].device
    local = torch.full((layer.num_experts,), -1, dtype=torch.int32)
    for slot, expert in enumerate(order):
        local[expert] = slot
    local = local.to(device)
    slot_of = local
    if layer.expert_map is not None:
        held = layer.expert_map >= 0
        slot_of = torch.where(held, local[layer.expert_map.clamp(min=0).long()], -1)
    gated = layer.activation.gated
    row_order = gate_up_rows(layer.intermediate_size, device) if gated else None
    w13 = tile_matrices(layer.w13, order, row_order)
    w2 = tile_matrices(layer.w2, order)
    return TiledLayer(
        layer.hidden_size,
        layer.intermediate_size,
        w13,
        w2,
        look_up(slot_of, w13, w2),
        layer.activation,
    )


def look_up(slot_of: torch.Tensor, w13: TiledMatrices, w2: TiledMatrices) -> torch.Tensor:
    """`TiledLayer.lookup`. slot_of: int [global experts], -1 for none."""
    slot = slot_of.clamp(min=0).long()
    none = torch.zeros_like(slot)
    rows = torch.stack([slot, w13.table[slot], w2.table[slot], none], dim=1)
    held = (slot_of >= 0)[:, None]
    return torch.where(held, rows, rows.new_tensor([-1, 0, 0, 0])).to(torch.int32)


def why_not_tiled(layer: ExpertLayer) -> list[str]:
    """Reasons why the kernels cannot run a layer; none if they can."""
    problems = []
    if layer.hidden_size % TILE_ROWS:
        problems.append(f"hidden_size must be a multiple of {TILE_ROWS}, got {layer.hidden_size}")
    multiple = max(BLOCK_COLUMNS, TILE_ROWS // layer.activation.rows)
    if layer.intermediate_size % multiple:
        problems.append(
            f"intermediate_size must be a multiple of {multiple}, got {layer.intermediate_size}"
        )
    if not any(layer.present(e) for e in range(layer.num_experts)):
        problems.append("no expert is held here")
    return problems


def gate_up_rows(intermediate_size: int, device: torch.device | str) -> torch.Tensor:
    """int64 [2I]: the stored row of w13 at each tiled row; eight of gate, then eight of up."""
    rows = torch.arange(2 * intermediate_size, device=device).view(2, -1, 8)
    return rows.transpose(0, 1).flatten()


def matrix_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    return rows // TILE_ROWS * num_steps(columns) * find(bits).record_bytes(group_size)


def tile_matrices(
    matrices: ExpertMatrices, order: list[int], row_order: torch.Tensor | None = None
) -> TiledMatrices:
    """Repack the experts in `order`; stored rows are taken in `row_order`."""
    first = order[0]
    rows = matrices.packed[first].shape[0]
    columns = matrices.packed[first].shape[1] * 8 // find(matrices.bits[first]).width
    group_size = columns // matrices.scale[first].shape[1]
    device = matrices.packed[first].device
    bits = tuple(matrices.bits[e] for e in order)
    starts = [0]
    for b in bits:
        starts.append(starts[-1] + matrix_bytes(rows, columns, b, group_size))
    records = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    at_once = max(1, CODES_AT_ONCE // (TILE_ROWS * columns)) * TILE_ROWS
    for slot, expert in enumerate(order):
        target = records[starts[slot] : starts[slot + 1]]
        target = target.view(num_steps(columns), rows // TILE_ROWS, -1)
        for row in range(0, rows, at_once):
            part = slice(row, min(row + at_once, rows))
            chosen = part if row_order is None else row_order[part]
            tiles = slice(part.start // TILE_ROWS, part.stop // TILE_ROWS)
            packed, scale = matrices.packed[expert][chosen], matrices.scale[expert][chosen]
            record = find(bits[slot]).tile(packed, scale)
            target[:, tiles] = record.transpose(0, 1)
    bias = None if matrices.bias is None else matrices.bias[order]
    if bias is not None and row_order is not None:
        bias = bias[:, row_order]
    table = [start // ALIGNMENT * NUMBERS + b for start, b in zip(starts, bits, strict=False)]
    return TiledMatrices(
        rows,
        columns,
        group_size,
        bits,
        records.view(torch.int8),
        torch.tensor(table, dtype=torch.int32, device=device),
        matrices.model_bits,
        bias,
    )


def dequantize_slot(matrices: TiledMatrices, slot: int) -> torch.Tensor:
    """The float32 [rows, columns] matrix of a slot, rows as tiled: exact."""
    rows, columns, bits = matrices.rows, matrices.columns, matrices.bits[slot]
    group_size = matrices.group_size
    start = int(matrices.table[slot]) // NUMBERS * ALIGNMENT
    flat = matrices.records[start : start + matrix_bytes(rows, columns, bits, group_size)]
    records = flat.view(torch.uint8).view(num_steps(columns), rows // TILE_ROWS, -1)
    stored = find(bits).untile(records.transpose(0, 1), columns, group_size)
    return find(bits).dequantize(*stored)
