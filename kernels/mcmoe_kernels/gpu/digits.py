"""Activations as fixed-point numbers of two 8-bit digits, so that 8-bit MMAs multiply them exactly.

A block of a row (32, 64 or 128 columns) is X * scale with integers |X| <= 32512 and a scale that
is a power of two; X = 256 * high + low with both digits in -128..127. The largest value of a
block keeps 14 bits or more, so that every value within 2^-6 of it keeps all the bits of a
bfloat16; smaller ones are off by 2^-15 of the largest at most. Codes of weights are integers
too, so their product with X is exact in int32 and a group's scales and zeros are applied once,
in float32: weights are never rounded.

Digits are stored in the order in which the bytes of a plane hold columns (`records`): position j
of a block of 32 is column 16 * (j % 2) + j // 2.
"""

import torch
import triton
import triton.language as tl

from mcmoe_kernels.formats.records import column_permutation
from mcmoe_kernels.gpu.threads import each_thread

MAX_FIXED = 32512  # 127 * 256: the high digit of X + 128 still fits
HEADROOM = 32768 / MAX_FIXED


def split_digits_torch(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] to digits int8 [T, 2, K] and their meta float32 [T, K/block, 2]: scale, sum of X.

    A block with an infinity or a NaN has scale NaN, which spoils the row's result as it should.
    """
    parts = x.float().unflatten(1, (-1, block))
    largest = (parts.abs().amax(-1) * HEADROOM).view(torch.int32)
    exponent = (largest >> 23).clamp(min=30)
    finite = parts.isfinite().all(-1)
    scale = ((exponent - 14) << 23).view(torch.float32)
    inverse = ((268 - exponent) << 23).view(torch.float32)
    fixed = (torch.where(finite[..., None], parts, 0.0) * inverse[..., None]).round().int()
    high = (fixed + 128) >> 8
    low = fixed - 256 * high
    digits = torch.stack([high, low], dim=1).flatten(2).to(torch.int8)
    digits = digits[:, :, column_permutation(x.shape[1], x.device)]
    meta = torch.stack([torch.where(finite, scale, torch.nan), fixed.sum(-1).float()], dim=-1)
    return digits.contiguous(), meta.contiguous()


@triton.jit
def scale_of(largest):
    """The scale of a block whose max |value| has the bits `largest`, and 1 / scale."""
    exponent = (largest.to(tl.float32, bitcast=True) * 1.0078740157480315).to(
        tl.int32, bitcast=True
    ) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 30), 254)
    scale = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    inverse = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest >= 0x7F800000, float("nan"), scale), inverse


@triton.jit
def to_fixed(values, largest):
    """values * 1/scale as int32, and scale; `largest` holds the bits of max |values|, spread to
    the shape of `values` or broadcastable to it."""
    scale, inverse = scale_of(largest)
    # Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    fixed = (values * inverse + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.where(largest >= 0x7F800000, 0, fixed), scale


@triton.jit
def absolute_bits(values):
    """The bits of |values| as int32: they order like the values, with NaN above infinity."""
    return values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def split_rows(x, digits, meta, row, first, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
               BLOCKS: tl.constexpr):  # fmt: skip
    """Digits of x[row, first * BLOCK : (first + BLOCKS) * BLOCK]."""
    block = first + tl.arange(0, BLOCKS)
    j = tl.arange(0, BLOCK)
    column = j // 32 * 32 + 16 * (j % 2) + j % 32 // 2
    inside = (block < COLUMNS // BLOCK)[:, None] & (j >= 0)[None, :]
    row = row.to(tl.int64)
    values = tl.load(
        x + row * COLUMNS + block[:, None] * BLOCK + column[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    fixed, scale = to_fixed(values, tl.max(absolute_bits(values), 1)[:, None])
    high = (fixed + 128) >> 8
    at = digits + row * (2 * COLUMNS) + block[:, None] * BLOCK + j[None, :]
    tl.store(at, high.to(tl.int8), mask=inside)
    tl.store(at + COLUMNS, (fixed - 256 * high).to(tl.int8), mask=inside)
    at = meta + (row * (COLUMNS // BLOCK) + block) * 2
    tl.store(at, tl.sum(scale, 1), mask=block < COLUMNS // BLOCK)  # one element a row
    tl.store(at + 1, tl.sum(fixed, 1).to(tl.float32), mask=block < COLUMNS // BLOCK)


@triton.jit
def values_of(word, DTYPE: tl.constexpr):
    """int32 to the two 16-bit floats in it, as float32."""
    if tl.bfloat16 == DTYPE:  # the high half of a float32
        first, second = word << 16, word & -65536
        return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)
    first = word.to(tl.int16).to(DTYPE, bitcast=True)
    second = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return first.to(tl.float32), second.to(tl.float32)


@triton.constexpr_function
def _four_bytes_asm(byte):
    of_two = f"0x{byte + 4}{byte}"
    return (
        f"{{ .reg .b32 t, u; prmt.b32 t, $1, $2, {of_two}; prmt.b32 u, $3, $4, {of_two}; "
        "prmt.b32 $0, t, u, 0x5410; }"
    )


@triton.jit
def four_bytes(b0, b1, b2, b3, BYTE: tl.constexpr, INLINE: tl.constexpr):
    """Byte BYTE of each of four int32, in one."""
    if INLINE:
        return tl.inline_asm_elementwise(
            _four_bytes_asm(BYTE), "=r,r,r,r,r", [b0, b1, b2, b3],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low = ((b0 >> 8 * BYTE) & 255) | (((b1 >> 8 * BYTE) & 255) << 8)
        return low | (((b2 >> 8 * BYTE) & 255) << 16) | (((b3 >> 8 * BYTE) & 255) << 24)


@triton.jit
def reduce_threads(values, LARGEST: tl.constexpr, TOGETHER: tl.constexpr, WARPS: tl.constexpr,
                   INLINE: tl.constexpr):  # fmt: skip
    """The largest, or the sum, of TOGETHER threads' int32 side by side, for each of them. The
    largest: of numbers from 0 on."""
    if INLINE and TOGETHER == 32:
        return tl.inline_asm_elementwise(
            "redux.sync.max.s32 $0, $1, -1;" if LARGEST else "redux.sync.add.s32 $0, $1, -1;",
            "=r,r", [values], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        rows = values.reshape(32 * WARPS // TOGETHER, TOGETHER)
        reduced = tl.max(rows, 1) if LARGEST else tl.sum(rows, 1)
        return each_thread(rows * 0 + reduced[:, None], WARPS, INLINE)


@triton.jit
def load_token(thread, x, columns, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """A row of X for `store_token`, zeros from `columns` on: four columns a thread at a time, those
    of bytes 4 * (thread % 8) to + 3 of a block of 32, two from its first half and two from its
    second."""
    words = x.to(tl.pointer_type(tl.int32))
    loaded = ()
    for begin in tl.static_range(0, COLUMNS, 128 * WARPS):
        first = begin + thread // 8 * 32
        at = words + first // 2 + thread % 8
        inside = first < columns
        loaded += ((tl.load(at, mask=inside, other=0), tl.load(at + 8, mask=inside, other=0)),)
    return loaded


@triton.jit
def store_token(thread, loaded, digits, meta, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
                DTYPE: tl.constexpr, WARPS: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    """What `split_rows` stores of one row, by all threads of a program (`threads`)."""
    TOGETHER: tl.constexpr = BLOCK // 4  # threads that share a scale
    out = digits.to(tl.pointer_type(tl.int32))
    for i in tl.static_range(len(loaded)):
        word0, word1 = loaded[i]
        v0, v2 = values_of(word0, DTYPE)
        v1, v3 = values_of(word1, DTYPE)
        low = tl.maximum(absolute_bits(v0), absolute_bits(v1))
        high = tl.maximum(absolute_bits(v2), absolute_bits(v3))
        largest = reduce_threads(tl.maximum(low, high), True, TOGETHER, WARPS, INLINE)
        scale, inverse = scale_of(largest)
        # As in `to_fixed`, plus 128: byte 1 is the high digit, byte 0 the low one plus 128. Where
        # the scale is NaN they are anything.
        f0 = (v0 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        f1 = (v1 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        f2 = (v2 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        f3 = (v3 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        first = i * (128 * WARPS) + thread // 8 * 32
        inside = first < COLUMNS
        at = out + (first // 4 + thread % 8)
        tl.store(at, four_bytes(f0, f1, f2, f3, 1, INLINE), mask=inside)
        rest = four_bytes(f0, f1, f2, f3, 0, INLINE) ^ -0x7F7F7F80  # 0x80808080
        tl.store(at + COLUMNS // 4, rest, mask=inside)
        total = ((f0 + f1) + (f2 + f3)) - 0x2D000200  # four times the 0x4B400080 in each
        total = reduce_threads(total, False, TOGETHER, WARPS, INLINE)
        leads = inside & (thread % TOGETHER == 0)
        tl.store(meta + first // BLOCK * 2, scale, mask=leads)
        tl.store(meta + first // BLOCK * 2 + 1, total.to(tl.float32), mask=leads)


@triton.jit
def store_columns(thread, values, largest, pairs, warp, row, first_row, digits, meta,
                  ROWS: tl.constexpr, AT: tl.constexpr, OF_WARP: tl.constexpr,
                  COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr,
                  INLINE: tl.constexpr):  # fmt: skip
    """Digits and meta of what the threads of a program hold, float32: the columns of a warp begin
    at first_row // ROWS + warp * OF_WARP, and values are those from AT + row on, every eighth, of
    the rows `pairs`, -1 for none. largest: of a thread's values, the bits. A block of columns is of
    one warp or more."""
    OF_VALUES: tl.constexpr = 8 * len(values)
    TOGETHER: tl.constexpr = BLOCK // OF_VALUES  # warps that share a scale
    SHAPE: tl.constexpr = (WARPS // TOGETHER, 8 * TOGETHER, 4)
    together = largest.reshape(SHAPE)
    together = together * 0 + tl.max(together, 1)[:, None, :]
    largest = each_thread(together, WARPS, INLINE)
    total = thread * 0
    scale = total.to(tl.float32)
    for i in tl.static_range(len(values)):
        fixed, scale = to_fixed(values[i], largest)
        total += fixed
        high = (fixed + 128) >> 8
        column = warp * OF_WARP + (AT + i * 8) + row
        position = column // 32 * 32 + 2 * (column % 16) + column % 32 // 16
        at = pairs.to(tl.int64) * (2 * COLUMNS) + first_row // ROWS + position
        tl.store(digits + at, high.to(tl.int8), mask=pairs >= 0)
        tl.store(digits + at + COLUMNS, (fixed - 256 * high).to(tl.int8), mask=pairs >= 0)
    together = total.reshape(SHAPE)
    together = together * 0 + tl.sum(together, 1)[:, None, :]
    total = each_thread(together, WARPS, INLINE)
    block = (warp * (OF_WARP // OF_VALUES) + AT // OF_VALUES) // TOGETHER
    block = first_row // ROWS // BLOCK + block
    at = meta + (pairs.to(tl.int64) * (COLUMNS // BLOCK) + block) * 2
    leads = (pairs >= 0) & (row == 0) & (warp % TOGETHER == 0)
    tl.store(at, scale, mask=leads)
    tl.store(at + 1, total.to(tl.float32), mask=leads)
