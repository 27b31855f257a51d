"""The experts for one token: two launches, in which nobody waits for a table.

Whom a program works for follows from topk_ids alone, so there is no routing, and every program
takes the digits of what it multiplies for itself: between the launches act(gate) * up is what
plain torch has, a row of 16-bit numbers for each expert. That leaves the cut free: rows of a
program are any multiple of 16, so that programs fill the multiprocessors evenly, and warps of a
program may share the columns of a row. Programs of `down` load their first weights before `gate_up`
has ended, and the last of them for a block of rows adds up the experts. The products are those of
`warp`.
"""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.experimental import gluon

from mcmoe_kernels.gpu import warp
from mcmoe_kernels.gpu.choice import SingleConfig
from mcmoe_kernels.gpu.common import (
    add_weighted_bias,
    by_format,
    digit_buffers,
    dtype_of,
    is_ragged,
    launch_options,
    of_gate,
    of_up,
    steps_of,
)
from mcmoe_kernels.gpu.digits import load_token
from mcmoe_kernels.gpu.routing import expert_of_pair, is_pruned, pdl_options, wait_for_previous
from mcmoe_kernels.gpu.threads import threads
from mcmoe_kernels.gpu.tiled import TiledLayer
from mcmoe_kernels.gpu.warp import (
    Cut,
    add_bias_once,
    add_parts,
    dot_planes,
    place_of_warp,
    steps_of_warp,
    zeros_of,
)


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
    """For each of the token's experts whether it is computed, its weight and its slot."""
    routed = ()
    largest = 0.0
    for pair in tl.static_range(TOP_K):
        expert, weight = tl.load(ids + pair), tl.load(topk_weights + pair).to(tl.float32)
        routed += ((expert, weight),)
        largest = tl.maximum(largest, tl.where(expert >= 0, weight, 0.0))
    found = ()
    for pair in tl.static_range(TOP_K):
        expert, weight = routed[pair]
        slot = tl.load(lookup + tl.maximum(expert, 0) * 4)
        computed = (expert >= 0) & (slot >= 0)
        if PRUNED_TOP_K:
            computed = computed & (is_pruned(weight, largest, ratio) == 0)
        found += ((computed, weight, slot),)
    return found


@triton.jit
def ended_last(ended, index, PROGRAMS: tl.constexpr):
    """Whether all other PROGRAMS that count in ended[index] have been here before; then what they
    wrote is visible. Every thread of this one must have written before."""
    return tl.atomic_add(ended + index, 1, sem="acq_rel") == PROGRAMS - 1


@triton.jit
def combine(parts, bias, weights, out, row, inside, HIDDEN: tl.constexpr, SPLITS: tl.constexpr):
    """out[row] = sum of one token's experts. weights: from `weights_of_token`."""
    total = (row * 0).to(tl.float32)
    for pair in tl.static_range(len(weights)):
        total = add_weighted_bias(total, bias, weights[pair], row, inside, HIDDEN)
    for pair in tl.static_range(len(weights)):
        computed, weight, _ = weights[pair]
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


def cuts(
    config: SingleConfig,
    rows13: int,
    hidden_size: int,
    intermediate_size: int,
    group_sizes: tuple[int, int],
    dtype: tl.dtype,
    pdl: bool,
    inline: bool = True,
) -> tuple[Cut, Cut]:
    """What the products of a configuration are compiled for: w13, w2. group_sizes: theirs."""
    cut13, cut2 = warp.cuts(
        config, rows13, hidden_size, intermediate_size, group_sizes, group_sizes[1], pdl, inline
    )
    share = cut2.per_split * 256  # columns that are not there have digits of zero
    ragged = is_ragged(share, 1, config.parts2, cut2.ahead)
    return (
        replace(cut13, dtype=dtype),
        replace(cut2, dtype=dtype, digit_columns=share, ragged=ragged),
    )


