"""A record of scalar codes: the planes of two tiles behind their scales and zeros."""

from collections.abc import Callable

import torch

from mcmoe_kernels.formats.packing import unpack_scale

TILE_ROWS = 64


TILE_COLUMNS = 128


BLOCK_COLUMNS = 32


PLANE_BYTES = TILE_ROWS * BLOCK_COLUMNS


# bits -> for each plane of a step of two tiles: ((tile, block, shift), ...). The high plane of 3
# bits is separate.
FIELDS: dict[int, tuple[tuple[tuple[int, int, int], ...], ...]] = {
    1: (tuple((b // 4, b % 4, b) for b in range(8)),),
    2: tuple(tuple((t, b, 2 * b) for b in range(4)) for t in range(2)),
    4: tuple(tuple((t, p + 2 * f, 4 * f) for f in range(2)) for t in range(2) for p in range(2)),
}


# 3 bits: bit of the high plane that holds the top bit of (tile, block). With the low plane shifted
# right by 2 * (block % 2) and the high one by block % 2 - 2 * tile, blocks b and b + 2 are nibbles.
HIGH_BITS = ((2, 3, 6, 7), (0, 1, 4, 5))


def column_permutation(columns: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 [columns]: the column whose code each byte of a row holds, block by block."""
    j = torch.arange(columns, device=device)
    return j // 32 * 32 + 16 * (j % 2) + j % 32 // 2


def num_steps(columns: int) -> int:
    return -(-columns // (2 * TILE_COLUMNS))


def meta_bytes(group_size: int) -> int:
    """Bytes at the head of a record: scales and zeros of both tiles."""
    return TILE_COLUMNS // group_size * TILE_ROWS * 4


def shared_bytes(bits: int) -> int:
    """Bytes behind them: the plane that belongs to both tiles."""
    return PLANE_BYTES * (bits % 2)


def tile_bytes(bits: int) -> int:
    """Bytes of a tile's own planes."""
    return PLANE_BYTES * (bits // 2)


def record_bytes(bits: int, group_size: int) -> int:
    return meta_bytes(group_size) + shared_bytes(bits) + 2 * tile_bytes(bits)


def matrix_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    return rows // TILE_ROWS * num_steps(columns) * record_bytes(bits, group_size)


def tile_codes(codes: torch.Tensor, weight_scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [N, K] and their stored scales int16 [N, K/G] to records
    uint8 [N/64, steps, bytes]."""
    rows, columns = codes.shape
    group_size = columns // weight_scale.shape[1]
    padded = num_steps(columns) * 2 * TILE_COLUMNS
    codes = torch.nn.functional.pad(codes, (0, padded - columns))
    # [N/64, steps, 2 tiles, 4 blocks, 64 rows, 32 bytes]; byte j is column 16 * (j % 2) + j // 2
    block = codes.view(rows // TILE_ROWS, TILE_ROWS, -1, 2, 4, 2, BLOCK_COLUMNS // 2)
    block = block.permute(0, 2, 3, 4, 1, 6, 5).flatten(-2)

    def plane(fields: tuple[tuple[int, int, int], ...], value: Callable) -> torch.Tensor:
        parts = [value(block[:, :, tile, b]) << shift for tile, b, shift in fields]
        return torch.stack(parts).sum(0, dtype=torch.uint8)

    shared, planes = [], []
    if bits == 3:
        high = tuple((t, b, HIGH_BITS[t][b]) for t in range(2) for b in range(4))
        shared = [plane(high, lambda q: q >> 2)]
        planes = [plane(fields, lambda q: q & 3) for fields in FIELDS[2]]
    elif bits == 1:
        shared = [plane(fields, lambda q: q) for fields in FIELDS[1]]
    else:
        planes = [plane(fields, lambda q: q) for fields in FIELDS[bits]]
    meta = tile_scale(weight_scale, padded // group_size, TILE_COLUMNS // group_size)
    meta = meta.contiguous().view(torch.uint8).flatten(2)
    return torch.cat([meta, *(p.flatten(2) for p in shared + planes)], dim=2)


def untile_codes(
    records: torch.Tensor, bits: int, columns: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `tile_codes`: codes uint8 [N, K], scale and zero float32 [N, K/G]."""
    row_tiles, steps = records.shape[:2]
    parts = (meta_bytes(group_size), shared_bytes(bits), 2 * tile_bytes(bits))
    meta, shared, planes = records.split(parts, dim=2)
    groups = TILE_COLUMNS // group_size
    words = meta.contiguous().view(torch.int16).view(row_tiles, steps, groups, TILE_ROWS, 2)
    words = words.permute(0, 3, 1, 4, 2).reshape(row_tiles * TILE_ROWS, -1)
    scale, zero = unpack_scale(words[:, : columns // group_size], bits)
    planes, shared = (p.unflatten(2, (-1, TILE_ROWS, BLOCK_COLUMNS)) for p in (planes, shared))
    block = records.new_empty(row_tiles, steps, 2, 4, TILE_ROWS, BLOCK_COLUMNS)
    low = FIELDS[2 if bits == 3 else bits]
    source, mask = (shared if bits == 1 else planes), (1 << (2 if bits == 3 else bits)) - 1
    for i, fields in enumerate(low):
        for tile, b, shift in fields:
            block[:, :, tile, b] = (source[:, :, i] >> shift) & mask
    if bits == 3:
        for tile in range(2):
            for b in range(4):
                block[:, :, tile, b] |= ((shared[:, :, 0] >> HIGH_BITS[tile][b]) & 1) << 2
    block = block.unflatten(-1, (BLOCK_COLUMNS // 2, 2)).permute(0, 4, 1, 2, 3, 6, 5)
    codes = block.reshape(row_tiles * TILE_ROWS, -1)[:, :columns].contiguous()
    return codes, scale, zero


def tile_scale(weight_scale: torch.Tensor, groups: int, groups_per_tile: int) -> torch.Tensor:
    """The stored int16 [N, K/G] to int16 [N/64, steps, groups per tile, 64, 2 tiles], zeros behind
    the last group."""
    words = torch.nn.functional.pad(weight_scale, (0, groups - weight_scale.shape[1]))
    words = words.view(-1, TILE_ROWS, groups // (2 * groups_per_tile), 2, groups_per_tile)
    return words.permute(0, 2, 4, 1, 3)
