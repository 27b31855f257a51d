"""What both kinds of operand are made with: shifts, merges, scales and zeros out of their words."""

import triton
import triton.language as tl


@triton.constexpr_function
def shift_asm(target, source, right):
    if right == 0:
        return f"mov.b32 {target}, {source}; "
    operation = f"shr.u32 {target}, {source}, {right}; "
    return operation if right > 0 else f"shl.b32 {target}, {source}, {-right}; "


@triton.constexpr_function
def merge_asm(low_shift, high_shift, rest):
    """The two low bits of each nibble from $1; from $2 the third (0xEA is (a & b) | c) or, with
    `rest`, the third and fourth, an operation less (0xE4 is (a & c) | (b & ~c)).

    Bytes are merged without `rest`: with it, programs of `experts_decode` spill registers.
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
def merge_words(low, high, LOW_SHIFT: tl.constexpr, HIGH_SHIFT: tl.constexpr,
                INLINE: tl.constexpr):  # fmt: skip
    """Nibbles of 3-bit codes, fourth bits anything: planes in and out, int16 or int32."""
    BITS: tl.constexpr = low.dtype.primitive_bitwidth
    MASK: tl.constexpr = 0x3333 if BITS == 16 else 0x33333333
    if INLINE:
        return tl.inline_asm_elementwise(
            merge_asm(LOW_SHIFT, HIGH_SHIFT, True),
            "=r,r,r",
            [low, high],
            dtype=low.dtype,
            is_pure=True,
            pack=32 // BITS,
        )
    elif HIGH_SHIFT < 0:
        return ((low >> LOW_SHIFT) & MASK) | ((high << -HIGH_SHIFT) & ~MASK)
    else:
        return ((low >> LOW_SHIFT) & MASK) | ((high >> HIGH_SHIFT) & ~MASK)


@triton.constexpr_function
def _zero_magic(bits):
    """A float whose mantissa counts the zero's steps from bit 12 on: its bits, and its value."""
    return (0x44800000, 1024.0) if bits <= 2 else (0x45000000, 2048.0)


@triton.jit
def split_meta(word, TILE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Scale and zero of a tile's group out of the int32 words of `tiles`, as DTYPE."""
    MAGIC: tl.constexpr = _zero_magic(BITS)[0]
    VALUE: tl.constexpr = _zero_magic(BITS)[1]
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
