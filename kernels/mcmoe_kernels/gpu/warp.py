"""The experts for few tokens, every warp on its own: codes go from memory to registers to MMAs.

The launches, products and results of `experts_decode` for blocks of up to four pairs, but without
shared memory and barriers: a thread finds what it multiplies in eight bytes side by side in a plane
of `tiles`, so that it loads its own operands, some steps ahead.

Tensors have an element a thread (`threads`). A thread is one of (warps, 8 rows, 4 quads), as the
8-bit MMA of 16 rows, 32 columns and 8 columns of X wants it:

    weights   bytes 8 * quad to 8 * quad + 7 of a plane, of rows `row` and `row` + 8
    digits    the same bytes of pair row // 2, digit row % 2
    results   rows `row` and `row` + 8, both digits of pair `quad`
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon

from mcmoe_kernels.formats.records import first_record, record_bytes_of
from mcmoe_kernels.formats.scalar8 import blocks_words, halves, load_planes
from mcmoe_kernels.formats.words import split_meta
from mcmoe_kernels.gpu.block import launch_decode
from mcmoe_kernels.gpu.choice import WarpConfig
from mcmoe_kernels.gpu.common import activate, is_ragged, load_if, steps_of
from mcmoe_kernels.gpu.digits import absolute_bits, load_token, store_token, to_fixed
from mcmoe_kernels.gpu.routing import load_entry, wait_for_previous
from mcmoe_kernels.gpu.threads import each_thread, threads
from mcmoe_kernels.gpu.tiled import TiledLayer

MULTIPLY_ASM = tl.constexpr(
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


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
def multiply_part(thread, acc, loaded, x, x_meta, columns_left, AT: tl.constexpr,
                  RAGGED: tl.constexpr, GROUP_SIZE: tl.constexpr, X_BLOCK: tl.constexpr,
                  BITS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
                  INLINE: tl.constexpr):  # fmt: skip
    """acc += X_BLOCK columns of a step's weights, from AT on, scaled, times those of X."""
    TILE: tl.constexpr = AT // 128
    inside = thread * 0 + AT < columns_left
    digits = ()
    for block in tl.static_range(X_BLOCK // 32):
        digits += (halves(load_if(x + (AT + 32 * block) // 8, inside, RAGGED)),)
    scale, total = halves(load_if(x_meta + AT // X_BLOCK, inside, RAGGED))
    x_scale, x_sum = scale.to(tl.float32, bitcast=True), total.to(tl.float32, bitcast=True)
    nothing = thread * 0
    sums = ()
    for rows in tl.static_range(TILES):
        planes, metas = loaded[rows]
        blocks = blocks_words(planes, TILE, BITS, INLINE)
        product = (nothing, nothing, nothing, nothing)
        for block in tl.static_range(X_BLOCK // 32):
            a0, a1, a2, a3 = blocks[AT % 128 // 32 + block]
            b0, b1 = digits[block]
            product = multiply_bytes(product, a0, a1, a2, a3, b0, b1, WARPS, INLINE)
        c0, c1, c2, c3 = product
        meta0, meta1 = metas[AT % 128 // GROUP_SIZE]
        scale0, zero0 = split_meta(meta0, TILE, BITS, tl.float32)
        scale1, zero1 = split_meta(meta1, TILE, BITS, tl.float32)
        value0 = ((c0 * 256 + c1).to(tl.float32) - zero0 * x_sum) * x_scale
        value1 = ((c2 * 256 + c3).to(tl.float32) - zero1 * x_sum) * x_scale
        sum0, sum1 = acc[rows]
        sums += ((sum0 + value0 * scale0, sum1 + value1 * scale1),)
    return sums


@triton.jit
def multiply_planes(thread, acc, loaded, x, x_meta, columns_left, RAGGED: tl.constexpr,
                    GROUP_SIZE: tl.constexpr, X_BLOCK: tl.constexpr, BITS: tl.constexpr,
                    TILES: tl.constexpr, WARPS: tl.constexpr,
                    INLINE: tl.constexpr):  # fmt: skip
    """acc += a step's weights, scaled, times X. x, x_meta: where the step's columns of X begin.
    RAGGED: less than 256 of them may be left, or none.

    acc: two float32 [threads] for each 16 rows.
    """
    for part in tl.static_range(256 // X_BLOCK):
        acc = multiply_part(
            thread, acc, loaded, x, x_meta, columns_left, part * X_BLOCK, RAGGED, GROUP_SIZE,
            X_BLOCK, BITS, TILES, WARPS, INLINE,
        )  # fmt: skip
    return acc


@triton.jit
def dot_planes(thread, place, token, source, x, x_meta, rows, pair_rows, record, steps,
               columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP_SIZE: tl.constexpr,
               X_BLOCK: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr,
               WARPS: tl.constexpr, AHEAD: tl.constexpr, RAGGED: tl.constexpr,
               WAIT: tl.constexpr, DTYPE: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    """TILES * 16 rows of W for each warp times rows of X -> two float32 [threads] for each 16 rows.

    place: three int32 [threads], the first of a thread's rows behind `record`'s, the first of its
    steps and the first behind them. x, x_meta: digits of X, COLUMNS a row, from step 0 on; columns:
    so many of them are X's. rows: int32 [threads], the row of X whose digits the thread loads;
    pair_rows: the same of its results; -1 for none, row 0 stands in and nobody is to store what it
    gives. steps: the most of any warp, or `steps_of_warp`. AHEAD: so many are loaded ahead. RAGGED:
    a warp may have fewer, or the last of them fewer columns.

    When the first steps are on their way, this waits for the previous grid if WAIT, and makes the
    digits if it is given X, one row in DTYPE: token (`digits.load_token`), or source, where X lies
    once the previous grid has ended. The other one is None, or both.
    """
    STRIDE: tl.constexpr = ROWS // 64 * record_bytes_of(BITS, GROUP_SIZE)
    first, begin, end = place
    row, quad = thread % 32 // 4, thread % 4
    start = first // 64 * record_bytes_of(BITS, GROUP_SIZE) + begin * STRIDE
    offsets = start // 8 + (first % 64 + row) * 4 + quad
    meta_offsets = start // 4 + first % 64 + row
    loaded = ()
    for i in tl.static_range(AHEAD):
        loaded += (
            load_planes(
                record + i * STRIDE, offsets, meta_offsets, begin + i < end, GROUP_SIZE, BITS,
                TILES,
            ),
        )  # fmt: skip
    wait_for_previous(WAIT)
    if source is not None:
        late = load_token(thread, source, columns, COLUMNS, WARPS)
        store_token(thread, late, x, x_meta, COLUMNS, X_BLOCK, DTYPE, WARPS, INLINE)
        tl.debug_barrier()
    if token is not None:
        store_token(thread, token, x, x_meta, COLUMNS, X_BLOCK, DTYPE, WARPS, INLINE)
        tl.debug_barrier()
    at = (tl.maximum(rows, 0) * 2 + row % 2) * (COLUMNS // 8) + quad + begin * 32
    x = x.to(tl.pointer_type(tl.int64)) + at
    at = tl.maximum(pair_rows, 0) * (COLUMNS // X_BLOCK) + begin * (256 // X_BLOCK)
    x_meta = x_meta.to(tl.pointer_type(tl.int64)) + at
    nothing = (thread * 0).to(tl.float32)
    acc = ()
    for _ in tl.static_range(TILES):
        acc += ((nothing, nothing),)
    left = tl.minimum(end * 256, columns) - begin * 256
    for step in range(0, steps, AHEAD):
        following = ()
        for i in tl.static_range(AHEAD):
            acc = multiply_planes(
                thread, acc, loaded[i], x + i * 32, x_meta + i * (256 // X_BLOCK),
                left - (step + i) * 256, RAGGED, GROUP_SIZE, X_BLOCK, BITS, TILES, WARPS, INLINE,
            )  # fmt: skip
            following += (
                load_planes(
                    record + (AHEAD + i) * STRIDE, offsets, meta_offsets,
                    begin + (step + AHEAD + i) < end, GROUP_SIZE, BITS, TILES,
                ),
            )  # fmt: skip
        loaded = following
        record += AHEAD * STRIDE
        x += AHEAD * 32
        x_meta += AHEAD * (256 // X_BLOCK)
    return acc


@triton.jit
def dot_any_width(thread, place, token, source, x, x_meta, rows, pair_rows, records, entry,
                  first_row, first_step, steps, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                  GROUP_SIZE: tl.constexpr, X_BLOCK: tl.constexpr, WIDTHS: tl.constexpr,
                  TILES: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
                  RAGGED: tl.constexpr, WAIT: tl.constexpr, DTYPE: tl.constexpr,
                  INLINE: tl.constexpr):  # fmt: skip
    """`dot_planes` by the width of the expert, from first_row and first_step on; only the widths in
    WIDTHS are compiled."""
    nothing = (thread * 0).to(tl.float32)
    acc = ()
    for _ in tl.static_range(TILES):
        acc += ((nothing, nothing),)
    for bits in tl.static_range(1, 5):
        if (WIDTHS >> bits) % 2 == 1:  # noqa: SIM102 (this is known when compiling)
            if entry % 8 == bits:
                record = first_record(records, entry, first_row, GROUP_SIZE, bits)
                record += first_step.to(tl.int64) * (ROWS // 64 * record_bytes_of(bits, GROUP_SIZE))
                acc = dot_planes(
                    thread, place, token, source, x, x_meta, rows, pair_rows, record, steps,
                    columns, ROWS, COLUMNS, GROUP_SIZE, X_BLOCK, bits, TILES, WARPS, AHEAD, RAGGED,
                    WAIT, DTYPE, INLINE,
                )  # fmt: skip
    return acc


@triton.jit
def load_pairs(thread, block_pair, block, BLOCK_M: tl.constexpr):
    """Of each thread the pair whose digits it loads, and the pair whose results it has."""
    pairs = block_pair + block * BLOCK_M
    return tl.load(pairs + thread % 32 // 8), tl.load(pairs + thread % 4)


@triton.jit
def place_of_warp(thread, first_row, steps, STEPS: tl.constexpr, BLOCK_N: tl.constexpr,
                  TILES: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr):  # fmt: skip
    """`dot_planes`'s place. PARTS warps share the STEPS steps of a row, of which there are `steps`;
    warps for whom no row is left have none."""
    PER_PART: tl.constexpr = steps_of(256 * STEPS, PARTS)
    warp = thread // 32
    first = warp % (WARPS // PARTS) * (16 * TILES)
    begin = warp // (WARPS // PARTS) * PER_PART
    end = tl.where(first < BLOCK_N, tl.minimum(begin + PER_PART, steps), 0)
    return first_row % 64 + first, begin, end


@triton.jit
def steps_of_warp(steps, BLOCK_N: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
                  WARPS: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    """`steps`, and 0 in warps for whom no row is left: a scalar, but a warp's own."""
    if INLINE and WARPS // PARTS * 16 * TILES > BLOCK_N:
        warp = tl.inline_asm_elementwise(
            "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 $0, t, 5; }", "=r", [], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
        steps = tl.where(warp % (WARPS // PARTS) * (16 * TILES) < BLOCK_N, steps, 0)
    return steps


@triton.jit
def add_parts(value, PARTS: tl.constexpr, WARPS: tl.constexpr, INLINE: tl.constexpr):
    """The sum over the warps that share a row's columns, for each of them."""
    if PARTS > 1:
        parts = value.reshape(PARTS, 32 * WARPS // PARTS)
        nothing = (parts.to(tl.int32, bitcast=True) * 0).to(tl.float32)
        value = each_thread(nothing + tl.sum(parts, 0)[None, :], WARPS, INLINE)
    return value


@gluon.jit(do_not_specialize=["top_k"])
def gate_up_warp_kernel(digits, x_meta, records, block_info, block_pair, h_digits, h_meta, top_k,
                        HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
                        GROUP_SIZE: tl.constexpr, X_BLOCK: tl.constexpr, WIDTHS: tl.constexpr,
                        ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, H_BLOCK: tl.constexpr,
                        BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr,
                        PARTS: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr,
                        PDL: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    """As `experts_decode.gate_up_kernel`. STAGES: steps that are loaded ahead."""
    block = tl.program_id(1)
    thread = threads(WARPS, INLINE)
    wait_for_previous(PDL)
    entry = load_entry(block_info, block, 1)
    if entry == 0:
        return
    loads, gives = load_pairs(thread, block_pair, block, BLOCK_M)
    first_row = tl.program_id(0) * BLOCK_N
    STEPS: tl.constexpr = steps_of(HIDDEN, 1)
    PER_PART: tl.constexpr = steps_of(256 * STEPS, PARTS)
    AHEAD: tl.constexpr = min(STAGES, PER_PART)
    RAGGED: tl.constexpr = is_ragged(HIDDEN, 1, PARTS, AHEAD)
    place = place_of_warp(thread, first_row, STEPS, STEPS, BLOCK_N, TILES, PARTS, WARPS)
    acc = dot_any_width(
        thread, place, None, None, digits, x_meta,
        tl.where(loads >= 0, loads // top_k, -1), tl.where(gives >= 0, gives // top_k, -1),
        records, entry, first_row, entry * 0, PER_PART, HIDDEN, 2 * INTERMEDIATE, HIDDEN,
        GROUP_SIZE, X_BLOCK, WIDTHS, TILES, WARPS, AHEAD, RAGGED, False, None, INLINE,
    )  # fmt: skip
    # A tile of 16 rows is 8 of gate, then 8 of up: both are a thread's own. H_BLOCK columns of h
    # are those of WARPS_TOGETHER warps.
    WARPS_TOGETHER: tl.constexpr = H_BLOCK // (8 * TILES)
    SHAPE: tl.constexpr = (WARPS // WARPS_TOGETHER, 8 * WARPS_TOGETHER, 4)
    row, warp = thread % 32 // 4, thread // 32 % (WARPS // PARTS)
    gives = tl.where(thread // 32 == warp, gives, -1)
    largest = thread * 0
    values = ()
    for rows in tl.static_range(TILES):
        gate, up = acc[rows]
        gate, up = add_parts(gate, PARTS, WARPS, INLINE), add_parts(up, PARTS, WARPS, INLINE)
        h = (activate(gate, ACTIVATION) * up).to(DTYPE).to(tl.float32)
        largest = tl.maximum(largest, absolute_bits(h))
        values += (h,)
    together = largest.reshape(SHAPE)
    together = together * 0 + tl.max(together, 1)[:, None, :]
    largest = each_thread(together, WARPS, INLINE)
    total = thread * 0
    scale = total.to(tl.float32)
    for rows in tl.static_range(TILES):
        fixed, scale = to_fixed(values[rows], largest)
        total += fixed
        high = (fixed + 128) >> 8
        column = warp * (8 * TILES) + rows * 8 + row
        position = column // 32 * 32 + 2 * (column % 16) + column % 32 // 16
        at = gives.to(tl.int64) * (2 * INTERMEDIATE) + first_row // 2 + position
        tl.store(h_digits + at, high.to(tl.int8), mask=gives >= 0)
        tl.store(h_digits + at + INTERMEDIATE, (fixed - 256 * high).to(tl.int8), mask=gives >= 0)
    together = total.reshape(SHAPE)
    together = together * 0 + tl.sum(together, 1)[:, None, :]
    total = each_thread(together, WARPS, INLINE)
    h_block = first_row // 2 // H_BLOCK + warp // WARPS_TOGETHER
    at = h_meta + (gives.to(tl.int64) * (INTERMEDIATE // H_BLOCK) + h_block) * 2
    leads = (gives >= 0) & (row == 0) & (warp % WARPS_TOGETHER == 0)
    tl.store(at, scale, mask=leads)
    tl.store(at + 1, total.to(tl.float32), mask=leads)


@gluon.jit(do_not_specialize=["pairs_total"])
def down_warp_kernel(h_digits, h_meta, records, block_info, block_pair, parts, pairs_total,
                     HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
                     GROUP_SIZE: tl.constexpr, X_BLOCK: tl.constexpr, WIDTHS: tl.constexpr,
                     SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                     TILES: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
                     WARPS: tl.constexpr, PDL: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    """As `experts_decode.down_kernel`. STAGES: steps that are loaded ahead."""
    block = tl.program_id(1)
    thread = threads(WARPS, INLINE)
    entry = load_entry(block_info, block, 2)
    if entry == 0:
        wait_for_previous(PDL)
        return
    loads, gives = load_pairs(thread, block_pair, block, BLOCK_M)
    split = tl.program_id(0) % SPLITS
    first_row = tl.program_id(0) // SPLITS * BLOCK_N
    PER_SPLIT: tl.constexpr = steps_of(INTERMEDIATE, SPLITS)
    PER_PART: tl.constexpr = steps_of(256 * PER_SPLIT, PARTS)
    AHEAD: tl.constexpr = min(STAGES, PER_PART)
    RAGGED: tl.constexpr = is_ragged(INTERMEDIATE, SPLITS, PARTS, AHEAD)
    first_step = split * PER_SPLIT
    steps = tl.minimum(PER_SPLIT, steps_of(INTERMEDIATE, 1) - first_step)
    place = place_of_warp(thread, first_row, steps, PER_SPLIT, BLOCK_N, TILES, PARTS, WARPS)
    acc = dot_any_width(
        thread, place, None, None, h_digits + first_step * 256,
        h_meta + first_step * (2 * (256 // X_BLOCK)), loads, gives, records, entry, first_row,
        first_step, tl.minimum(PER_PART, steps), INTERMEDIATE - first_step * 256, HIDDEN,
        INTERMEDIATE, GROUP_SIZE, X_BLOCK, WIDTHS, TILES, WARPS, AHEAD, RAGGED, PDL, None, INLINE,
    )  # fmt: skip
    first, begin, end = place
    at = (split * pairs_total + gives).to(tl.int64) * HIDDEN + first_row // 64 * 64 + first
    at += thread % 32 // 4
    for rows in tl.static_range(TILES):
        sum0, sum1 = acc[rows]
        sum0, sum1 = add_parts(sum0, PARTS, WARPS, INLINE), add_parts(sum1, PARTS, WARPS, INLINE)
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
    return launch_decode(
        x, layer, topk_weights, topk_ids, config, prune_ratio, counts, inline, pdl,
        (gate_up, {"WARPS": config.warps13, "TILES": config.tiles13, "PARTS": config.parts13}),
        (down, {"WARPS": config.warps2, "TILES": config.tiles2, "PARTS": config.parts2}),
    )  # fmt: skip
