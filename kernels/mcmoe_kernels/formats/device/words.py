"""Words of planes and of meta: what device functions of formats are made of.

Every function that takes INLINE uses inline PTX on a GPU, where one instruction serves four bytes
or two 16-bit words at once; else plain shifts, which say the same to the interpreter and to other
compilers.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def shift_asm(target, source, right):
    if right == 0:
        return f"mov.b32 {target}, {source}; "
    operation = f"shr.u32 {target}, {source}, {right}; "
    return operation if right > 0 else f"shl.b32 {target}, {source}, {-right}; "


@triton.constexpr_function
def _field_bytes_asm(shift, mask):
    select = f"and.b32 $0, t, {mask * 0x01010101}; }}"
    return "{ .reg .b32 t; " + shift_asm("t", "$1", shift) + select


@triton.constexpr_function
def _merge_asm(low_shift, high_shift, rest):
    """The two low bits of each nibble from $1; from $2 the third (0xEA is (a & b) | c) or, with
    `rest`, the third and fourth, an operation less (0xE4 is (a & c) | (b & ~c)).

    Bytes are merged without `rest`: with it, programs of `gpu.block` spill registers.
    """
    low, high = 0x33333333, 0x44444444
    select = f"lop3.b32 $0, t, u, {low}, 0xE4; }}"
    mask = f"and.b32 t, t, {low}; lop3.b32 $0, u, {high}, t, 0xEA; }}"
    return (
        "{ .reg .b32 t, u; "
        + shift_asm("t", "$1", low_shift)
        + shift_asm("u", "$2", high_shift)
        + (select if rest else mask)
    )


@triton.jit
def field_of(word, SHIFT: tl.constexpr, MASK: tl.constexpr, INLINE: tl.constexpr):
    """(byte >> SHIFT) & MASK of the bytes of an element: int8, or int32 of four."""
    if word.dtype == tl.int32:
        return (word >> SHIFT) & MASK * 0x01010101
    elif INLINE:
        return tl.inline_asm_elementwise(
            _field_bytes_asm(SHIFT, MASK), "=r,r", [word], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return (word >> SHIFT) & MASK


@triton.jit
def field(plane, SHIFT: tl.constexpr, MASK: tl.constexpr, INLINE: tl.constexpr):
    """`field_of` every element of a plane."""
    parts = ()
    for i in tl.static_range(len(plane)):
        parts += (field_of(plane[i], SHIFT, MASK, INLINE),)
    return parts


@triton.jit
def merge_words(low, high, LOW_SHIFT: tl.constexpr, HIGH_SHIFT: tl.constexpr,
                INLINE: tl.constexpr):  # fmt: skip
    """Nibbles of 3-bit codes out of a tile's plane and the shared one, int8, int16 or int32. The
    fourth bits are anything, but of int8 zeros."""
    BITS: tl.constexpr = low.dtype.primitive_bitwidth
    MASK: tl.constexpr = 0x33 * (0x01010101 if BITS == 32 else (0x0101 if BITS == 16 else 1))
    REST: tl.constexpr = 0x44 if BITS == 8 else ~MASK
    if INLINE:
        return tl.inline_asm_elementwise(
            _merge_asm(LOW_SHIFT, HIGH_SHIFT, BITS > 8),
            "=r,r,r",
            [low, high],
            dtype=low.dtype,
            is_pure=True,
            pack=32 // BITS,
        )
    elif HIGH_SHIFT < 0:
        return ((low >> LOW_SHIFT) & MASK) | ((high << -HIGH_SHIFT) & REST)
    else:
        return ((low >> LOW_SHIFT) & MASK) | ((high >> HIGH_SHIFT) & REST)


@triton.jit
def merge(low, high, LOW_SHIFT: tl.constexpr, HIGH_SHIFT: tl.constexpr, INLINE: tl.constexpr):
    """`merge_words` of every element of two planes."""
    parts = ()
    for i in tl.static_range(len(low)):
        parts += (merge_words(low[i], high[i], LOW_SHIFT, HIGH_SHIFT, INLINE),)
    return parts


@triton.constexpr_function
def _zero_magic(zero_steps):
    """A float whose mantissa counts the zero's steps from bit 12 on: its bits, and its value."""
    return (0x44800000, 1024.0) if zero_steps == 2 else (0x45000000, 2048.0)


@triton.jit
def split_meta(word, TILE: tl.constexpr, ZERO_STEPS: tl.constexpr, DTYPE: tl.constexpr):
    """Scale and zero of a tile's group out of the int32 words of a record, as DTYPE."""
    MAGIC: tl.constexpr = _zero_magic(ZERO_STEPS)[0]
    VALUE: tl.constexpr = _zero_magic(ZERO_STEPS)[1]
    # The low half's fields in place of the high half's, and the other way round: one shift each.
    scale = word if TILE == 1 else word << 16
    zero = word >> 16 if TILE == 1 else word
    scale = (scale & 0x0FFF0000) + 0x33800000  # the exponent of 2^-24
    zero = ((zero & 0xF000) | MAGIC).to(tl.float32, bitcast=True) - VALUE
    return scale.to(tl.float32, bitcast=True).to(DTYPE), zero.to(DTYPE)


@triton.jit
def concatenate(a, b):
    """[N, K] and [N, K] to [N, 2K]: registers are renamed, nothing moves."""
    return tl.join(a, b).permute(0, 2, 1).reshape(a.shape[0], 2 * a.shape[1])
