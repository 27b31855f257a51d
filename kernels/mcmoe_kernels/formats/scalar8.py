"""Scalar codes as int8, four to a register: operands of 8-bit MMAs."""

import triton
import triton.language as tl

from mcmoe_kernels.formats.records import shared_at, tile_at
from mcmoe_kernels.formats.words import merge_asm, merge_words, shift_asm


@triton.constexpr_function
def _field_bytes_asm(shift, mask):
    return (
        "{ .reg .b32 t; " + shift_asm("t", "$1", shift) + f"and.b32 $0, t, {mask * 0x01010101}; }}"
    )


@triton.jit
def field_bytes(plane, SHIFT: tl.constexpr, MASK: tl.constexpr, INLINE: tl.constexpr):
    """(plane >> SHIFT) & MASK of int8."""
    if INLINE:
        return tl.inline_asm_elementwise(
            _field_bytes_asm(SHIFT, MASK), "=r,r", [plane], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return (plane >> SHIFT) & MASK


@triton.jit
def merge_planes(low, high, LOW_SHIFT: tl.constexpr, HIGH_SHIFT: tl.constexpr,
                 INLINE: tl.constexpr):  # fmt: skip
    """Two nibbles of 3-bit codes in each byte: int8 planes in and out."""
    if INLINE:
        return tl.inline_asm_elementwise(
            merge_asm(LOW_SHIFT, HIGH_SHIFT, False),
            "=r,r,r",
            [low, high],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    elif HIGH_SHIFT < 0:
        return ((low >> LOW_SHIFT) & 0x33) | ((high << -HIGH_SHIFT) & 0x44)
    else:
        return ((low >> LOW_SHIFT) & 0x33) | ((high >> HIGH_SHIFT) & 0x44)


@triton.jit
def blocks_bytes(w0, w1, high, TILE: tl.constexpr, BITS: tl.constexpr, INLINE: tl.constexpr):
    """The four blocks of 32 codes, int8 [N, 32] each, of one tile of a step.

    w0: the tile's plane (1 bit: the step's). w1: 4 bits, the tile's second plane.
    high: 3 bits, the step's high plane.
    """
    if BITS == 1:
        b0 = field_bytes(w0, 4 * TILE, 1, INLINE)
        b1 = field_bytes(w0, 4 * TILE + 1, 1, INLINE)
        b2 = field_bytes(w0, 4 * TILE + 2, 1, INLINE)
        b3 = field_bytes(w0, 4 * TILE + 3, 1, INLINE)
    elif BITS == 2:
        b0 = field_bytes(w0, 0, 3, INLINE)
        b1 = field_bytes(w0, 2, 3, INLINE)
        b2 = field_bytes(w0, 4, 3, INLINE)
        b3 = field_bytes(w0, 6, 3, INLINE)
    else:
        if BITS == 3:
            w1 = merge_planes(w0, high, 2, 1 - 2 * TILE, INLINE)
            w0 = merge_planes(w0, high, 0, -2 * TILE, INLINE)
        b0 = field_bytes(w0, 0, 15, INLINE)
        b1 = field_bytes(w1, 0, 15, INLINE)
        b2 = field_bytes(w0, 4, 15, INLINE)
        b3 = field_bytes(w1, 4, 15, INLINE)
    return b0, b1, b2, b3


@triton.jit
def halves(word):
    """int64 to its two int32."""
    return word.to(tl.int32), (word >> 32).to(tl.int32)


@triton.jit
def load_words(at, START: tl.constexpr, inside):
    """16 rows of a plane, START bytes behind the record, as operands: of `row` and of `row` + 8,
    the lower and the higher columns."""
    w0, w2 = halves(tl.load(at + START // 8, mask=inside))
    w1, w3 = halves(tl.load(at + START // 8 + 32, mask=inside))
    return w0, w1, w2, w3


@triton.jit
def load_planes(record, offsets, meta_offsets, inside, GROUP_SIZE: tl.constexpr,
                BITS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """What a step holds of TILES * 16 rows: their planes, and their metas by group of a tile.
    Anything where not inside: it is to meet digits of zero, and every meta decodes to finite
    numbers."""
    at = record.to(tl.pointer_type(tl.int64)) + offsets
    meta_at = record.to(tl.pointer_type(tl.int32)) + meta_offsets
    loaded = ()
    for rows in tl.static_range(TILES):
        planes = ()
        if BITS % 2 == 1:
            planes += (load_words(at + rows * 64, shared_at(GROUP_SIZE), inside),)
        for tile in tl.static_range(2):
            for plane in tl.static_range(BITS // 2):
                planes += (
                    load_words(
                        at + rows * 64, tile_at(tile, BITS, GROUP_SIZE) + 2048 * plane, inside
                    ),
                )  # fmt: skip
        metas = ()
        for group in tl.static_range(128 // GROUP_SIZE):
            here = meta_at + group * 64 + rows * 16
            metas += ((tl.load(here, mask=inside), tl.load(here + 8, mask=inside)),)
        loaded += ((planes, metas),)
    return loaded


@triton.jit
def field(words, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """Field SHIFT of each byte."""
    w0, w1, w2, w3 = words
    return (
        (w0 >> SHIFT) & MASK * 0x01010101, (w1 >> SHIFT) & MASK * 0x01010101,
        (w2 >> SHIFT) & MASK * 0x01010101, (w3 >> SHIFT) & MASK * 0x01010101,
    )  # fmt: skip


@triton.jit
def merge(low, high, LOW_SHIFT: tl.constexpr, HIGH_SHIFT: tl.constexpr, INLINE: tl.constexpr):
    """Two nibbles of 3-bit codes in each byte, see `tiles`; their fourth bits are anything."""
    l0, l1, l2, l3 = low
    h0, h1, h2, h3 = high
    return (
        merge_words(l0, h0, LOW_SHIFT, HIGH_SHIFT, INLINE),
        merge_words(l1, h1, LOW_SHIFT, HIGH_SHIFT, INLINE),
        merge_words(l2, h2, LOW_SHIFT, HIGH_SHIFT, INLINE),
        merge_words(l3, h3, LOW_SHIFT, HIGH_SHIFT, INLINE),
    )


@triton.jit
def blocks_words(planes, TILE: tl.constexpr, BITS: tl.constexpr, INLINE: tl.constexpr):
    """The four blocks of 32 columns of one tile of a step, as operands of four MMAs."""
    if BITS == 1:
        p = planes[0]
        return (
            field(p, 4 * TILE, 1), field(p, 4 * TILE + 1, 1),
            field(p, 4 * TILE + 2, 1), field(p, 4 * TILE + 3, 1),
        )  # fmt: skip
    elif BITS == 2:
        p = planes[TILE]
        return field(p, 0, 3), field(p, 2, 3), field(p, 4, 3), field(p, 6, 3)
    else:
        if BITS == 3:
            even = merge(planes[1 + TILE], planes[0], 0, -2 * TILE, INLINE)
            odd = merge(planes[1 + TILE], planes[0], 2, 1 - 2 * TILE, INLINE)
        else:
            even, odd = planes[2 * TILE], planes[2 * TILE + 1]
        MASK: tl.constexpr = (1 << BITS) - 1
        return field(even, 0, MASK), field(odd, 0, MASK), field(even, 4, MASK), field(odd, 4, MASK)
