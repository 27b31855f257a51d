"""Which (token, expert) pairs each program computes: blocks of pairs that share an expert.

A pair is one entry of topk_ids, numbered row by row. Its slot is lookup[id, 0], -1 where nothing is
to be computed: a pruned or padding pair (id -1), a remote expert, a dropped one. Pairs of one
slot fill blocks of `block_m`; blocks come in the order of slots, hence widest expert first.

    block_info  int32 [num_blocks, 4]        the slot (-1 behind the last block), its entries in
                                             the tables of w13 and w2, and one unused number
    block_pair  int32 [num_blocks, block_m]  the pairs, -1 behind the last one

num_blocks depends on shapes alone. Few pairs find their places by comparing all of them; of many,
the order within a slot is that in which atomics arrive: it moves a pair to another column of the
same product and changes no bit of the result.
"""

import torch
import triton
import triton.language as tl

from mcmoe_kernels.gpu.tiled import TiledLayer

PAIRS_AT_ONCE = 256
ONE_PROGRAM_PAIRS = 1024  # so many are routed by one program: one launch instead of three
FEW_PAIRS = 64  # so many are compared with each other


def max_blocks(pairs: int, slots: int, block_m: int) -> int:
    """The most blocks that any routing of `pairs` pairs over `slots` slots can fill."""
    # Each slot in use has at most one block that is not full.
    full = min(pairs, slots)
    return full + (pairs - full) // block_m


def few_options(pairs: int) -> dict[str, int]:
    """What a launch of a kernel that calls `route` is given. A load of fewer elements than threads
    would be done again for rows and for columns of a comparison, by every thread many times."""
    return {"FEW": FEW_PAIRS, "num_warps": 2} if pairs <= FEW_PAIRS else {"FEW": 0, "num_warps": 4}


def slots_of_torch(topk_ids: torch.Tensor, slot_of: torch.Tensor) -> torch.Tensor:
    slots = slot_of[topk_ids.clamp(min=0).long()]
    return torch.where(topk_ids >= 0, slots, -1).to(torch.int32)


