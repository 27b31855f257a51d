"""The experts for one token: two launches, in which nobody waits for a table.

Whom a program works for follows from topk_ids alone, so there is no routing, and every program
takes the digits of what it multiplies for itself: between the launches act(gate) * up is what
plain torch has, a row of 16-bit numbers for each expert. That leaves the cut free: rows of a
program are any multiple of 16, so that programs fill the multiprocessors evenly, and warps of a
program may share the columns of a row. Programs of `down` load their first weights before `gate_up`
has ended, and the last of them for a block of rows adds up the experts. The products are those of
`experts_warp`.
"""

import math

import torch
import triton
import triton.language as tl
from triton.experimental import gluon

from mcmoe_kernels.gpu.choice import SingleConfig
from mcmoe_kernels.gpu.common import activate, dtype_of, is_ragged, register_limits, steps_of
from mcmoe_kernels.gpu.digits import load_token
from mcmoe_kernels.gpu.routing import expert_of_pair, pdl_options, wait_for_previous
from mcmoe_kernels.gpu.threads import threads
from mcmoe_kernels.gpu.tiled import TiledLayer
from mcmoe_kernels.gpu.warp import add_parts, dot_any_width, place_of_warp, steps_of_warp


@triton.jit
def load_entries(thread, lookup, EXPERTS: tl.constexpr, WARPS: tl.constexpr):
    """All experts' entries in the table of w13, int32 [threads] in turn: they are here when ids
    are, where the one that is meant would be a cache miss behind them."""
    entries = ()
    for first in tl.static_range(0, EXPERTS, 32 * WARPS):
        expert = first + thread
        entries += (tl.load(lookup + expert * 4 + 1, mask=expert < EXPERTS, other=0),)
    return entries


@triton.jit
def entry_of_expert(thread, entries, expert, WARPS: tl.constexpr):
    """The entry of an expert, 0 if nothing is to be computed: -1, or one that is not here."""
    mine = thread * 0
    for i in tl.static_range(len(entries)):
        mine += tl.where(thread + i * (32 * WARPS) == expert, entries[i], 0)
    return tl.sum(mine)


@triton.jit
def weights_of_token(ids, lookup, topk_weights, ratio, TOP_K: tl.constexpr,
                     PRUNED_TOP_K: tl.constexpr):  # fmt: skip
    """For each of the token's experts whether it is computed, and its weight."""
    routed = ()
    largest = 0.0
    for pair in tl.static_range(TOP_K):
        expert, weight = tl.load(ids + pair), tl.load(topk_weights + pair).to(tl.float32)
        routed += ((expert, weight),)
        largest = tl.maximum(largest, tl.where(expert >= 0, weight, 0.0))
    found = ()
    for pair in tl.static_range(TOP_K):
        expert, weight = routed[pair]
        computed = (expert >= 0) & (tl.load(lookup + tl.maximum(expert, 0) * 4) >= 0)
        if PRUNED_TOP_K:
            computed = computed & ((weight < largest * ratio) == 0)
        found += ((computed, weight),)
    return found


@triton.jit
def ended_last(ended, index, PROGRAMS: tl.constexpr):
    """Whether all other PROGRAMS that count in ended[index] have been here before; then what they
    wrote is visible. Every thread of this one must have written before."""
    return tl.atomic_add(ended + index, 1, sem="acq_rel") == PROGRAMS - 1


