"""The bit layout that the Triton kernels read: the file's codes, regrouped once at load.

A matrix [N, K] is cut into tiles of 64 rows by 128 columns. Two neighbouring tiles along K are a
step; K is padded to whole steps with codes and scales of zero. Memory holds, for each step, the
records of all row tiles one behind the other: programs that walk along K side by side read one
contiguous stretch. A plane is 64 rows of 32 bytes; a record is

    1 bit    meta, a plane for both tiles
    2 bits   meta, for each tile a plane
    3 bits   meta, a plane with the high bits of both tiles, for each tile a plane of low bits
    4 bits   meta, for each tile two planes

The 128 columns of a tile are four blocks of 32. Byte j of a row's plane holds codes of the columns
16 * (j % 2) + j // 2 of several blocks (`FIELDS`), so that

    - four bytes in a 32-bit register are four codes of one block: an operand of an 8-bit MMA,
    - the same register, as two 16-bit words, holds neighbouring columns: an operand of a 16-bit
      MMA in the natural order of the columns.

3 bits become 4-bit planes after one merge: (low & 0x33) | (high & 0x44), see `HIGH_BITS`.

Rows of w13 alternate in blocks of 8: eight of gate, eight of up. They land in one thread of the
accumulator, which makes the gated activation a matter of registers.

Meta is the scales and zeros of both tiles, [128/G, 64] int32: word (g, row) holds the stored words
(`packing`) of group g of the second tile above that of the first.
"""

from dataclasses import dataclass

import torch

from mcmoe_kernels.formats.packing import dequantize_codes, unpack
from mcmoe_kernels.formats.scalar import (
    BLOCK_COLUMNS,
    TILE_ROWS,
    matrix_bytes,
    num_steps,
    tile_codes,
    untile_codes,
)
from mcmoe_kernels.layer import ExpertLayer, ExpertMatrices

CODES_AT_ONCE = 1 << 24  # bounds the memory of repacking: about 16 bytes a code


@dataclass(frozen=True)
class TiledMatrices:
    """One matrix [rows, columns] per slot, a slot being a local expert that has weights.

    records: int8, flat. table: int32 [slots], 8 * (first byte of the slot / 256) + bits.
    bits: the widths, on the host. model_bits: as in `ExpertMatrices`.
    """

    rows: int
    columns: int
    group_size: int
    bits: tuple[int, ...]
    records: torch.Tensor
    table: torch.Tensor
    model_bits: tuple[int, ...] = ()

    @property
    def num_records(self) -> int:
        """Records of one slot."""
        return self.rows // TILE_ROWS * num_steps(self.columns)

    @property
    def widths(self) -> int:
        """The widths that kernels are compiled for as a bit mask: 1 << bits for each."""
        return sum(1 << b for b in {*self.bits, *self.model_bits} if b)


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
    activation: str = "silu"

    @property
    def slot_of(self) -> torch.Tensor:
        """int32 [global experts]; a view."""
        return self.lookup[:, 0]

    @property
    def num_slots(self) -> int:
        return len(self.w13.bits)


def tile_layer(layer: ExpertLayer) -> TiledLayer:
    """Repack a layer, on the device that holds it. Raises ValueError listing all that is wrong."""
    problems = why_not_tiled(layer)
    if problems:
        raise ValueError("; ".join(problems))
    present = [e for e in range(layer.num_experts) if layer.present(e)]
    order = sorted(present, key=lambda e: -(2 * layer.w13.bits[e] + layer.w2.bits[e]))
    device = layer.w13.scale[0].device
    local = torch.full((layer.num_experts,), -1, dtype=torch.int32)
    for slot, expert in enumerate(order):
        local[expert] = slot
    local = local.to(device)
    slot_of = local
    if layer.expert_map is not None:
        held = layer.expert_map >= 0
        slot_of = torch.where(held, local[layer.expert_map.clamp(min=0).long()], -1)
    w13 = tile_matrices(layer.w13, order, gate_up_rows(layer.intermediate_size, device))
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
    if layer.intermediate_size % BLOCK_COLUMNS:
        problems.append(
            f"intermediate_size must be a multiple of {BLOCK_COLUMNS}, got "
            f"{layer.intermediate_size}"
        )
    if not any(layer.present(e) for e in range(layer.num_experts)):
        problems.append("no expert is held here")
    return problems


def gate_up_rows(intermediate_size: int, device: torch.device | str) -> torch.Tensor:
    """int64 [2I]: the stored row of w13 at each tiled row; eight of gate, then eight of up."""
    rows = torch.arange(2 * intermediate_size, device=device).view(2, -1, 8)
    return rows.transpose(0, 1).flatten()


def tile_matrices(
    matrices: ExpertMatrices, order: list[int], row_order: torch.Tensor | None = None
) -> TiledMatrices:
    """Repack the experts in `order`; stored rows are taken in `row_order`."""
    first = order[0]
    rows = matrices.packed[first].shape[0]
    columns = matrices.packed[first].shape[1] * 8 // matrices.bits[first]
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
            codes = unpack(matrices.packed[expert][chosen], bits[slot])
            tiles = slice(part.start // TILE_ROWS, part.stop // TILE_ROWS)
            record = tile_codes(codes, matrices.scale[expert][chosen], bits[slot])
            target[:, tiles] = record.transpose(0, 1)
    table = [start // 256 * 8 + b for start, b in zip(starts, bits, strict=False)]
    return TiledMatrices(
        rows,
        columns,
        group_size,
        bits,
        records.view(torch.int8),
        torch.tensor(table, dtype=torch.int32, device=device),
        matrices.model_bits,
    )


def dequantize_slot(matrices: TiledMatrices, slot: int) -> torch.Tensor:
    """The float32 [rows, columns] matrix of a slot, rows as tiled: exact."""
    rows, columns, bits = matrices.rows, matrices.columns, matrices.bits[slot]
    group_size = matrices.group_size
    start = int(matrices.table[slot]) // 8 * 256
    flat = matrices.records[start : start + matrix_bytes(rows, columns, bits, group_size)]
    records = flat.view(torch.uint8).view(num_steps(columns), rows // TILE_ROWS, -1)
    codes, scale, zero = untile_codes(records.transpose(0, 1), bits, columns, group_size)
    return dequantize_codes(codes, scale, zero)