def route_torch(
    topk_ids: torch.Tensor, layer: TiledLayer, block_m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_ids [T, k] to block_info and block_pair; pairs of a slot in ascending order."""
    slots = slots_of_torch(topk_ids, layer.slot_of).flatten().cpu()
    blocks = max_blocks(slots.numel(), layer.num_slots, block_m)
    block_info = torch.full((blocks, 4), -1, dtype=torch.int32)
    block_pair = torch.full((blocks, block_m), -1, dtype=torch.int32)
    at = 0
    for slot in range(layer.num_slots):
        members = (slots == slot).nonzero().flatten().to(torch.int32)
        for first in range(0, len(members), block_m):
            entries = (int(layer.w13.table[slot]), int(layer.w2.table[slot]))
            block_info[at, :3] = torch.tensor([slot, *entries], dtype=torch.int32)
            block_pair[at, : len(members) - first] = members[first : first + block_m]
            at += 1
    return block_info.to(topk_ids.device), block_pair.to(topk_ids.device)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """With programmatic dependent launch (sm_90): this grid may start before the previous ends.

    From here on the previous grid's results are visible, and the next grid may start in turn. Those
    of grids before it are visible from the beginning: it let this one start when it had waited.
    Programs may return without waiting only if others of their grid do wait.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_lookup(lookup, EXPERTS: tl.constexpr, INLINE: tl.constexpr):
    """Bring the table into the L2 cache while ids are on their way: a cache miss less behind them.
    For one program of a grid; many that do it wait for each other."""
    if INLINE:
        for first in tl.static_range(0, EXPERTS, 128):  # a sector holds two experts
            expert = tl.minimum(first + tl.arange(0, 64) * 2, EXPERTS - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lookup + expert * 4],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def is_pruned(weight, largest, ratio):
    """Whether a pair is dropped: the rule of `mcmoe_kernels.pruning`, wherever it is applied."""
    return weight < largest * ratio


@triton.jit
def load_entry(block_info, block, ENTRY: tl.constexpr):
    """A block's entry in the table of w13 (ENTRY 1) or w2 (2), 0 behind the last block."""
    slot = tl.load(block_info + block * 4)
    return tl.where(slot >= 0, tl.load(block_info + block * 4 + ENTRY), 0)


@triton.jit
def load_pairs(block_pair, block, BLOCK_M: tl.constexpr):
    """The pairs int32 [2 * BLOCK_M] of a block, each twice."""
    return tl.load(block_pair + block * BLOCK_M + tl.arange(0, 2 * BLOCK_M) // 2)


@triton.jit
def expert_of_pair(ids, topk_weights, ratio, pair, inside, PRUNED_TOP_K: tl.constexpr):
    """The id of a pair; with PRUNED_TOP_K, the experts of a token, -1 also where its weight is
    below `ratio` times the token's largest (`pruning`)."""
    expert = tl.load(ids + pair, mask=inside, other=-1)
    if PRUNED_TOP_K:
        first = pair // PRUNED_TOP_K * PRUNED_TOP_K
        weight = tl.load(topk_weights + pair, mask=inside, other=0.0).to(tl.float32)
        largest = (expert * 0).to(tl.float32)
        for j in tl.static_range(PRUNED_TOP_K):
            other = tl.load(topk_weights + first + j, mask=inside, other=0.0).to(tl.float32)
            valid = tl.load(ids + first + j, mask=inside, other=-1) >= 0
            largest = tl.maximum(largest, tl.where(valid, other, 0.0))
        expert = tl.where(is_pruned(weight, largest, ratio), -1, expert)
    return expert


@triton.jit
def slot_of_pair(ids, lookup, topk_weights, ratio, pair, inside, PRUNED_TOP_K: tl.constexpr):
    expert = expert_of_pair(ids, topk_weights, ratio, pair, inside, PRUNED_TOP_K)
    return tl.load(lookup + expert * 4, mask=inside & (expert >= 0), other=-1)


@triton.jit
def add_pair_counts(counts, ids, expert, pair, inside):
    """counts int64 [2] += the pairs that are routed, and those of them that `expert` drops."""
    if counts is not None:
        routed = tl.load(ids + pair, mask=inside, other=-1) >= 0
        dropped = routed & (expert < 0)
        tl.atomic_add(counts, tl.sum(routed.to(tl.int32)).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts + 1, tl.sum(dropped.to(tl.int32)).to(tl.int64), sem="relaxed")


@triton.jit
def keep_pair(ids, lookup, topk_weights, ratio, kept_ids, counts, pair, inside,
              PRUNED_TOP_K: tl.constexpr):  # fmt: skip
    """The slot of each pair and its entries in the tables of w13 and w2; where pairs are pruned,
    what is left goes into kept_ids and its number into counts."""
    expert = expert_of_pair(ids, topk_weights, ratio, pair, inside, PRUNED_TOP_K)
    if PRUNED_TOP_K:
        tl.store(kept_ids + pair, expert, mask=inside)
        add_pair_counts(counts, ids, expert, pair, inside)
    at, inside = lookup + expert * 4, inside & (expert >= 0)
    slot = tl.load(at, mask=inside, other=-1)
    return slot, tl.load(at + 1, mask=inside, other=0), tl.load(at + 2, mask=inside, other=0)


@triton.jit
def clear_blocks(block_info, block_pair, blocks, begin, stride, BLOCK_M: tl.constexpr,
                 CHUNK: tl.constexpr):  # fmt: skip
    """Fill with -1, from chunk `begin` on, every `stride`-th chunk."""
    for first in tl.range(begin * CHUNK, blocks * 4, stride * CHUNK):
        at = first + tl.arange(0, CHUNK)
        tl.store(block_info + at, -1, mask=at < blocks * 4)
    for first in tl.range(begin * CHUNK, blocks * BLOCK_M, stride * CHUNK):
        at = first + tl.arange(0, CHUNK)
        tl.store(block_pair + at, -1, mask=at < blocks * BLOCK_M)


@triton.jit
def count_pairs(ids, lookup, topk_weights, ratio, count, rank, pairs, begin, stride,
                PRUNED_TOP_K: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Count the pairs of each slot and note each pair's place among them."""
    for first in tl.range(begin * CHUNK, pairs, stride * CHUNK):
        pair = first + tl.arange(0, CHUNK)
        slot = slot_of_pair(ids, lookup, topk_weights, ratio, pair, pair < pairs, PRUNED_TOP_K)
        place = tl.atomic_add(count + slot, 1, mask=slot >= 0, sem="relaxed")
        tl.store(rank + pair, place, mask=pair < pairs)


@triton.jit
def note_pair(block_info, block_pair, slot, entry13, entry2, pair, block, place,
              BLOCK_M: tl.constexpr):  # fmt: skip
    """Write each pair at its place in its block, and the first ones their block's slot and
    entries. Pairs whose slot is -1 are left out."""
    tl.store(block_pair + block * BLOCK_M + place, pair, mask=slot >= 0)
    first = (slot >= 0) & (place == 0)
    tl.store(block_info + block * 4, slot, mask=first)
    tl.store(block_info + block * 4 + 1, entry13, mask=first)
    tl.store(block_info + block * 4 + 2, entry2, mask=first)


@triton.jit
def place_pairs(ids, lookup, topk_weights, ratio, kept_ids, counts, count, rank, first_block,
                block_info, block_pair, pairs, begin, stride, PRUNED_TOP_K: tl.constexpr,
                SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Write each pair into its block. first_block: scratch int32 [SLOTS] of this program."""
    slots = tl.arange(0, SLOTS)
    blocks = (tl.load(count + slots) + BLOCK_M - 1) // BLOCK_M
    tl.store(first_block + slots, tl.cumsum(blocks, 0) - blocks)
    tl.debug_barrier()
    for first in tl.range(begin * CHUNK, pairs, stride * CHUNK):
        pair = first + tl.arange(0, CHUNK)
        inside = pair < pairs
        slot, entry13, entry2 = keep_pair(
            ids, lookup, topk_weights, ratio, kept_ids, counts, pair, inside, PRUNED_TOP_K
        )
        place = tl.load(rank + pair, mask=pair < pairs, other=0)
        block = tl.load(first_block + slot, mask=slot >= 0, other=0) + place // BLOCK_M
        note_pair(
            block_info, block_pair, slot, entry13, entry2, pair, block, place % BLOCK_M, BLOCK_M
        )  # fmt: skip


@triton.jit
def compare_pairs(ids, lookup, topk_weights, ratio, kept_ids, counts, block_info, block_pair,
                  pairs, blocks, PRUNED_TOP_K: tl.constexpr, PAIRS: tl.constexpr,
                  BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """The whole table from comparing up to PAIRS pairs with each other: no memory between steps."""
    pair = tl.arange(0, PAIRS)
    inside = pair < pairs
    slot, entry13, entry2 = keep_pair(
        ids, lookup, topk_weights, ratio, kept_ids, counts, pair, inside, PRUNED_TOP_K
    )
    # While what was just asked for is on its way.
    clear_blocks(block_info, block_pair, blocks, 0, 1, BLOCK_M, CHUNK)
    tl.debug_barrier()
    before = (slot[None, :] == slot[:, None]) & (pair[None, :] < pair[:, None])
    rank = tl.sum(before.to(tl.int32), 1)
    place = rank % BLOCK_M
    first = (slot >= 0) & (place == 0)
    lower = (slot[None, :] < slot[:, None]) & first[None, :]
    block = tl.sum(lower.to(tl.int32), 1) + rank // BLOCK_M
    note_pair(block_info, block_pair, slot, entry13, entry2, pair, block, place, BLOCK_M)


@triton.jit
def route(ids, lookup, topk_weights, ratio, kept_ids, counts, scratch, block_info, block_pair,
          pairs, blocks, PRUNED_TOP_K: tl.constexpr, SLOTS: tl.constexpr, FEW: tl.constexpr,
          BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """The whole table in one program, in kept_ids what pruning leaves, in counts how many.

    FEW: at least `pairs`, or 0 for any number. scratch: int32 [2 * SLOTS + pairs], unused by few.
    """
    if FEW:
        compare_pairs(
            ids, lookup, topk_weights, ratio, kept_ids, counts, block_info, block_pair, pairs,
            blocks, PRUNED_TOP_K, FEW, BLOCK_M, CHUNK,
        )  # fmt: skip
        return
    count, first_block, rank = scratch, scratch + SLOTS, scratch + 2 * SLOTS
    tl.store(count + tl.arange(0, SLOTS), 0)
    clear_blocks(block_info, block_pair, blocks, 0, 1, BLOCK_M, CHUNK)
    tl.debug_barrier()
    count_pairs(ids, lookup, topk_weights, ratio, count, rank, pairs, 0, 1, PRUNED_TOP_K, CHUNK)
    tl.debug_barrier()
    place_pairs(
        ids, lookup, topk_weights, ratio, kept_ids, counts, count, rank, first_block, block_info,
        block_pair, pairs, 0, 1, PRUNED_TOP_K, SLOTS, BLOCK_M, CHUNK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["pairs", "blocks"])
def route_kernel(ids, lookup, scratch, block_info, block_pair, pairs, blocks,
                 SLOTS: tl.constexpr, FEW: tl.constexpr, BLOCK_M: tl.constexpr,
                 CHUNK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    wait_for_previous(PDL)
    route(
        ids, lookup, ids, 0.0, ids, None, scratch, block_info, block_pair, pairs, blocks,
        0, SLOTS, FEW, BLOCK_M, CHUNK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["blocks"])
def clear_kernel(count, block_info, block_pair, blocks, SLOTS: tl.constexpr,
                 BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    if tl.program_id(0) == 0:
        tl.store(count + tl.arange(0, SLOTS), 0)
    clear_blocks(
        block_info, block_pair, blocks, tl.program_id(0), tl.num_programs(0), BLOCK_M, CHUNK
    )


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(ids, lookup, count, rank, pairs, CHUNK: tl.constexpr):
    count_pairs(
        ids, lookup, ids, 0.0, count, rank, pairs, tl.program_id(0), tl.num_programs(0), 0, CHUNK
    )  # fmt: skip


@triton.jit(do_not_specialize=["pairs"])
def place_kernel(ids, lookup, count, rank, first_block, block_info, block_pair, pairs,
                 SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,
                 CHUNK: tl.constexpr):  # fmt: skip
    place_pairs(
        ids, lookup, ids, 0.0, ids, None, count, rank,
        first_block + tl.program_id(0) * SLOTS, block_info, block_pair, pairs, tl.program_id(0),
        tl.num_programs(0), 0, SLOTS, BLOCK_M, CHUNK,
    )  # fmt: skip


def route_pairs(
    topk_ids: torch.Tensor, layer: TiledLayer, block_m: int, pdl: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route_torch` on the device, few pairs in one launch, any number in three.

    pdl: the one launch may begin before the one before it ends.
    """
    pairs, num_slots = topk_ids.numel(), layer.num_slots
    blocks = max_blocks(pairs, num_slots, block_m)
    slots = triton.next_power_of_2(num_slots)
    block_info = topk_ids.new_empty((blocks, 4), dtype=torch.int32)
    block_pair = topk_ids.new_empty((blocks, block_m), dtype=torch.int32)
    shape = {"SLOTS": slots, "BLOCK_M": block_m, "CHUNK": PAIRS_AT_ONCE}
    if pairs <= ONE_PROGRAM_PAIRS:
        scratch = topk_ids.new_empty(2 * slots + pairs, dtype=torch.int32)
        route_kernel[(1,)](
            topk_ids, layer.lookup, scratch, block_info, block_pair, pairs, blocks,
            **few_options(pairs), **shape, **pdl_options(pdl),
        )  # fmt: skip
        return block_info, block_pair
    programs = min(128, triton.cdiv(pairs, PAIRS_AT_ONCE))
    count, rank, first_block = (
        topk_ids.new_empty(size, dtype=torch.int32) for size in (slots, pairs, (programs, slots))
    )
    clear_kernel[(programs,)](count, block_info, block_pair, blocks, **shape)
    count_kernel[(programs,)](topk_ids, layer.lookup, count, rank, pairs, CHUNK=PAIRS_AT_ONCE)
    place_kernel[(programs,)](
        topk_ids, layer.lookup, count, rank, first_block, block_info, block_pair, pairs, **shape,
    )  # fmt: skip
    return block_info, block_pair


def pdl_options(pdl: bool) -> dict[str, bool]:
    """What a launch of a kernel that calls `wait_for_previous` is given."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
