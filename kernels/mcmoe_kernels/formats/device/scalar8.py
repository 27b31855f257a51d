"""Codes of 1 to 4 bits as they are: operands of 8-bit MMAs."""

import triton
import triton.language as tl

from mcmoe_kernels.formats.device.words import field, merge


@triton.jit
def codes8(planes, TILE: tl.constexpr, WIDTH: tl.constexpr, INLINE: tl.constexpr):
    """The four blocks of 32 codes of one tile of a step (`format.Device`)."""
    if WIDTH == 1:
        p = planes[0]
        return (
            field(p, 4 * TILE, 1, INLINE), field(p, 4 * TILE + 1, 1, INLINE),
            field(p, 4 * TILE + 2, 1, INLINE), field(p, 4 * TILE + 3, 1, INLINE),
        )  # fmt: skip
    elif WIDTH == 2:
        p = planes[0]
        return (
            field(p, 0, 3, INLINE), field(p, 2, 3, INLINE),
            field(p, 4, 3, INLINE), field(p, 6, 3, INLINE),
        )  # fmt: skip
    else:
        if WIDTH == 3:
            even = merge(planes[1], planes[0], 0, -2 * TILE, INLINE)
            odd = merge(planes[1], planes[0], 2, 1 - 2 * TILE, INLINE)
        else:
            even, odd = planes[0], planes[1]
        MASK: tl.constexpr = (1 << WIDTH) - 1
        return (
            field(even, 0, MASK, INLINE), field(odd, 0, MASK, INLINE),
            field(even, 4, MASK, INLINE), field(odd, 4, MASK, INLINE),
        )  # fmt: skip
