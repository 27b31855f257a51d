"""Codes of 1 to 4 bits as 16-bit numbers, less zero and times scale: operands of 16-bit MMAs."""

import triton
import triton.language as tl

from mcmoe_kernels.formats.device.words import concatenate, merge_words, shift_asm, split_meta


@triton.constexpr_function
def _magic(is_bfloat16):
    """Or-ing an integer into the mantissa of 2^7 or 2^10 makes it a float of the same ulp."""
    return (0x4300, 128.0) if is_bfloat16 else (0x6400, 1024.0)


@triton.constexpr_function
def _power(exponent, is_bfloat16):
    """The bits of 2^exponent, twice."""
    return ((127 + exponent) << 7 if is_bfloat16 else (15 + exponent) << 10) * 0x00010001


@triton.constexpr_function
def _scale_lost(is_bfloat16, scaled):
    """An or gives a scale the exponent bits that its word leaves out if it is taken times 2^-7;
    the exponent that q - zero gains instead."""
    return 7 if is_bfloat16 and scaled else 0


@triton.constexpr_function
def _weights_asm(shift, position, mask, is_bfloat16, scaled):
    """Of two words: fma(magic + q * 2^position, 2^-position, $2) and, if scaled, times $3; 0xEA is
    (a & b) | c."""
    suffix = "bf16x2" if is_bfloat16 else "f16x2"
    power = _power(_scale_lost(is_bfloat16, scaled) - position, is_bfloat16)
    minus_zero = 0x80008000
    return (
        "{ .reg .b32 t, m, k, o; "
        + shift_asm("t", "$1", shift)
        + f"mov.b32 m, {_magic(is_bfloat16)[0] * 0x00010001}; "
        + f"lop3.b32 t, t, {(mask << position) * 0x00010001}, m, 0xEA; "
        + f"mov.b32 k, {power}; mov.b32 o, {minus_zero}; "
        + f"fma.rn.{suffix} t, t, k, $2; "
        + (f"fma.rn.{suffix} $0, t, $3, o; }}" if scaled else "mov.b32 $0, t; }")
    )


@triton.constexpr_function
def zero_steps(bits):
    return 2 if bits <= 2 else 1


@triton.constexpr_function
def _zero_base(bits, scaled):
    """A power of 2 whose ulp in bfloat16 is a step of the zero, and its bits, twice; `scaled`:
    both times 2^`_scale_lost`."""
    exponent = (6 if bits <= 2 else 7) + _scale_lost(True, scaled)
    return 2.0**exponent, _power(exponent, True)


@triton.constexpr_function
def _place(bits, tile, block, half, is_bfloat16, scaled):
    """Where block `block` (of 4), columns 16 * half on, lies in a word: (shift, position).

    The mantissa has room for a few fields side by side, which then share a shift; each position
    costs a group an addend, and a word that is shared costs registers, which are short if `scaled`.
    A zero that is a multiple of 1/2 (1 and 2 bits) has no exact sum with 2^7 at position 0.
    """
    nibble = 4 * (block // 2)
    offset = {1: 4 * tile + block, 2: 2 * block, 3: nibble, 4: nibble}[bits] + 8 * half
    if scaled:
        room = 7 if is_bfloat16 else 10
        two = {0: -2, 2: 0, 4: 0, 6: 4, 8: 4, 10: 6, 12: 8, 14: 12}
        wide = 0 if offset + bits <= room else offset
        shift = {1: offset - 1, 2: two.get(offset), 3: wide, 4: wide}[bits]
    else:
        together, lowest = {1: (4, 1), 2: (6, 1), 3: (8, 0), 4: (4 if is_bfloat16 else 8, 0)}[bits]
        shift = offset // together * together - lowest
    return (shift, offset - shift)


@triton.jit
def split_bfloat16(word, TILE: tl.constexpr, BITS: tl.constexpr, SCALED: tl.constexpr):
    """The scale times 2^-`_scale_lost`, and the zero plus `_zero_base`, both bfloat16.

    Both halves of the word are decoded at once: which one is meant, the instruction that uses it
    selects at no cost.
    """
    ZERO_BITS: tl.constexpr = _zero_base(BITS, SCALED)[1]
    scale = (word & 0x0FFF0FFF) | 0x30003000
    zero = ((word >> 12) & 0x000F000F) | ZERO_BITS
    if TILE == 1:
        scale, zero = scale >> 16, zero >> 16
    scale = scale.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return scale, zero.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def weights_of(word, meta, BITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
               HALF: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr,
               INLINE: tl.constexpr):  # fmt: skip
    """q - zero, exact, or (q - zero) * scale, rounded once: word int16 [N, 16] -> DTYPE [N, 16].

    meta: int32 [N], of the group that the block is in. SCALED: whether to multiply by scale.
    """
    BFLOAT16: tl.constexpr = tl.bfloat16 == DTYPE
    SHIFT: tl.constexpr = _place(BITS, TILE, BLOCK, HALF, BFLOAT16, SCALED)[0]
    POSITION: tl.constexpr = _place(BITS, TILE, BLOCK, HALF, BFLOAT16, SCALED)[1]
    MASK: tl.constexpr = (1 << BITS) - 1
    OFFSET: tl.constexpr = _magic(BFLOAT16)[1] / (1 << POSITION)
    if INLINE and BFLOAT16:
        GAIN: tl.constexpr = 1 << _scale_lost(True, SCALED)
        CONSTANT: tl.constexpr = _zero_base(BITS, SCALED)[0] - GAIN * OFFSET
        scale, zero = split_bfloat16(meta, TILE, BITS, SCALED)
        addend = tl.broadcast_to((CONSTANT - zero).to(DTYPE)[:, None], word.shape)
        factor = tl.broadcast_to(scale[:, None], word.shape)
        return tl.inline_asm_elementwise(
            _weights_asm(SHIFT, POSITION, MASK, True, SCALED), "=r,r,r,r",
            [word, addend, factor], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    elif INLINE:
        scale, zero = split_meta(meta, TILE, zero_steps(BITS), DTYPE)
        addend = tl.broadcast_to((-OFFSET - zero).to(DTYPE)[:, None], word.shape)
        factor = tl.broadcast_to(scale[:, None], word.shape)
        return tl.inline_asm_elementwise(
            _weights_asm(SHIFT, POSITION, MASK, False, SCALED), "=r,r,r,r",
            [word, addend, factor], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        scale, zero = split_meta(meta, TILE, zero_steps(BITS), tl.float32)
        shifted = word >> SHIFT if SHIFT >= 0 else word << -SHIFT
        codes = ((shifted >> POSITION) & MASK).to(tl.float32) - zero[:, None]
        return (codes * scale[:, None] if SCALED else codes).to(DTYPE)


@triton.jit
def weights16(planes, meta, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
              SCALED: tl.constexpr, DTYPE: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    """`weights_of` a block, [N, 32] (`format.Device`)."""
    ODD: tl.constexpr = BLOCK % 2
    if WIDTH == 3:
        word = merge_words(planes[1], planes[0], 2 * ODD, ODD - 2 * TILE, INLINE)
    else:
        word = planes[ODD if WIDTH == 4 else 0]
    first = weights_of(word, meta, WIDTH, TILE, BLOCK, 0, SCALED, DTYPE, INLINE)
    second = weights_of(word, meta, WIDTH, TILE, BLOCK, 1, SCALED, DTYPE, INLINE)
    return concatenate(first, second)