@triton.jit
def combine(parts, weights, out, row, inside, HIDDEN: tl.constexpr, SPLITS: tl.constexpr):
    """out[row] = sum of one token's experts. weights: from `weights_of_token`."""
    total = (row * 0).to(tl.float32)
    for pair in tl.static_range(len(weights)):
        computed, weight = weights[pair]
        value = (row * 0).to(tl.float32)
        for split in tl.static_range(SPLITS):
            # From the L2 cache: what another multiprocessor wrote is not in this one's own.
            value += tl.load(
                parts + (split * len(weights) + pair) * HIDDEN + row,
                mask=inside & (row * 0 + computed.to(tl.int32) > 0), other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
        total += tl.where(computed, weight, 0.0) * value
    tl.store(out + row, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def begin_token(thread, ids, topk_weights, ratio, counts, ended, TOP_K: tl.constexpr,
                PRUNED_TOP_K: tl.constexpr, ENDED: tl.constexpr, WARPS: tl.constexpr):  # fmt: skip
    """What is done once: no program of `down` has ended; and counts += the token's pairs."""
    for first in tl.static_range(0, ENDED, 32 * WARPS):
        tl.store(ended + first + thread, 0, mask=first + thread < ENDED)
    if counts is not None:
        routed, dropped = 0, 0
        for pair in tl.static_range(TOP_K):
            given = (tl.load(ids + pair) >= 0).to(tl.int32)
            expert = expert_of_pair(ids, topk_weights, ratio, pair, True, PRUNED_TOP_K)
            routed += given
            dropped += given * (expert < 0).to(tl.int32)
        tl.atomic_add(counts, routed.to(tl.int64), sem="relaxed")
        tl.atomic_add(counts + 1, dropped.to(tl.int64), sem="relaxed")


@gluon.jit(do_not_specialize=["ratio"])
def gate_up_single_kernel(x, digits, x_meta, records, ids, lookup, topk_weights, ratio, counts,
                          ended, h,
                          HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
                          GROUP_SIZE: tl.constexpr, WIDTHS: tl.constexpr,
                          ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr,
                          TILES: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
                          TOP_K: tl.constexpr, PRUNED_TOP_K: tl.constexpr,
                          EXPERTS: tl.constexpr, ENDED: tl.constexpr, WARPS: tl.constexpr,
                          PDL: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    """BLOCK_N rows of w13, TILES * 16 a warp -> h [TOP_K, INTERMEDIATE], act(gate) * up. digits,
    x_meta: for each program its own."""
    STEPS: tl.constexpr = steps_of(HIDDEN, 1)
    PER_PART: tl.constexpr = steps_of(256 * STEPS, PARTS)
    AHEAD: tl.constexpr = min(STAGES, PER_PART)
    RAGGED: tl.constexpr = is_ragged(HIDDEN, 1, PARTS, AHEAD)
    own_steps = steps_of_warp(PER_PART, BLOCK_N, TILES, PARTS, WARPS, INLINE)
    pair = tl.program_id(1)
    program = pair * tl.num_programs(0) + tl.program_id(0)
    thread = threads(WARPS, INLINE)
    entries = load_entries(thread, lookup, EXPERTS, WARPS)
    wait_for_previous(PDL)
    token = load_token(thread, x, HIDDEN, HIDDEN, WARPS)
    expert = expert_of_pair(ids, topk_weights, ratio, pair, True, PRUNED_TOP_K)
    entry = entry_of_expert(thread, entries, expert, WARPS)
    if program == 0:
        begin_token(
            thread, ids, topk_weights, ratio, counts, ended, TOP_K, PRUNED_TOP_K, ENDED, WARPS
        )
    if entry == 0:
        return
    first_row = tl.program_id(0) * BLOCK_N
    place = place_of_warp(thread, first_row, STEPS, STEPS, BLOCK_N, TILES, PARTS, WARPS)
    acc = dot_any_width(
        thread, place, token, None, digits + program * (2 * HIDDEN),
        x_meta + program * (2 * (HIDDEN // GROUP_SIZE)), thread * 0, thread * 0, records, entry,
        first_row, entry * 0, own_steps, HIDDEN, 2 * INTERMEDIATE, HIDDEN, GROUP_SIZE, GROUP_SIZE,
        WIDTHS, TILES, WARPS, AHEAD, RAGGED, False, DTYPE, INLINE,
    )  # fmt: skip
    # A tile of 16 rows is 8 of gate, then 8 of up: both are a thread's own.
    first, begin, end = place
    row = first_row // 64 * 64 + first
    gives = (thread % 4 == 0) & (begin == 0) & (end > 0)
    at = h + pair * INTERMEDIATE + row // 2 + thread % 32 // 4
    for tile in tl.static_range(TILES):
        gate, up = acc[tile]
        gate, up = add_parts(gate, PARTS, WARPS, INLINE), add_parts(up, PARTS, WARPS, INLINE)
        tl.store(at + tile * 8, (activate(gate, ACTIVATION) * up).to(DTYPE), mask=gives)


@gluon.jit(do_not_specialize=["ratio"])
def down_single_kernel(h, digits, h_meta, records, ids, lookup, topk_weights, ratio, parts, ended,
                       out,
                       HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
                       GROUP_SIZE: tl.constexpr, WIDTHS: tl.constexpr, DTYPE: tl.constexpr,
                       SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
                       PARTS: tl.constexpr, STAGES: tl.constexpr, TOP_K: tl.constexpr,
                       PRUNED_TOP_K: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
                       INLINE: tl.constexpr):  # fmt: skip
    """BLOCK_N rows of w2 over one of SPLITS parts of the columns. digits, h_meta: as above."""
    PER_SPLIT: tl.constexpr = steps_of(INTERMEDIATE, SPLITS)
    PER_PART: tl.constexpr = steps_of(256 * PER_SPLIT, PARTS)
    AHEAD: tl.constexpr = min(STAGES, PER_PART)
    COLUMNS: tl.constexpr = PER_SPLIT * 256  # those that are not there have digits of zero
    RAGGED: tl.constexpr = is_ragged(COLUMNS, 1, PARTS, AHEAD)
    own_steps = steps_of_warp(PER_PART, BLOCK_N, TILES, PARTS, WARPS, INLINE)
    pair = tl.program_id(1)
    program = pair * tl.num_programs(0) + tl.program_id(0)
    split = tl.program_id(0) % SPLITS
    first_row = tl.program_id(0) // SPLITS * BLOCK_N
    thread = threads(WARPS, INLINE)
    expert = expert_of_pair(ids, topk_weights, ratio, pair, True, PRUNED_TOP_K)
    entry = tl.load(lookup + expert * 4 + 2, mask=expert >= 0, other=0)
    # What adding up needs is here before the sums are.
    weights = weights_of_token(ids, lookup, topk_weights, ratio, TOP_K, PRUNED_TOP_K)
    if entry == 0:
        wait_for_previous(PDL)
    else:
        first_step = split * PER_SPLIT
        steps = tl.minimum(PER_SPLIT, steps_of(INTERMEDIATE, 1) - first_step)
        place = place_of_warp(thread, first_row, steps, PER_SPLIT, BLOCK_N, TILES, PARTS, WARPS)
        acc = dot_any_width(
            thread, place, None, h + pair * INTERMEDIATE + first_step * 256,
            digits + program * (2 * COLUMNS), h_meta + program * (2 * (COLUMNS // GROUP_SIZE)),
            thread * 0, thread * 0, records, entry, first_row, first_step, own_steps,
            INTERMEDIATE - first_step * 256, HIDDEN, COLUMNS, GROUP_SIZE, GROUP_SIZE, WIDTHS, TILES,
            WARPS, AHEAD, RAGGED, PDL, DTYPE, INLINE,
        )  # fmt: skip
        first, begin, end = place
        row = first_row // 64 * 64 + first + thread % 32 // 4
        gives = (thread % 4 == 0) & (begin == 0) & (first - first_row % 64 < BLOCK_N)
        at = parts + (split * TOP_K + pair) * HIDDEN + row
        for tile in tl.static_range(TILES):
            sum0, sum1 = acc[tile]
            tl.store(at + tile * 16, add_parts(sum0, PARTS, WARPS, INLINE), mask=gives)
            tl.store(at + tile * 16 + 8, add_parts(sum1, PARTS, WARPS, INLINE), mask=gives)
    tl.debug_barrier()
    if ended_last(ended, first_row // BLOCK_N, SPLITS * TOP_K):
        for first_of in tl.static_range(0, BLOCK_N, 32 * WARPS):
            here = first_of + thread
            combine(parts, weights, out, first_row + here, here < BLOCK_N, HIDDEN, SPLITS)


GPU_KERNELS = (gate_up_single_kernel, down_single_kernel)


INTERPRETED_KERNELS = tuple(triton.jit(kernel.fn) for kernel in GPU_KERNELS)


def fused_experts_single(
    x: torch.Tensor,
    layer: TiledLayer,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    config: SingleConfig,
    prune_ratio: float = 0.0,
    counts: torch.Tensor | None = None,
    inline: bool = True,
    pdl: bool = False,
) -> torch.Tensor:
    """As `fused_experts_decode`, for x [1, H]."""
    hidden, inter, top_k = layer.hidden_size, layer.intermediate_size, topk_ids.shape[1]
    w13, w2 = layer.w13, layer.w2
    row_blocks = hidden // config.block_n2
    grid13 = (2 * inter // config.block_n13, top_k)
    grid2 = (row_blocks * config.splits, top_k)
    share = steps_of(inter, config.splits) * 256  # columns of a program of `down`
    programs13, programs2 = math.prod(grid13), math.prod(grid2)
    digits, x_meta, h, h_digits, h_meta, parts, ended = (
        x.new_empty(shape, dtype=dtype)
        for shape, dtype in (
            ((programs13, 2, hidden), torch.int8),
            ((programs13, hidden // w13.group_size, 2), torch.float32),
            ((top_k, inter), x.dtype),
            ((programs2, 2, share), torch.int8),
            ((programs2, share // w2.group_size, 2), torch.float32),
            ((config.splits, top_k, hidden), torch.float32),
            (row_blocks, torch.int32),
        )
    )
    out = torch.empty_like(x)
    pruned = prune_ratio > 0 or counts is not None
    common = {
        "HIDDEN": hidden, "INTERMEDIATE": inter, "DTYPE": dtype_of(x), "TOP_K": top_k,
        "INLINE": inline, "PRUNED_TOP_K": top_k if pruned else 0, **pdl_options(pdl),
    }  # fmt: skip
    routes = (topk_ids, layer.lookup, topk_weights, prune_ratio)
    limit13, limit2 = register_limits(config)
    gate_up, down = GPU_KERNELS if inline else INTERPRETED_KERNELS
    gate_up[grid13](
        x, digits, x_meta, w13.records, *routes, counts, ended, h,
        GROUP_SIZE=w13.group_size, WIDTHS=w13.widths, ACTIVATION=layer.activation,
        BLOCK_N=config.block_n13, TILES=config.tiles13, PARTS=config.parts13,
        STAGES=config.stages13, ENDED=row_blocks, EXPERTS=len(layer.lookup),
        WARPS=config.warps13, num_warps=config.warps13, **limit13, **common,
    )  # fmt: skip
    down[grid2](
        h, h_digits, h_meta, w2.records, *routes, parts, ended, out,
        GROUP_SIZE=w2.group_size, WIDTHS=w2.widths, SPLITS=config.splits,
        BLOCK_N=config.block_n2, TILES=config.tiles2, PARTS=config.parts2, STAGES=config.stages2,
        WARPS=config.warps2, num_warps=config.warps2, **limit2, **common,
    )  # fmt: skip
    return out