@gluon.jit(do_not_specialize=["ratio"])
def gate_up_single_kernel(x, digits, x_meta, records, bias, ids, lookup, topk_weights, ratio,
                          counts, ended, h, CUT: tl.constexpr, FORMATS: tl.constexpr,
                          ACTIVATION: tl.constexpr, TOP_K: tl.constexpr,
                          PRUNED_TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
                          ENDED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BLOCK_N rows of w13, TILES * 16 a warp -> h [TOP_K, INTERMEDIATE], what w2 multiplies.
    digits, x_meta: for each program its own."""
    HIDDEN: tl.constexpr = CUT.columns
    INTERMEDIATE: tl.constexpr = CUT.rows // ACTIVATION.rows
    TILES: tl.constexpr = CUT.tiles
    WARPS: tl.constexpr = CUT.warps
    own_steps = steps_of_warp(CUT.per_part, CUT)
    pair = tl.program_id(1)
    program = pair * tl.num_programs(0) + tl.program_id(0)
    thread = threads(WARPS, CUT.inline)
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
    first_row = tl.program_id(0) * CUT.block_n
    place = place_of_warp(thread, first_row, CUT.per_split, CUT)
    tensors = (
        thread, place, token, None, digits + program * (2 * HIDDEN),
        x_meta + program * (2 * (HIDDEN // CUT.x_block)), thread * 0, thread * 0, records, entry,
        first_row, entry * 0, own_steps, HIDDEN,
    )  # fmt: skip
    acc = by_format(zeros_of(thread, TILES), entry, dot_planes, tensors, CUT, FORMATS)
    # A tile of 16 rows is 8 of gate, then 8 of up, both a thread's own, or 16 columns of h.
    first, begin, end = place
    row = first_row // 64 * 64 + first
    gives = (thread % 4 == 0) & (begin == 0) & (end > 0)
    if bias is not None:
        at = bias + tl.load(lookup + expert * 4) * CUT.rows + row + thread % 32 // 4
        acc = add_bias_once(acc, at, (begin == 0) & (end > 0), CUT)
    at = h + pair * INTERMEDIATE + row // ACTIVATION.rows + thread % 32 // 4
    for tile in tl.static_range(TILES):
        sum0, sum1 = acc[tile]
        value = of_gate(add_parts(sum0, CUT), ACTIVATION)
        if ACTIVATION.gated:
            value = value * of_up(add_parts(sum1, CUT), ACTIVATION)
            tl.store(at + tile * 8, value.to(h.dtype.element_ty), mask=gives)
        else:
            tl.store(at + tile * 16, value.to(h.dtype.element_ty), mask=gives)
            value = of_gate(add_parts(sum1, CUT), ACTIVATION)
            tl.store(at + tile * 16 + 8, value.to(h.dtype.element_ty), mask=gives)


@gluon.jit(do_not_specialize=["ratio"])
def down_single_kernel(h, digits, h_meta, records, bias, ids, lookup, topk_weights, ratio, parts,
                       ended, out, CUT: tl.constexpr, FORMATS: tl.constexpr, TOP_K: tl.constexpr,
                       PRUNED_TOP_K: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BLOCK_N rows of w2 over one of SPLITS parts of the columns. digits, h_meta: as above."""
    HIDDEN: tl.constexpr = CUT.rows
    INTERMEDIATE: tl.constexpr = CUT.columns
    SPLITS: tl.constexpr = CUT.splits
    PER_SPLIT: tl.constexpr = CUT.per_split
    BLOCK_N: tl.constexpr = CUT.block_n
    TILES: tl.constexpr = CUT.tiles
    WARPS: tl.constexpr = CUT.warps
    own_steps = steps_of_warp(CUT.per_part, CUT)
    pair = tl.program_id(1)
    program = pair * tl.num_programs(0) + tl.program_id(0)
    split = tl.program_id(0) % SPLITS
    first_row = tl.program_id(0) // SPLITS * BLOCK_N
    thread = threads(WARPS, CUT.inline)
    expert = expert_of_pair(ids, topk_weights, ratio, pair, True, PRUNED_TOP_K)
    entry = tl.load(lookup + expert * 4 + 2, mask=expert >= 0, other=0)
    # What adding up needs is here before the sums are.
    weights = weights_of_token(ids, lookup, topk_weights, ratio, TOP_K, PRUNED_TOP_K)
    if entry == 0:
        wait_for_previous(PDL)
    else:
        first_step = split * PER_SPLIT
        steps = tl.minimum(PER_SPLIT, steps_of(INTERMEDIATE, 1) - first_step)
        place = place_of_warp(thread, first_row, steps, CUT)
        tensors = (
            thread, place, None, h + pair * INTERMEDIATE + first_step * 256,
            digits + program * (2 * CUT.digit_columns),
            h_meta + program * (2 * (CUT.digit_columns // CUT.x_block)), thread * 0, thread * 0,
            records, entry, first_row, first_step, own_steps, INTERMEDIATE - first_step * 256,
        )  # fmt: skip
        acc = by_format(zeros_of(thread, TILES), entry, dot_planes, tensors, CUT, FORMATS)
        first, begin, end = place
        row = first_row // 64 * 64 + first + thread % 32 // 4
        gives = (thread % 4 == 0) & (begin == 0) & (first - first_row % 64 < BLOCK_N)
        at = parts + (split * TOP_K + pair) * HIDDEN + row
        for tile in tl.static_range(TILES):
            sum0, sum1 = acc[tile]
            tl.store(at + tile * 16, add_parts(sum0, CUT), mask=gives)
            tl.store(at + tile * 16 + 8, add_parts(sum1, CUT), mask=gives)
    tl.debug_barrier()
    if ended_last(ended, first_row // BLOCK_N, SPLITS * TOP_K):
        for first_of in tl.static_range(0, BLOCK_N, 32 * WARPS):
            here = first_of + thread
            combine(parts, bias, weights, out, first_row + here, here < BLOCK_N, HIDDEN, SPLITS)


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
    grid13 = (w13.rows // config.block_n13, top_k)
    grid2 = (row_blocks * config.splits, top_k)
    cut13, cut2 = cuts(config, *layer.sizes, dtype_of(x), pdl, inline)
    x_digits, x_meta = digit_buffers(x, math.prod(grid13), hidden, cut13.x_block)
    h_digits, h_meta = digit_buffers(x, math.prod(grid2), cut2.digit_columns, cut2.x_block)
    h = x.new_empty((top_k, inter))
    parts = x.new_empty((config.splits, top_k, hidden), dtype=torch.float32)
    ended = x.new_empty(row_blocks, dtype=torch.int32)
    out = torch.empty_like(x)
    pruned = prune_ratio > 0 or counts is not None
    common = {"TOP_K": top_k, "PRUNED_TOP_K": top_k if pruned else 0, **pdl_options(pdl)}
    routes = (topk_ids, layer.lookup, topk_weights, prune_ratio)
    options13, options2 = launch_options(config)
    gate_up, down = GPU_KERNELS if inline else INTERPRETED_KERNELS
    gate_up[grid13](
        x, x_digits, x_meta, w13.records, w13.bias, *routes, counts, ended, h,
        CUT=cut13, FORMATS=w13.formats, ACTIVATION=layer.activation, ENDED=row_blocks,
        EXPERTS=len(layer.lookup), **options13, **common,
    )  # fmt: skip
    down[grid2](
        h, h_digits, h_meta, w2.records, w2.bias, *routes, parts, ended, out,
        CUT=cut2, FORMATS=w2.formats, **options2, **common,
    )  # fmt: skip
    return out
