"""Three formats that nobody ships, in one file: all that adding them takes.

five       5 bits, a bit stream: codes are their values, and 5 odd planes of a record
mirrored   2 bits, each byte's codes from the highest bits down, in the file and in a record
book       2 bits, codes that stand for values of a table: 16-bit products alone
"""

from functools import partial

import torch
import triton
import triton.language as tl

from mcmoe_kernels.formats import records
from mcmoe_kernels.formats.device.words import concatenate, field, split_meta
from mcmoe_kernels.formats.format import Device, Format, register

BOOK = (-1.5, -0.25, 0.5, 2.0)


def pack_five(codes):
    bits = codes.unsqueeze(-1) >> torch.arange(5, device=codes.device) & 1
    bits = bits.flatten(-2).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def unpack_five(packed):
    bits = (packed.unsqueeze(-1) >> torch.arange(8, device=packed.device)) & 1
    bits = bits.flatten(-2).unflatten(-1, (-1, 5))
    return (bits << torch.arange(5, device=packed.device)).sum(-1).to(torch.uint8)


def tile_five(packed, weight_scale):
    codes = unpack_five(packed)
    blocks = records.to_blocks(codes)
    high = [(blocks[:, :, t, b] >> 4) << (4 * t + b) for t in range(2) for b in range(4)]
    low = blocks & 15
    planes = [low[:, :, t, b] | low[:, :, t, b + 1] << 4 for t in range(2) for b in (0, 2)]
    return records.join(weight_scale, [sum(high), *planes], codes.shape[1] // weight_scale.shape[1])


def untile_five(record, columns, group_size):
    weight_scale, planes = records.split(record, columns, group_size)
    parts = []
    for t, b in ((t, b) for t in range(2) for b in range(4)):
        low = planes[:, :, 1 + 2 * t + b // 2] >> 4 * (b % 2) & 15
        parts.append(low | (planes[:, :, 0] >> (4 * t + b) & 1) << 4)
    blocks = torch.stack(parts, 2).unflatten(2, (2, 4))
    return pack_five(records.from_blocks(blocks, columns)), weight_scale


def pack_mirrored(codes):
    shifts = torch.tensor([6, 4, 2, 0], device=codes.device)
    return (codes.unflatten(-1, (-1, 4)) << shifts).sum(-1).to(torch.uint8)


def unpack_mirrored(packed):
    shifts = torch.tensor([6, 4, 2, 0], device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 3).flatten(-2).to(torch.uint8)


def tile_mirrored(packed, weight_scale):
    codes = unpack_mirrored(packed)
    blocks = records.to_blocks(codes)
    planes = [sum(blocks[:, :, t, b] << (6 - 2 * b) for b in range(4)) for t in range(2)]
    return records.join(weight_scale, planes, codes.shape[1] // weight_scale.shape[1])


def untile_mirrored(record, columns, group_size):
    weight_scale, planes = records.split(record, columns, group_size)
    blocks = torch.stack([planes >> (6 - 2 * b) & 3 for b in range(4)], 3)
    return pack_mirrored(records.from_blocks(blocks, columns)), weight_scale


@triton.jit
def join_bits(low, high):
    parts = ()
    for i in tl.static_range(len(low)):
        parts += (low[i] | (high[i] << 4),)
    return parts


@triton.jit
def codes8_five(planes, TILE: tl.constexpr, WIDTH: tl.constexpr, INLINE: tl.constexpr):
    blocks = ()
    for b in tl.static_range(4):
        low = field(planes[1 + b // 2], 4 * (b % 2), 15, INLINE)
        blocks += (join_bits(low, field(planes[0], 4 * TILE + b, 1, INLINE)),)
    return blocks


@triton.jit
def codes8_mirrored(planes, TILE: tl.constexpr, WIDTH: tl.constexpr, INLINE: tl.constexpr):
    blocks = ()
    for b in tl.static_range(4):
        blocks += (field(planes[0], 6 - 2 * b, 3, INLINE),)
    return blocks


@triton.jit
def columns_of(word, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """int16 [N, 16] to the fields of its low bytes, then of its high ones: [N, 32]."""
    return concatenate((word >> SHIFT) & MASK, (word >> (SHIFT + 8)) & MASK)


@triton.jit
def finish(value, meta, TILE: tl.constexpr, STEPS: tl.constexpr, SCALED: tl.constexpr,
           DTYPE: tl.constexpr):  # fmt: skip
    scale, zero = split_meta(meta, TILE, STEPS, tl.float32)
    value = value.to(tl.float32) - zero[:, None]
    return (value * scale[:, None] if SCALED else value).to(DTYPE)


@triton.jit
def weights16_five(planes, meta, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
                   SCALED: tl.constexpr, DTYPE: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    low = columns_of(planes[1 + BLOCK // 2], 4 * (BLOCK % 2), 15)
    high = columns_of(planes[0], 4 * TILE + BLOCK, 1)
    return finish(low + high * 16, meta, TILE, 1, SCALED, DTYPE)


@triton.jit
def weights16_mirrored(planes, meta, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
                       SCALED: tl.constexpr, DTYPE: tl.constexpr,
                       INLINE: tl.constexpr):  # fmt: skip
    return finish(columns_of(planes[0], 6 - 2 * BLOCK, 3), meta, TILE, 2, SCALED, DTYPE)


@triton.jit
def weights16_book(planes, meta, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
                   SCALED: tl.constexpr, DTYPE: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    code = columns_of(planes[0], 6 - 2 * BLOCK, 3)
    low, high = tl.where(code == 0, -1.5, -0.25), tl.where(code == 2, 0.5, 2.0)
    return finish(tl.where(code < 2, low, high), meta, TILE, 1, SCALED, DTYPE)


mirrored = partial(
    Format, pack=pack_mirrored, unpack=unpack_mirrored, tile=tile_mirrored, untile=untile_mirrored
)
register(
    Format(
        "five", 5, 5, 1, pack_five, unpack_five, tile_five, untile_five,
        lambda: Device(codes8_five, weights16_five),
    ),
    mirrored("mirrored", 6, 2, 2, device=lambda: Device(codes8_mirrored, weights16_mirrored)),
    mirrored("book", 7, 2, 1, device=lambda: Device(None, weights16_book), values=BOOK),
)  # fmt: skip
