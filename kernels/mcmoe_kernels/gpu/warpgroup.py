"""The experts for many tokens on Hopper: weights are dequantized while matrix units multiply.

The same products as `prefill`, whose compiler waits for each product before it prepares
the next one's weights. Here the order is written out (Gluon): every warpgroup issues the products
of one part of a tile, dequantizes the next part meanwhile and only then waits for the ones before,
so that the matrix units always have work queued. Tiles of x and of the planes arrive through a ring
of asynchronous copies.

A tile t of the ring is copied at tile t - (STAGES - 2): the slot it takes was last read by products
that every warp has waited for before the barrier of that tile.
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mcmoe_kernels.formats.device.records import (
    first_record,
    record_bytes_of,
    shared_at,
    tile_at,
)
from mcmoe_kernels.formats.device.words import concatenate, split_meta
from mcmoe_kernels.gpu.choice import WarpgroupConfig
from mcmoe_kernels.gpu.common import activate_block, add_bias, by_format, is_scaled
from mcmoe_kernels.gpu.prefill import launch_prefill, sizes_of
from mcmoe_kernels.gpu.routing import wait_for_previous
from mcmoe_kernels.gpu.tiled import TiledLayer

# Its name changed between Triton 3.6 and 3.9, where the old one raises.
async_load = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)


@dataclass(frozen=True)
class Cut:
    """As `prefill.Cut`. part: columns of a product."""

    rows: int
    columns: int
    group_size: int
    block_n: int
    block_m: int
    part: int
    stages: int
    group_n: int
    wide: bool


def cuts(
    config: WarpgroupConfig,
    rows13: int,
    hidden_size: int,
    intermediate_size: int,
    group_sizes: tuple[int, int],
    wide: bool,
) -> tuple[Cut, Cut]:
    """What the products of a configuration are compiled for: w13, w2. group_sizes: theirs."""
    c, rest = config, (config.stages, config.group_n, wide)
    return (
        Cut(rows13, hidden_size, group_sizes[0], c.block_n13, c.block_m, c.part13, *rest),
        Cut(hidden_size, intermediate_size, group_sizes[1], c.block_n2, c.block_m, c.part2, *rest),
    )  # fmt: skip


@gluon.constexpr_function
def results_layout(block_m, warps):
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, block_m, 16])


@gluon.constexpr_function
def tokens_layout(part, warps):
    """Of what a copy takes of x at a time."""
    return gl.BlockedLayout([1, 8], [256 // part, part // 8], [warps, 1], [1, 0])


@gluon.jit
def copy_tile(tile, step, tiles, record, shared_ring, plane_ring, meta_ring, x_ring, x, x_offsets,
              valid, TILE: gl.constexpr, WIDTH: gl.constexpr, CUT: gl.constexpr):  # fmt: skip
    """Start the copies of one tile, TILE = tile % 2, of step `step`: planes and x, and with the
    first what both share."""
    COLUMNS: gl.constexpr = CUT.columns
    GROUP_SIZE: gl.constexpr = CUT.group_size
    BLOCK_N: gl.constexpr = CUT.block_n
    PART: gl.constexpr = CUT.part
    STAGES: gl.constexpr = CUT.stages
    STEP_BYTES: gl.constexpr = record_bytes_of(WIDTH, GROUP_SIZE)
    GROUPS: gl.constexpr = 128 // GROUP_SIZE
    START: gl.constexpr = tile_at(TILE, WIDTH, GROUP_SIZE)
    WARPS: gl.constexpr = gl.num_warps()
    PLANE: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
    META: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    inside = tile < tiles
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, PLANE))
    offsets = (n // 64 * (STEP_BYTES // 2) + n % 64 * 16)[:, None] + gl.arange(
        0, 16, gl.SliceLayout(0, PLANE)
    )[None, :]
    words = record.to(gl.pointer_type(gl.int16))
    slot = tile % STAGES
    step_slot = step % STAGES
    if WIDTH % 2 == 1 and TILE == 0:
        start = words + shared_at(GROUP_SIZE) // 2
        async_load(shared_ring.index(step_slot), start + offsets, mask=inside)
    for plane in gl.static_range(WIDTH // 2):
        start = words + (START + plane * 2048) // 2
        async_load(plane_ring.index(slot * (WIDTH // 2) + plane), start + offsets, mask=inside)
    if TILE == 0:
        row = gl.arange(0, BLOCK_N, META)
        row_offsets = row // 64 * (STEP_BYTES // 4) + row % 64
        metas = record.to(gl.pointer_type(gl.int32))
        for group in gl.static_range(GROUPS):
            target = meta_ring.index(step_slot * GROUPS + group)
            async_load(target, (metas + group * 64) + row_offsets, mask=inside)
    for part in gl.static_range(128 // PART):
        column = tile * 128 + part * PART
        async_load(
            x_ring.index(slot * (128 // PART) + part), (x + column) + x_offsets,
            mask=valid[:, None] & (column < COLUMNS) if CUT.block_m <= 32 else column < COLUMNS,
        )  # fmt: skip


@gluon.jit
def load_planes(tile, step, shared_ring, plane_ring, LAYOUT: gl.constexpr, WIDTH: gl.constexpr,
                STAGES: gl.constexpr):  # fmt: skip
    """The planes of a tile, int16 [N, 16] each: shared ones, then its own."""
    planes = ()
    if WIDTH % 2 == 1:
        planes += (shared_ring.index(step % STAGES).load(LAYOUT),)
    for plane in gl.static_range(WIDTH // 2):
        planes += (plane_ring.index(tile % STAGES * (WIDTH // 2) + plane).load(LAYOUT),)
    return planes


@gluon.jit
def multiply_tile(acc, tile, step, shared_ring, plane_ring, meta_ring, x_ring,
                  TILE: gl.constexpr, PARTS: gl.constexpr, WEIGHT: gl.constexpr,
                  CUT: gl.constexpr, FORMAT: gl.constexpr):  # fmt: skip
    """acc += the first PARTS parts of a tile. WEIGHT: the layout of weights.

    If weights are scaled before they are multiplied, the last part's products are left running.
    Else those of the tile gather in sums of their own, which are scaled: they must have ended,
    since registers of running products may not be read.
    """
    GROUP_SIZE: gl.constexpr = CUT.group_size
    PART: gl.constexpr = CUT.part
    STAGES: gl.constexpr = CUT.stages
    WIDTH: gl.constexpr = FORMAT.width
    SCALED: gl.constexpr = is_scaled(CUT.block_m, GROUP_SIZE)
    planes = load_planes(tile, step, shared_ring, plane_ring, WEIGHT, WIDTH, STAGES)
    DTYPE: gl.constexpr = x_ring.dtype
    slot, step_slot = tile % STAGES, step % STAGES
    GROUPS: gl.constexpr = 128 // GROUP_SIZE
    metas = ()
    for group in gl.static_range(GROUPS):
        metas += (meta_ring.index(step_slot * GROUPS + group).load(gl.SliceLayout(1, WEIGHT)),)
    sums = acc
    for part in gl.static_range(PARTS):
        tokens = x_ring.index(slot * (128 // PART) + part).permute((1, 0))
        weights = FORMAT.weights16(
            planes, metas[part * PART // GROUP_SIZE], TILE, part * (PART // 32), WIDTH, SCALED,
            DTYPE, True,
        )  # fmt: skip
        if PART == 64:
            second = FORMAT.weights16(
                planes, metas[(part * 2 + 1) * 32 // GROUP_SIZE], TILE, part * 2 + 1, WIDTH, SCALED,
                DTYPE, True,
            )  # fmt: skip
            weights = concatenate(weights, second)
        weights = gl.convert_layout(weights, WEIGHT, assert_trivial=True)
        sums = warpgroup_mma(weights, tokens, sums, use_acc=SCALED or part > 0, is_async=True)
        sums = warpgroup_mma_wait(1 if SCALED or part < PARTS - 1 else 0, (sums,))
    if SCALED:
        return sums
    else:
        meta = meta_ring.index(step_slot).load(gl.SliceLayout(1, acc.type.layout))
        scale, zero = split_meta(meta, TILE, FORMAT.zero_steps, gl.float32)
        return acc + sums * scale[:, None]


@gluon.jit
def dot_weights(x, rows, records, entry, first_row, CUT: gl.constexpr, FORMAT: gl.constexpr):
    """BLOCK_N rows of W times the rows of x [*, COLUMNS] -> float32 [N, M] in `results_layout`.

    rows: int32 [M] in the layout of the rows of `tokens_layout`; the results of -1 mean nothing.
    records, entry, first_row: of W.
    """
    COLUMNS: gl.constexpr = CUT.columns
    GROUP_SIZE: gl.constexpr = CUT.group_size
    BLOCK_N: gl.constexpr = CUT.block_n
    BLOCK_M: gl.constexpr = CUT.block_m
    PART: gl.constexpr = CUT.part
    STAGES: gl.constexpr = CUT.stages
    WIDTH: gl.constexpr = FORMAT.width
    STRIDE: gl.constexpr = CUT.rows // 64 * record_bytes_of(WIDTH, GROUP_SIZE)
    ACC: gl.constexpr = results_layout(BLOCK_M, gl.num_warps())
    X_TILE: gl.constexpr = tokens_layout(PART, gl.num_warps())
    record = first_record(records, entry, first_row, GROUP_SIZE, WIDTH)
    TILES: gl.constexpr = (COLUMNS + 127) // 128
    AHEAD: gl.constexpr = STAGES - 2
    WEIGHT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    DTYPE: gl.constexpr = x.dtype.element_ty
    gl.static_assert(STAGES % 2 == 0 and STAGES >= 4)
    gl.static_assert(COLUMNS % PART == 0)
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, [1, 0])
    X_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, PART], DTYPE)
    shared_ring = gl.allocate_shared_memory(
        gl.int16, [STAGES if WIDTH % 2 == 1 else 1, BLOCK_N if WIDTH % 2 == 1 else 8, 16],
        WORDS,
    )  # fmt: skip
    plane_ring = gl.allocate_shared_memory(
        gl.int16, [STAGES * (WIDTH // 2) if WIDTH > 1 else 1, BLOCK_N if WIDTH > 1 else 8, 16],
        WORDS,
    )  # fmt: skip
    meta_ring = gl.allocate_shared_memory(
        gl.int32,
        [STAGES * (128 // GROUP_SIZE), BLOCK_N],
        gl.SwizzledSharedLayout(1, 1, 1, [0]),
    )
    x_ring = gl.allocate_shared_memory(DTYPE, [STAGES * (128 // PART), BLOCK_M, PART], X_SHARED)
    valid = rows >= 0
    x_rows = gl.maximum(rows, 0)
    if CUT.wide:
        x_rows = x_rows.to(gl.int64)
    x_offsets = x_rows[:, None] * COLUMNS + gl.arange(0, PART, gl.SliceLayout(0, X_TILE))[None, :]
    for early in gl.static_range(AHEAD):
        copy_tile(
            early, early // 2, TILES, record + early // 2 * STRIDE, shared_ring, plane_ring,
            meta_ring, x_ring, x, x_offsets, valid, early % 2, WIDTH, CUT,
        )  # fmt: skip
        async_copy.commit_group()
    record += AHEAD // 2 * STRIDE
    acc = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, ACC)
    for step in range(COLUMNS // 256):
        for half in gl.static_range(2):
            async_copy.wait_group(AHEAD - 1)
            fence_async_shared()
            acc = multiply_tile(
                acc, step * 2 + half, step, shared_ring, plane_ring, meta_ring, x_ring, half,
                128 // PART, WEIGHT, CUT, FORMAT,
            )  # fmt: skip
            copy_tile(
                step * 2 + half + AHEAD, step + AHEAD // 2, TILES, record, shared_ring,
                plane_ring, meta_ring, x_ring, x, x_offsets, valid, half, WIDTH, CUT,
            )  # fmt: skip
            async_copy.commit_group()
        record += STRIDE
    for half in gl.static_range(2):  # less than a step at the end
        if half * 128 < COLUMNS % 256:
            async_copy.wait_group(AHEAD - 1 - half)
            fence_async_shared()
            acc = multiply_tile(
                acc, COLUMNS // 256 * 2 + half, COLUMNS // 256, shared_ring, plane_ring,
                meta_ring, x_ring, half,
                min(COLUMNS % 256 - half * 128, 128) // PART, WEIGHT, CUT,
                FORMAT,
            )  # fmt: skip
    async_copy.wait_group(0)
    return warpgroup_mma_wait(0, (acc,))


@gluon.jit
def weights_by_format(x, rows, records, entry, first_row, CUT: gl.constexpr,
                      FORMATS: gl.constexpr):  # fmt: skip
    """`dot_weights` by the format of the slot."""
    BLOCK_N: gl.constexpr = CUT.block_n
    BLOCK_M: gl.constexpr = CUT.block_m
    ACC: gl.constexpr = results_layout(BLOCK_M, gl.num_warps())
    nothing = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, ACC)
    tensors = (x, rows, records, entry, first_row)
    return by_format(nothing, entry, dot_weights, tensors, CUT, FORMATS)


@gluon.jit
def store_rows(y, value, places, first_row, ROWS: gl.constexpr, OUT: gl.constexpr):
    """y[pair, first_row + n] = value[n, m], rounded, for the pairs that are at `places`."""
    value = gl.convert_layout(value.to(y.dtype.element_ty), OUT)
    pairs = gl.load(places + gl.arange(0, value.shape[1], gl.SliceLayout(0, OUT)))
    row = first_row + gl.arange(0, value.shape[0], gl.SliceLayout(1, OUT))
    at = pairs.to(gl.int64)[None, :] * ROWS + row[:, None]
    gl.store(y + at, value, mask=(pairs >= 0)[None, :] & (row >= 0)[:, None])


@gluon.jit
def store_block(y, value, places, first_row, ROWS: gl.constexpr):
    """`store_rows` of BLOCK_N rows."""
    N: gl.constexpr = value.shape[0]
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [32, 1], [1, gl.num_warps()], [0, 1])
    if 32 * gl.num_warps() > N:
        store_rows(y, value, places, first_row, ROWS, OUT)
    else:  # in halves, whose addresses take fewer registers
        first, second = value.reshape(2, N // 2, value.shape[1]).permute(1, 2, 0).split()
        store_rows(y, first, places, first_row, ROWS, OUT)
        store_rows(y, second, places, first_row + N // 2, ROWS, OUT)


@gluon.jit(do_not_specialize=["top_k"])
def gate_up_warpgroup_kernel(x, records, bias, block_info, block_pair, h, top_k,
                             CUT: gl.constexpr, FORMATS: gl.constexpr,
                             ACTIVATION: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    BLOCK_N: gl.constexpr = CUT.block_n
    BLOCK_M: gl.constexpr = CUT.block_m
    X_TILE: gl.constexpr = tokens_layout(CUT.part, gl.num_warps())
    block, n_block = gl.program_id(1), gl.program_id(2) * CUT.group_n + gl.program_id(0)
    if n_block >= CUT.rows // BLOCK_N:
        return
    wait_for_previous(PDL)
    slot = gl.load(block_info + block * 4)
    entry = gl.load(block_info + block * 4 + 1)
    if slot < 0:
        return
    places = block_pair + block * BLOCK_M
    rows = gl.load(places + gl.arange(0, BLOCK_M, gl.SliceLayout(1, X_TILE)))
    rows = gl.where(rows >= 0, rows // top_k, -1)
    acc = weights_by_format(x, rows, records, entry, n_block * BLOCK_N, CUT, FORMATS)
    if bias is not None:
        row = n_block * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, acc.type.layout))
        acc = add_bias(acc, bias, slot, row, CUT.rows)
    value = activate_block(acc, ACTIVATION)
    if ACTIVATION.gated:
        OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, gl.num_warps()], [0, 1])
        store_rows(h, value, places, n_block * (BLOCK_N // 2), CUT.rows // 2, OUT)
    else:
        store_block(h, value, places, n_block * BLOCK_N, CUT.rows)


@gluon.jit
def down_warpgroup_kernel(h, records, block_info, block_pair, y,
                          CUT: gl.constexpr, FORMATS: gl.constexpr,
                          PDL: gl.constexpr):  # fmt: skip
    HIDDEN: gl.constexpr = CUT.rows
    BLOCK_N: gl.constexpr = CUT.block_n
    BLOCK_M: gl.constexpr = CUT.block_m
    X_TILE: gl.constexpr = tokens_layout(CUT.part, gl.num_warps())
    block, n_block = gl.program_id(1), gl.program_id(2) * CUT.group_n + gl.program_id(0)
    if n_block >= HIDDEN // BLOCK_N:
        return
    slot = gl.load(block_info + block * 4)
    entry = gl.load(block_info + block * 4 + 2)
    places = block_pair + block * BLOCK_M
    rows = gl.load(places + gl.arange(0, BLOCK_M, gl.SliceLayout(1, X_TILE)))
    wait_for_previous(PDL)
    if slot < 0:
        return
    acc = weights_by_format(h, rows, records, entry, n_block * BLOCK_N, CUT, FORMATS)
    store_block(y, acc, places, n_block * BLOCK_N, HIDDEN)


def fused_experts_warpgroup(
    x: torch.Tensor,
    layer: TiledLayer,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    config: WarpgroupConfig,
    pdl: bool = False,
) -> torch.Tensor:
    """As `fused_experts_prefill`, on compute capability 9.0; H and I must be multiples of 64."""
    cut13, cut2 = cuts(config, *sizes_of(x, layer, topk_ids))
    gate_up, down = (gate_up_warpgroup_kernel, cut13, {}), (down_warpgroup_kernel, cut2, {})
    return launch_prefill(x, layer, topk_weights, topk_ids, config, pdl, gate_up, down)
