"""The frame of what GPU kernels read: the file's codes, regrouped once at load.

A matrix [N, K] is cut into tiles of 64 rows by 128 columns. Two neighbouring tiles along K are a
step; K is padded to whole steps with codes and scales of zero. Memory holds, for each step, the
records of all row tiles one behind the other: programs that walk along K side by side read one
contiguous stretch. A plane is 64 rows of 32 bytes; a record of codes of `width` bits is

    meta               [128/G, 64] int32: word (g, row) holds the stored words (`scales`) of group g
                       of the second tile above that of the first
    width % 2 planes   that both tiles share: a bit of each of their codes
    width // 2 planes  of the first tile, then as many of the second: two bits of each code

What a format puts where in its planes is its own. All here keep one order: the 128 columns of a
tile are four blocks of 32, and byte j of a row's plane holds codes of the columns
16 * (j % 2) + j // 2 of several blocks, so that

    - four bytes in a 32-bit register are four codes of one block: an operand of an 8-bit MMA,
    - the same register, as two 16-bit words, holds neighbouring columns: an operand of a 16-bit
      MMA in the natural order of the columns.
"""

from collections.abc import Sequence

import torch

TILE_ROWS = 64
TILE_COLUMNS = 128
BLOCK_COLUMNS = 32
PLANE_BYTES = TILE_ROWS * BLOCK_COLUMNS


def num_steps(columns: int) -> int:
    return -(-columns // (2 * TILE_COLUMNS))


def meta_bytes(group_size: int) -> int:
    """Bytes at the head of a record: scales and zeros of both tiles."""
    return TILE_COLUMNS // group_size * TILE_ROWS * 4


def frame_bytes(width: int, group_size: int) -> int:
    """Bytes of a record: two tiles have width planes between them."""
    return meta_bytes(group_size) + PLANE_BYTES * (width % 2 + 2 * (width // 2))


def column_permutation(columns: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 [columns]: the column whose code each byte of a row holds, block by block."""
    j = torch.arange(columns, device=device)
    return j // 32 * 32 + 16 * (j % 2) + j % 32 // 2


def to_blocks(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [N, K] to uint8 [N/64, steps, 2 tiles, 4 blocks, 64 rows, 32], bytes in the order
    of a plane, zeros behind the last column."""
    rows, columns = codes.shape
    codes = torch.nn.functional.pad(codes, (0, num_steps(columns) * 2 * TILE_COLUMNS - columns))
    block = codes.view(rows // TILE_ROWS, TILE_ROWS, -1, 2, 4, 2, BLOCK_COLUMNS // 2)
    return block.permute(0, 2, 3, 4, 1, 6, 5).flatten(-2)


def from_blocks(blocks: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `to_blocks`."""
    codes = blocks.unflatten(-1, (BLOCK_COLUMNS // 2, 2)).permute(0, 4, 1, 2, 3, 6, 5)
    return codes.reshape(blocks.shape[0] * TILE_ROWS, -1)[:, :columns].contiguous()


def join(
    weight_scale: torch.Tensor, planes: Sequence[torch.Tensor], group_size: int
) -> torch.Tensor:
    """Records uint8 [N/64, steps, bytes] of the stored int16 [N, K/G] and of all planes in order,
    each uint8 [N/64, steps, 64, 32]."""
    per_tile = TILE_COLUMNS // group_size
    groups = planes[0].shape[1] * 2 * per_tile
    words = torch.nn.functional.pad(weight_scale, (0, groups - weight_scale.shape[1]))
    words = words.view(-1, TILE_ROWS, groups // (2 * per_tile), 2, per_tile)
    meta = words.permute(0, 2, 4, 1, 3).contiguous().view(torch.uint8).flatten(2)
    return torch.cat([meta, *(plane.flatten(2) for plane in planes)], dim=2)


def split(
    records: torch.Tensor, columns: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `join`: int16 [N, K/G], and planes uint8 [N/64, steps, planes, 64, 32]."""
    row_tiles, steps = records.shape[:2]
    meta, planes = records.tensor_split((meta_bytes(group_size),), dim=2)
    words = meta.contiguous().view(torch.int16)
    words = words.view(row_tiles, steps, TILE_COLUMNS // group_size, TILE_ROWS, 2)
    words = words.permute(0, 3, 1, 4, 2).reshape(row_tiles * TILE_ROWS, -1)
    planes = planes.unflatten(2, (-1, TILE_ROWS, BLOCK_COLUMNS))
    return words[:, : columns // group_size].contiguous(), planes
