"""The experts for few tokens, every warp on its own: codes go from memory to registers to MMAs.

The launches, products and results of `block` for blocks of up to four pairs, but without
shared memory and barriers: a thread finds what it multiplies in eight bytes side by side in a plane
of `records`, so that it loads its own operands, some steps ahead.

Tensors have an element a thread (`threads`). A thread is one of (warps, 8 rows, 4 quads), as the
8-bit MMA of 16 rows, 32 columns and 8 columns of X wants it:

    weights   bytes 8 * quad to 8 * quad + 7 of a plane, of rows `row` and `row` + 8
    digits    the same bytes of pair row // 2, digit row % 2
    results   rows `row` and `row` + 8, both digits of pair `quad`
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.experimental import gluon

from mcmoe_kernels.formats.device.records import (
    first_record,
    record_bytes_of,
    shared_at,
    tile_at,
)
from mcmoe_kernels.formats.device.words import split_meta
from mcmoe_kernels.gpu.block import launch_decode
from mcmoe_kernels.gpu.choice import WarpConfig
from mcmoe_kernels.gpu.common import (
    activate_pair,
    by_format,
    hidden_block,
    is_ragged,
    load_if,
    steps_of,
)
from mcmoe_kernels.gpu.digits import absolute_bits, load_token, store_columns, store_token
from mcmoe_kernels.gpu.routing import load_entry, wait_for_previous
from mcmoe_kernels.gpu.threads import each_thread, threads
from mcmoe_kernels.gpu.tiled import TiledLayer

MULTIPLY_ASM = tl.constexpr(
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


@dataclass(frozen=True)
class Cut:
    """What a product is compiled for, but its formats. rows, columns: of the matrix; digit_columns:
    of a row of digits, for which programs that make their own take whole steps. x_block: columns
    of X that share a scale. block_n: rows of a program, tiles * 16 of a warp; parts warps share
    their columns, and splits programs. ahead: steps that are loaded ahead. ragged: `is_ragged`.
    waits: the product begins before the previous grid ends. dtype: of the X that digits are made
    of, or None.
    """

    rows: int
    columns: int
    digit_columns: int
    group_size: int
    x_block: int
    block_n: int
    tiles: int
    parts: int
    warps: int
    splits: int
    ahead: int
    ragged: bool
    waits: bool
    dtype: tl.dtype | None
    inline: bool

    @property
    def per_split(self) -> int:
        """Steps of a program."""
        return steps_of(self.columns, self.splits)

    @property
    def per_part(self) -> int:
        """Steps of a warp."""
        return steps_of(256 * self.per_split, self.parts)


def cuts(
    config: WarpConfig,
    rows13: int,
    hidden_size: int,
    intermediate_size: int,
    group_sizes: tuple[int, int],
    h_block: int,
    pdl: bool,
    inline: bool = True,
) -> tuple[Cut, Cut]:
    """What the products of a configuration are compiled for: w13, w2. group_sizes: theirs."""

    c, g13, g2 = config, *group_sizes
    cut13 = Cut(
        rows13, hidden_size, hidden_size, g13, g13, c.block_n13, c.tiles13,
        c.parts13, c.warps13, 1, c.stages13, False, False, None, inline,
    )  # fmt: skip
    cut2 = Cut(
        hidden_size, intermediate_size, intermediate_size, g2, h_block, c.block_n2, c.tiles2,
        c.parts2, c.warps2, c.splits, c.stages2, False, pdl, None, inline,
    )  # fmt: skip
    return _settle(cut13), _settle(cut2)


def _settle(cut: Cut) -> Cut:
    """No more steps ahead than a warp has, and whether these come out even."""
    ahead = min(cut.ahead, cut.per_part)
    return replace(cut, ahead=ahead, ragged=is_ragged(cut.columns, cut.splits, cut.parts, ahead))


@triton.jit
def bytes_of(word, WARPS: tl.constexpr):
    """int32 [threads] to its bytes, int32 [warps, 8, 16]."""
    word = word.reshape(WARPS, 8, 4)
    even = tl.join((word << 24) >> 24, (word << 8) >> 24)
    odd = tl.join((word << 16) >> 24, word >> 24)
    return tl.join(even, odd).reshape(WARPS, 8, 16)


@triton.jit
def bytes_of_two(low, high, WARPS: tl.constexpr):
    """The bytes of two words a thread, int32 [warps, 8, 32]: 16 of `low`, then 16 of `high`."""
    pair = tl.join(bytes_of(low, WARPS), bytes_of(high, WARPS))
    return pair.permute(0, 1, 3, 2).reshape(WARPS, 8, 32)


@triton.jit
def multiply_bytes(acc, a0, a1, a2, a3, b0, b1, WARPS: tl.constexpr, INLINE: tl.constexpr):
    """acc + A @ B of each warp: A [16, 32], B [32, 8], acc four int32 a thread."""
    c0, c1, c2, c3 = acc
    if INLINE:
        return tl.inline_asm_elementwise(
            MULTIPLY_ASM,
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        a = tl.join(bytes_of_two(a0, a2, WARPS), bytes_of_two(a1, a3, WARPS)).permute(0, 3, 1, 2)
        b = bytes_of_two(b0, b1, WARPS).permute(0, 2, 1)
        a, b = a.reshape(WARPS, 16, 32).to(tl.int8), b.to(tl.int8)
        product = tl.dot(a, b, out_dtype=tl.int32).reshape(WARPS, 2, 8, 4, 2).permute(0, 2, 3, 1, 4)
        even, odd = product.split()
        d0, d2 = even.split()
        d1, d3 = odd.split()
        SHAPE: tl.constexpr = (32 * WARPS,)
        return (
            c0 + d0.reshape(SHAPE), c1 + d1.reshape(SHAPE),
            c2 + d2.reshape(SHAPE), c3 + d3.reshape(SHAPE),
        )  # fmt: skip


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
def load_planes(record, offsets, meta_offsets, inside, WIDTH: tl.constexpr,
                CUT: tl.constexpr):  # fmt: skip
    """What a step holds of the warp's rows, for each 16 of them: the planes of each tile, and metas
    by group of a tile. Anything where not inside: it is to meet digits of zero, and every meta
    decodes to finite numbers."""
    GROUP_SIZE: tl.constexpr = CUT.group_size
    TILES: tl.constexpr = CUT.tiles
    at = record.to(tl.pointer_type(tl.int64)) + offsets
    meta_at = record.to(tl.pointer_type(tl.int32)) + meta_offsets
    loaded = ()
    for rows in tl.static_range(TILES):
        shared = ()
        if WIDTH % 2 == 1:
            shared += (load_words(at + rows * 64, shared_at(GROUP_SIZE), inside),)
        planes = ()
        for tile in tl.static_range(2):
            own = shared
            for plane in tl.static_range(WIDTH // 2):
                own += (
                    load_words(
                        at + rows * 64, tile_at(tile, WIDTH, GROUP_SIZE) + 2048 * plane, inside
                    ),
                )  # fmt: skip
            planes += (own,)
        metas = ()
        for group in tl.static_range(128 // GROUP_SIZE):
            here = meta_at + group * 64 + rows * 16
            metas += ((tl.load(here, mask=inside), tl.load(here + 8, mask=inside)),)
        loaded += ((planes, metas),)
    return loaded


@triton.jit
def multiply_part(thread, acc, loaded, x, x_meta, columns_left, AT: tl.constexpr,
                  CUT: tl.constexpr, FORMAT: tl.constexpr):  # fmt: skip
    """acc += X_BLOCK columns of a step's weights, from AT on, scaled, times those of X."""
    X_BLOCK: tl.constexpr = CUT.x_block
    TILES: tl.constexpr = CUT.tiles
    TILE: tl.constexpr = AT // 128
    inside = thread * 0 + AT < columns_left
    digits = ()
    for block in tl.static_range(X_BLOCK // 32):
        digits += (halves(load_if(x + (AT + 32 * block) // 8, inside, CUT.ragged)),)
    scale, total = halves(load_if(x_meta + AT // X_BLOCK, inside, CUT.ragged))
    x_scale, x_sum = scale.to(tl.float32, bitcast=True), total.to(tl.float32, bitcast=True)
    nothing = thread * 0
    sums = ()
    for rows in tl.static_range(TILES):
        planes, metas = loaded[rows]
        blocks = FORMAT.codes8(planes[TILE], TILE, FORMAT.width, CUT.inline)
        product = (nothing, nothing, nothing, nothing)
        for block in tl.static_range(X_BLOCK // 32):
            a0, a1, a2, a3 = blocks[AT % 128 // 32 + block]
            b0, b1 = digits[block]
            product = multiply_bytes(product, a0, a1, a2, a3, b0, b1, CUT.warps, CUT.inline)
        c0, c1, c2, c3 = product
        meta0, meta1 = metas[AT % 128 // CUT.group_size]
        scale0, zero0 = split_meta(meta0, TILE, FORMAT.zero_steps, tl.float32)
        scale1, zero1 = split_meta(meta1, TILE, FORMAT.zero_steps, tl.float32)
        value0 = ((c0 * 256 + c1).to(tl.float32) - zero0 * x_sum) * x_scale
        value1 = ((c2 * 256 + c3).to(tl.float32) - zero1 * x_sum) * x_scale
        sum0, sum1 = acc[rows]
        sums += ((sum0 + value0 * scale0, sum1 + value1 * scale1),)
    return sums


@triton.jit
def multiply_planes(thread, acc, loaded, x, x_meta, columns_left, CUT: tl.constexpr,
                    FORMAT: tl.constexpr):  # fmt: skip
    """acc += a step's weights, scaled, times X. x, x_meta: where the step's columns of X begin.
    If the cut is ragged, less than 256 of them may be left, or none.

    acc: two float32 [threads] for each 16 rows.
    """
    X_BLOCK: tl.constexpr = CUT.x_block
    for part in tl.static_range(256 // X_BLOCK):
        acc = multiply_part(
            thread, acc, loaded, x, x_meta, columns_left, part * X_BLOCK, CUT, FORMAT
        )  # fmt: skip
    return acc


@triton.jit
def zeros_of(thread, TILES: tl.constexpr):
    """What products are added to: two float32 [threads] for each 16 rows."""
    nothing = (thread * 0).to(tl.float32)
    acc = ()
    for _ in tl.static_range(TILES):
        acc += ((nothing, nothing),)
    return acc


@triton.jit
def dot_planes(thread, place, token, source, x, x_meta, rows, pair_rows, records, entry, first_row,
               first_step, steps, columns, CUT: tl.constexpr, FORMAT: tl.constexpr):  # fmt: skip
    """TILES * 16 rows of W for each warp times rows of X -> two float32 [threads] for each 16 rows.

    records, entry, first_row, first_step: where W begins. place: three int32 [threads], the first
    of a thread's rows behind first_row's record, the first of its steps and the first behind them.
    x, x_meta: digits of X, from first_step on; columns: so many of them are X's. rows: int32
    [threads], the row of X whose digits the thread loads; pair_rows: the same of its results; -1
    for none, row 0 stands in and nobody is to store what it gives. steps: the most of any warp, or
    `steps_of_warp`.

    When the first steps are on their way, this waits for the previous grid if the cut says so, and
    makes the digits if it is given X, one row: token (`digits.load_token`), or source, where X lies
    once the previous grid has ended. The other one is None, or both.
    """
    COLUMNS: tl.constexpr = CUT.digit_columns
    GROUP_SIZE: tl.constexpr = CUT.group_size
    X_BLOCK: tl.constexpr = CUT.x_block
    WARPS: tl.constexpr = CUT.warps
    AHEAD: tl.constexpr = CUT.ahead
    DTYPE: tl.constexpr = CUT.dtype
    WIDTH: tl.constexpr = FORMAT.width
    STRIDE: tl.constexpr = CUT.rows // 64 * record_bytes_of(WIDTH, GROUP_SIZE)
    record = first_record(records, entry, first_row, GROUP_SIZE, WIDTH)
    record += first_step.to(tl.int64) * STRIDE
    first, begin, end = place
    row, quad = thread % 32 // 4, thread % 4
    start = first // 64 * record_bytes_of(WIDTH, GROUP_SIZE) + begin * STRIDE
    offsets = start // 8 + (first % 64 + row) * 4 + quad
    meta_offsets = start // 4 + first % 64 + row
    loaded = ()
    for i in tl.static_range(AHEAD):
        loaded += (
            load_planes(record + i * STRIDE, offsets, meta_offsets, begin + i < end, WIDTH, CUT),
        )  # fmt: skip
    wait_for_previous(CUT.waits)
    if source is not None:
        late = load_token(thread, source, columns, COLUMNS, WARPS)
        store_token(thread, late, x, x_meta, COLUMNS, X_BLOCK, DTYPE, WARPS, CUT.inline)
        tl.debug_barrier()
    if token is not None:
        store_token(thread, token, x, x_meta, COLUMNS, X_BLOCK, DTYPE, WARPS, CUT.inline)
        tl.debug_barrier()
    at = (tl.maximum(rows, 0) * 2 + row % 2) * (COLUMNS // 8) + quad + begin * 32
    x = x.to(tl.pointer_type(tl.int64)) + at
    at = tl.maximum(pair_rows, 0) * (COLUMNS // X_BLOCK) + begin * (256 // X_BLOCK)
    x_meta = x_meta.to(tl.pointer_type(tl.int64)) + at
    acc = zeros_of(thread, CUT.tiles)
    left = tl.minimum(end * 256, columns) - begin * 256
    for step in range(0, steps, AHEAD):
        following = ()
        for i in tl.static_range(AHEAD):
            acc = multiply_planes(
                thread, acc, loaded[i], x + i * 32, x_meta + i * (256 // X_BLOCK),
                left - (step + i) * 256, CUT, FORMAT,
            )  # fmt: skip
            following += (
                load_planes(
                    record + (AHEAD + i) * STRIDE, offsets, meta_offsets,
                    begin + (step + AHEAD + i) < end, WIDTH, CUT,
                ),
            )  # fmt: skip
        loaded = following
        record += AHEAD * STRIDE
        x += AHEAD * 32
        x_meta += AHEAD * (256 // X_BLOCK)
    return acc


@triton.jit
def load_pairs(thread, block_pair, block, BLOCK_M: tl.constexpr):
    """Of each thread the pair whose digits it loads, and the pair whose results it has."""
    pairs = block_pair + block * BLOCK_M
    return tl.load(pairs + thread % 32 // 8), tl.load(pairs + thread % 4)


@triton.jit
def place_of_warp(thread, first_row, steps, CUT: tl.constexpr):
    """`dot_planes`'s place. Warps share the steps of a program, of which there are `steps`; warps
    for whom no row is left have none."""
    PER_PART: tl.constexpr = CUT.per_part
    ROW_WARPS: tl.constexpr = CUT.warps // CUT.parts
    warp = thread // 32
    first = warp % ROW_WARPS * (16 * CUT.tiles)
    begin = warp // ROW_WARPS * PER_PART
    end = tl.where(first < CUT.block_n, tl.minimum(begin + PER_PART, steps), 0)
    return first_row % 64 + first, begin, end


@triton.jit
def steps_of_warp(steps, CUT: tl.constexpr):
    """`steps`, and 0 in warps for whom no row is left: a scalar, but a warp's own."""
    ROW_WARPS: tl.constexpr = CUT.warps // CUT.parts
    if CUT.inline and ROW_WARPS * 16 * CUT.tiles > CUT.block_n:
        warp = tl.inline_asm_elementwise(
            "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 $0, t, 5; }", "=r", [], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
        steps = tl.where(warp % ROW_WARPS * (16 * CUT.tiles) < CUT.block_n, steps, 0)
    return steps


@triton.jit
def add_parts(value, CUT: tl.constexpr):
    """The sum over the warps that share a row's columns, for each of them."""
    PARTS: tl.constexpr = CUT.parts
    if PARTS > 1:
        parts = value.reshape(PARTS, 32 * CUT.warps // PARTS)
        nothing = (parts.to(tl.int32, bitcast=True) * 0).to(tl.float32)
        value = each_thread(nothing + tl.sum(parts, 0)[None, :], CUT.warps, CUT.inline)
    return value


@triton.jit
def add_bias_once(acc, at, gives, CUT: tl.constexpr):
    """acc, plus the bias of its rows in the threads that give it. at: that of a thread's first."""
    TILES: tl.constexpr = CUT.tiles
    sums = ()
    for tile in tl.static_range(TILES):
        sum0, sum1 = acc[tile]
        sum0 += tl.load(at + tile * 16, mask=gives, other=0.0).to(tl.float32)
        sum1 += tl.load(at + tile * 16 + 8, mask=gives, other=0.0).to(tl.float32)
        sums += ((sum0, sum1),)
    return sums


@gluon.jit(do_not_specialize=["top_k"])
def gate_up_warp_kernel(digits, x_meta, records, bias, block_info, block_pair, h_digits, h_meta,
                        top_k, CUT: tl.constexpr, FORMATS: tl.constexpr, ACTIVATION: tl.constexpr,
                        DTYPE: tl.constexpr, H_BLOCK: tl.constexpr,
                        PDL: tl.constexpr):  # fmt: skip
    """As `block.gate_up_kernel`."""
    TILES: tl.constexpr = CUT.tiles
    WARPS: tl.constexpr = CUT.warps
    INLINE: tl.constexpr = CUT.inline
    block = tl.program_id(1)
    thread = threads(WARPS, INLINE)
    wait_for_previous(PDL)
    entry = load_entry(block_info, block, 1)
    if entry == 0:
        return
    loads, gives = load_pairs(thread, block_pair, block, 4)
    first_row = tl.program_id(0) * CUT.block_n
    place = place_of_warp(thread, first_row, CUT.per_split, CUT)
    tensors = (
        thread, place, None, None, digits, x_meta,
        tl.where(loads >= 0, loads // top_k, -1), tl.where(gives >= 0, gives // top_k, -1),
        records, entry, first_row, entry * 0, CUT.per_part, CUT.columns,
    )  # fmt: skip
    acc = by_format(zeros_of(thread, TILES), entry, dot_planes, tensors, CUT, FORMATS)
    # A tile of 16 rows is 8 of gate, then 8 of up, both a thread's own, or 16 columns of h.
    OF_TILE: tl.constexpr = 16 // ACTIVATION.rows
    TOGETHER: tl.constexpr = min(TILES, H_BLOCK // OF_TILE)  # tiles of a warp that share a scale
    row, warp = thread % 32 // 4, thread // 32 % (WARPS // CUT.parts)
    if bias is not None:
        at = bias + tl.load(block_info + block * 4) * CUT.rows + first_row
        acc = add_bias_once(acc, at + warp * (16 * TILES) + row, thread // 32 == warp, CUT)
    gives = tl.where(thread // 32 == warp, gives, -1)
    for begin in tl.static_range(0, TILES, TOGETHER):
        largest = thread * 0
        values = ()
        for tile in tl.static_range(begin, begin + TOGETHER):
            sum0, sum1 = acc[tile]
            found = activate_pair(add_parts(sum0, CUT), add_parts(sum1, CUT), ACTIVATION)
            for i in tl.static_range(len(found)):
                h = found[i].to(DTYPE).to(tl.float32)
                largest = tl.maximum(largest, absolute_bits(h))
                values += (h,)
        store_columns(
            thread, values, largest, gives, warp, row, first_row, h_digits, h_meta,
            ACTIVATION.rows, begin * OF_TILE, TILES * OF_TILE, CUT.rows // ACTIVATION.rows,
            H_BLOCK, WARPS, INLINE,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["pairs_total"])
def down_warp_kernel(h_digits, h_meta, records, block_info, block_pair, parts, pairs_total,
                     CUT: tl.constexpr, FORMATS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """As `block.down_kernel`."""
    PER_SPLIT: tl.constexpr = CUT.per_split
    TILES: tl.constexpr = CUT.tiles
    block = tl.program_id(1)
    thread = threads(CUT.warps, CUT.inline)
    entry = load_entry(block_info, block, 2)
    if entry == 0:
        wait_for_previous(PDL)
        return
    loads, gives = load_pairs(thread, block_pair, block, 4)
    split = tl.program_id(0) % CUT.splits
    first_row = tl.program_id(0) // CUT.splits * CUT.block_n
    first_step = split * PER_SPLIT
    steps = tl.minimum(PER_SPLIT, steps_of(CUT.columns, 1) - first_step)
    place = place_of_warp(thread, first_row, steps, CUT)
    tensors = (
        thread, place, None, None, h_digits + first_step * 256,
        h_meta + first_step * (2 * (256 // CUT.x_block)), loads, gives, records, entry, first_row,
        first_step, tl.minimum(CUT.per_part, steps), CUT.columns - first_step * 256,
    )  # fmt: skip
    acc = by_format(zeros_of(thread, TILES), entry, dot_planes, tensors, CUT, FORMATS)
    first, begin, end = place
    at = (split * pairs_total + gives).to(tl.int64) * CUT.rows + first_row // 64 * 64 + first
    at += thread % 32 // 4
    for rows in tl.static_range(TILES):
        sum0, sum1 = acc[rows]
        sum0, sum1 = add_parts(sum0, CUT), add_parts(sum1, CUT)
        tl.store(parts + at + rows * 16, sum0, mask=(gives >= 0) & (begin == 0))
        tl.store(parts + at + rows * 16 + 8, sum1, mask=(gives >= 0) & (begin == 0))


GPU_KERNELS = (gate_up_warp_kernel, down_warp_kernel)
INTERPRETED_KERNELS = tuple(triton.jit(kernel.fn) for kernel in GPU_KERNELS)


def fused_experts_warp(
    x: torch.Tensor,
    layer: TiledLayer,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    config: WarpConfig,
    prune_ratio: float = 0.0,
    counts: torch.Tensor | None = None,
    inline: bool = True,
    pdl: bool = False,
) -> torch.Tensor:
    """As `fused_experts_decode`."""
    gate_up, down = GPU_KERNELS if inline else INTERPRETED_KERNELS
    cut13, cut2 = cuts(config, *layer.sizes, hidden_block(layer, config), pdl, inline)
    return launch_decode(
        x, layer, topk_weights, topk_ids, config, prune_ratio, counts, inline, pdl,
        (gate_up, cut13), (down, cut2),
    )  # fmt: skip
