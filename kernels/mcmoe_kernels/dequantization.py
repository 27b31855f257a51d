"""Codes out of the planes of `tiles`, as operands of 8-bit and of 16-bit MMAs.

Every function takes INLINE: inline PTX on a GPU, where one instruction serves four bytes or two
16-bit words at once; plain shifts, which say the same to the interpreter and to other compilers.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _shift(target, source, right):
    if right == 0:
        return f"mov.b32 {target}, {source}; "
    operation = f"shr.u32 {target}, {source}, {right}; "
    return operation if right > 0 else f"shl.b32 {target}, {source}, {-right}; "


@triton.constexpr_function
def _field_bytes_asm(shift, mask):
    return "{ .reg .b32 t; " + _shift("t", "$1", shift) + f"and.b32 $0, t, {mask * 0x01010101}; }}"


@triton.constexpr_function
def _merge_asm(low_shift, high_shift):
    return (
        "{ .reg .b32 t, u; "
        + _shift("t", "$1", low_shift)
        + _shift("u", "$2", high_shift)
        + f"and.b32 t, t, {0x33333333}; lop3.b32 $0, u, {0x44444444}, t, 0xEA; }}"
    )


@triton.constexpr_function
def _magic(is_bfloat16):
    """Or-ing an integer into the mantissa of 2^7 or 2^10 makes it a float of the same ulp."""
    return (0x4300, 128.0) if is_bfloat16 else (0x6400, 1024.0)


@triton.constexpr_function
def _inverse_power(position, is_bfloat16):
    """The bits of 2^-position, twice."""
    return ((127 - position) << 7 if is_bfloat16 else (15 - position) << 10) * 0x00010001


@triton.constexpr_function
def _weights_asm(shift, position, mask, is_bfloat16, scaled):
    """Of two words: fma(magic + q * 2^position, 2^-position, $2) and, if scaled, times $3; 0xEA is
    (a & b) | c."""
    suffix = "bf16x2" if is_bfloat16 else "f16x2"
    minus_zero = 0x80008000
    return (
        "{ .reg .b32 t, m, k, o; "
        + _shift("t", "$1", shift)
        + f"mov.b32 m, {_magic(is_bfloat16)[0] * 0x00010001}; "
        + f"lop3.b32 t, t, {(mask << position) * 0x00010001}, m, 0xEA; "
        + f"mov.b32 k, {_inverse_power(position, is_bfloat16)}; mov.b32 o, {minus_zero}; "
        + f"fma.rn.{suffix} t, t, k, $2; "
        + (f"fma.rn.{suffix} $0, t, $3, o; }}" if scaled else "mov.b32 $0, t; }")
    )


@triton.constexpr_function
def _place(bits, tile, block, half, is_bfloat16):
    """Where block `block` (of 4), columns 16 * half on, lies in a word: (shift, position).

    The mantissa has room for a few fields side by side, which saves shifts. A zero that is a
    multiple of 1/2 (1 and 2 bits) has no exact sum with 2^7 at position 0.
    """
    room = 7 if is_bfloat16 else 10
    nibble = 4 * (block // 2)
    offset = {1: 4 * tile + block, 2: 2 * block, 3: nibble, 4: nibble}[bits] + 8 * half
    if bits == 1:
        return (offset - 1, 1)
    least = 1 if bits == 2 else 0
    for shift in (0, 6, 8, 12, 14):
        if shift + least <= offset and offset - shift + bits <= room:
            return (shift, offset - shift)
    return (offset - least, least)


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
            _merge_asm(LOW_SHIFT, HIGH_SHIFT),
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
def merge_words(low, high, LOW_SHIFT: tl.constexpr, HIGH_SHIFT: tl.constexpr,
                INLINE: tl.constexpr):  # fmt: skip
    """Four nibbles of 3-bit codes in each word: int16 planes in and out."""
    if INLINE:
        return tl.inline_asm_elementwise(
            _merge_asm(LOW_SHIFT, HIGH_SHIFT),
            "=r,r,r",
            [low, high],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    elif HIGH_SHIFT < 0:
        return ((low >> LOW_SHIFT) & 0x3333) | ((high << -HIGH_SHIFT) & 0x4444)
    else:
        return ((low >> LOW_SHIFT) & 0x3333) | ((high >> HIGH_SHIFT) & 0x4444)


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
def split_meta(word, DTYPE: tl.constexpr):
    """Scale and zero out of the int32 words of `tiles`, as DTYPE."""
    if tl.bfloat16 == DTYPE:  # as they are: no instruction but the broadcast to a pair
        scale = (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return scale, word.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        scale = (word & -65536).to(tl.float32, bitcast=True).to(DTYPE)
        return scale, (word << 16).to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def weights_of(word, scale, zero, BITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
               HALF: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr,
               INLINE: tl.constexpr):  # fmt: skip
    """q - zero, exact, or (q - zero) * scale, rounded once: word int16 [N, 16] -> DTYPE [N, 16].

    scale, zero: [N], exact in DTYPE. SCALED: whether to multiply by scale.
    """
    BFLOAT16: tl.constexpr = tl.bfloat16 == DTYPE
    SHIFT: tl.constexpr = _place(BITS, TILE, BLOCK, HALF, BFLOAT16)[0]
    POSITION: tl.constexpr = _place(BITS, TILE, BLOCK, HALF, BFLOAT16)[1]
    MASK: tl.constexpr = (1 << BITS) - 1
    OFFSET: tl.constexpr = _magic(BFLOAT16)[1] / (1 << POSITION)
    if INLINE:
        addend = tl.broadcast_to((-OFFSET - zero).to(DTYPE)[:, None], word.shape)
        factor = tl.broadcast_to(scale.to(DTYPE)[:, None], word.shape)
        if BFLOAT16:
            return tl.inline_asm_elementwise(
                _weights_asm(SHIFT, POSITION, MASK, True, SCALED), "=r,r,r,r",
                [word, addend, factor], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                _weights_asm(SHIFT, POSITION, MASK, False, SCALED), "=r,r,r,r",
                [word, addend, factor], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        shifted = word >> SHIFT if SHIFT >= 0 else word << -SHIFT
        codes = ((shifted >> POSITION) & MASK).to(tl.float32) - zero.to(tl.float32)[:, None]
        return (codes * scale.to(tl.float32)[:, None] if SCALED else codes).to(DTYPE)


@triton.jit
def tile_words(w0, w1, high, metas, TILE: tl.constexpr, BITS: tl.constexpr, SCALED: tl.constexpr,
               DTYPE: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    """The weights [N, 128] of one tile of a step; planes as in `blocks_bytes`, but int16 [N, 16].

    metas: scale and zero [N] of each of the four blocks. SCALED: as in `weights_of`.
    """
    if BITS == 3:
        w1 = merge_words(w0, high, 2, 1 - 2 * TILE, INLINE)
        w0 = merge_words(w0, high, 0, -2 * TILE, INLINE)
    parts = ()
    for block in tl.static_range(4):
        word = w1 if BITS >= 3 and block % 2 == 1 else w0
        scale, zero = metas[block]
        first = weights_of(word, scale, zero, BITS, TILE, block, 0, SCALED, DTYPE, INLINE)
        second = weights_of(word, scale, zero, BITS, TILE, block, 1, SCALED, DTYPE, INLINE)
        parts += (concatenate(first, second),)
    return concatenate(concatenate(parts[0], parts[1]), concatenate(parts[2], parts[3]))


@triton.jit
def concatenate(a, b):
    """[N, K] and [N, K] to [N, 2K]: registers are renamed, nothing moves."""
    return tl.join(a, b).permute(0, 2, 1).reshape(a.shape[0], 2 * a.shape[1])
