"""The experts for one token: two launches, in which nobody waits for a table.

Whom a program works for follows from topk_ids alone, so there is no routing, and every program of
`gate_up` takes the digits of x for itself. Programs of `down` load their first weights before
`gate_up` has ended, and the last of them for a block of rows adds up the experts. The products are
those of `experts_warp`.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon

from mcmoe_kernels.digits import load_token
from mcmoe_kernels.experts_decode import dtype_of, hidden_block, register_limits
from mcmoe_kernels.experts_warp import down_block, gate_up_block
from mcmoe_kernels.routing import expert_of_pair, pdl_options, wait_for_previous
from mcmoe_kernels.threads import threads
from mcmoe_kernels.tiles import TiledLayer
from mcmoe_kernels.tuning import WarpConfig


@triton.jit
def entry_of_pair(ids, lookup, topk_weights, ratio, pair, ENTRY: tl.constexpr,
                  PRUNED_TOP_K: tl.constexpr):  # fmt: skip
    """A pair's entry in the table of w13 (ENTRY 1) or w2 (2), 0 if nothing is to be computed."""
    expert = expert_of_pair(ids, topk_weights, ratio, pair, True, PRUNED_TOP_K)
    return tl.load(lookup + expert * 4 + ENTRY, mask=expert >= 0, other=0)


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
                          ended, h_digits, h_meta,
                          HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
                          GROUP_SIZE: tl.constexpr, X_BLOCK: tl.constexpr, WIDTHS: tl.constexpr,
                          ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, H_BLOCK: tl.constexpr,
                          BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TOP_K: tl.constexpr,
                          PRUNED_TOP_K: tl.constexpr, ENDED: tl.constexpr, WARPS: tl.constexpr,
                          PDL: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    """digits, x_meta: for each program its own."""
    pair = tl.program_id(1)
    program = pair * tl.num_programs(0) + tl.program_id(0)
    thread = threads(WARPS, INLINE)
    wait_for_previous(PDL)
    token = load_token(thread, x, HIDDEN, WARPS)
    entry = entry_of_pair(ids, lookup, topk_weights, ratio, pair, 1, PRUNED_TOP_K)
    if program == 0:
        begin_token(
            thread, ids, topk_weights, ratio, counts, ended, TOP_K, PRUNED_TOP_K, ENDED, WARPS
        )
    if entry == 0:
        return
    digits += program * (2 * HIDDEN)
    x_meta += program * (2 * (HIDDEN // X_BLOCK))
    gives = tl.where(thread % 4 == 0, pair, -1)
    gate_up_block(
        thread, token, digits, x_meta, tl.where(thread % 32 < 8, 0, -1), tl.minimum(gives, 0),
        gives, records, entry, tl.program_id(0) * BLOCK_N, h_digits, h_meta, HIDDEN, INTERMEDIATE,
        GROUP_SIZE, X_BLOCK, WIDTHS, ACTIVATION, DTYPE, H_BLOCK, BLOCK_N, STAGES, WARPS, INLINE,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["ratio"])
def down_single_kernel(h_digits, h_meta, records, ids, lookup, topk_weights, ratio, parts, ended,
                       out,
                       HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
                       GROUP_SIZE: tl.constexpr, X_BLOCK: tl.constexpr, WIDTHS: tl.constexpr,
                       SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
                       TOP_K: tl.constexpr, PRUNED_TOP_K: tl.constexpr, WARPS: tl.constexpr,
                       PDL: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    pair = tl.program_id(1)
    first_row = tl.program_id(0) // SPLITS * BLOCK_N
    thread = threads(WARPS, INLINE)
    entry = entry_of_pair(ids, lookup, topk_weights, ratio, pair, 2, PRUNED_TOP_K)
    # What adding up needs is here before the sums are.
    weights = weights_of_token(ids, lookup, topk_weights, ratio, TOP_K, PRUNED_TOP_K)
    if entry == 0:
        wait_for_previous(PDL)
    else:
        down_block(
            thread, h_digits, h_meta, tl.where(thread % 32 < 8, pair, -1),
            tl.where(thread % 4 == 0, pair, -1), records, entry, first_row,
            tl.program_id(0) % SPLITS, parts, TOP_K, HIDDEN, INTERMEDIATE, GROUP_SIZE, X_BLOCK,
            WIDTHS, SPLITS, BLOCK_N, STAGES, WARPS, PDL, INLINE,
        )  # fmt: skip
    tl.debug_barrier()
    if ended_last(ended, first_row // BLOCK_N, SPLITS * TOP_K):
        for first in tl.static_range(0, BLOCK_N, 32 * WARPS):
            row = first + thread
            combine(parts, weights, out, first_row + row, row < BLOCK_N, HIDDEN, SPLITS)


GPU_KERNELS = (gate_up_single_kernel, down_single_kernel)
INTERPRETED_KERNELS = tuple(triton.jit(kernel.fn) for kernel in GPU_KERNELS)


def fused_experts_single(
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
    """As `fused_experts_decode`, for x [1, H]."""
    hidden, inter, top_k = layer.hidden_size, layer.intermediate_size, topk_ids.shape[1]
    w13, w2 = layer.w13, layer.w2
    x_block, h_block = w13.group_size, hidden_block(layer, config)
    grid13 = (2 * inter // config.block_n13, top_k)
    row_blocks = hidden // config.block_n2
    programs = grid13[0] * grid13[1]
    digits, x_meta, h_digits, h_meta, parts, ended = (
        x.new_empty(shape, dtype=dtype)
        for shape, dtype in (
            ((programs, 2, hidden), torch.int8),
            ((programs, hidden // x_block, 2), torch.float32),
            ((top_k, 2, inter), torch.int8),
            ((top_k, inter // h_block, 2), torch.float32),
            ((config.splits, top_k, hidden), torch.float32),
            (row_blocks, torch.int32),
        )
    )
    out = torch.empty_like(x)
    pruned = prune_ratio > 0 or counts is not None
    common = {
        "HIDDEN": hidden, "INTERMEDIATE": inter, "TOP_K": top_k, "INLINE": inline,
        "PRUNED_TOP_K": top_k if pruned else 0, **pdl_options(pdl),
    }  # fmt: skip
    routes = (topk_ids, layer.lookup, topk_weights, prune_ratio)
    limit13, limit2 = register_limits(config)
    gate_up, down = GPU_KERNELS if inline else INTERPRETED_KERNELS
    gate_up[grid13](
        x, digits, x_meta, w13.records, *routes, counts, ended, h_digits, h_meta,
        GROUP_SIZE=w13.group_size, X_BLOCK=x_block, WIDTHS=w13.widths,
        ACTIVATION=layer.activation, DTYPE=dtype_of(x), H_BLOCK=h_block,
        BLOCK_N=config.block_n13, STAGES=config.stages13, ENDED=row_blocks,
        WARPS=config.warps13, num_warps=config.warps13, **limit13, **common,
    )  # fmt: skip
    down[(row_blocks * config.splits, top_k)](
        h_digits, h_meta, w2.records, *routes, parts, ended, out,
        GROUP_SIZE=w2.group_size, X_BLOCK=h_block, WIDTHS=w2.widths, SPLITS=config.splits,
        BLOCK_N=config.block_n2, STAGES=config.stages2,
        WARPS=config.warps2, num_warps=config.warps2, **limit2, **common,
    )  # fmt: skip
    return out
