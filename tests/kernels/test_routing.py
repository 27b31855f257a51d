"""The table of blocks against its definition, by pair and by order."""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from mcmoe_kernels.gpu import routing
from mcmoe_kernels.gpu.block import prepare_kernel
from mcmoe_kernels.gpu.experts import inline
from mcmoe_kernels.gpu.routing import few_options, max_blocks, route_pairs, route_torch
from mcmoe_kernels.gpu.tiled import tile_layer
from mcmoe_kernels.pruning import pair_counts, prune
from tests.helpers.expert_layers import random_layer, random_routing, to_device

BITS = (1, 3, 0, 2, 3, 2, 1)


def blocks_of(block_info, block_pair):
    """(slot, entries, pairs) of each block in use, pairs sorted: their order is free."""
    rows = zip(block_info[:, :3].tolist(), block_pair.tolist(), strict=True)
    return [(*info, sorted(p for p in pairs if p >= 0)) for info, pairs in rows if info[0] >= 0]


def route_in_prepare(ids, layer, block_m, weights=None, ratio=0.0, counts=None):
    """The table as the decode path makes it, pruned if there are weights. One program makes it;
    the others, one for each token, are left out here."""
    pairs = ids.numel()
    blocks = max_blocks(pairs, layer.num_slots, block_m)
    new = ids.new_empty
    block_info, block_pair = new((blocks, 4)), new((blocks, block_m))
    x = torch.zeros(len(ids), 128, dtype=torch.float16, device=ids.device)
    digits = torch.empty(len(ids), 2, 128, dtype=torch.int8, device=ids.device)
    meta = torch.empty(len(ids), 1, 2, device=ids.device)
    prepare_kernel[(1,)](
        x, digits, meta, ids, layer.lookup, ids if weights is None else weights, ratio,
        new(ids.shape), counts, new(16 + pairs), block_info, block_pair, pairs, blocks,
        COLUMNS=128, X_BLOCK=128, X_BLOCKS=1, PRUNED_TOP_K=0 if weights is None else ids.shape[1],
        EXPERTS=len(layer.lookup), SLOTS=8, BLOCK_M=block_m, PDL=False, INLINE=inline(),
        **few_options(pairs),
    )  # fmt: skip
    return block_info, block_pair


def route_many(ids, layer, block_m):
    """The table as it is made for more pairs than one program takes."""
    with mock.patch.object(routing, "ONE_PROGRAM_PAIRS", 0):
        return route_pairs(ids, layer, block_m)


@pytest.mark.parametrize("route", [route_pairs, route_many, route_in_prepare])
@pytest.mark.parametrize("block_m", [4, 32])
@pytest.mark.parametrize(
    ("tokens", "top_k", "change"),
    [
        (2, 3, "none"),
        (33, 3, "none"),
        (300, 2, "none"),  # more than one program's share
        (33, 3, "one expert"),
        (9, 3, "all pruned"),
        (65, 3, "half pruned"),
    ],
)
def test_every_pair_is_in_one_block_of_its_slot(route, block_m, tokens, top_k, change, device):
    layer = tile_layer(
        to_device(random_layer(BITS, hidden=128, intermediate=64, group_size=64), device)
    )
    _, ids = random_routing(tokens, len(BITS), top_k)
    if change == "one expert":
        ids[:] = 3
    elif change == "all pruned":
        ids[:] = -1
    elif change == "half pruned":
        ids[torch.rand(ids.shape) < 0.5] = -1
    ids = ids.to(device)
    expected, table = route_torch(ids, layer, block_m), route(ids, layer, block_m)
    if block_m >= ids.numel():
        assert blocks_of(*table) == blocks_of(*expected)
    for block in blocks_of(*table):  # equal as a set of (slot, pair), blocks full but the last
        assert 0 < len(block[3]) <= block_m
    flat = lambda t: sorted((b[0], b[1], b[2], p) for b in blocks_of(*t) for p in b[3])  # noqa: E731
    assert flat(table) == flat(expected)
    assert [b[0] for b in blocks_of(*table)] == [b[0] for b in blocks_of(*expected)]


@pytest.mark.parametrize("block_m", [1, 4, 16])
def test_no_routing_needs_more_blocks(block_m):
    for pairs, slots in ((1, 8), (7, 3), (64, 8), (65, 64)):
        most = max_blocks(pairs, slots, block_m)
        worst = [1] * min(pairs, slots)
        worst[0] += pairs - len(worst)  # all the rest on one expert
        assert sum(-(-c // block_m) for c in worst) <= most <= pairs


@pytest.mark.parametrize("tokens", [1, 300])  # compared; more pairs than are taken at once
def test_what_is_pruned_is_counted(tokens, device):
    layer = tile_layer(
        to_device(random_layer(BITS, hidden=128, intermediate=64, group_size=64), device)
    )
    weights, ids = (t.to(device) for t in random_routing(tokens, len(BITS), 3))
    ids[-1], weights[-1] = torch.tensor([-1, 0, 3]), torch.tensor([9.0, 0.5, 0.25])
    counts = torch.full((2,), 7, dtype=torch.int64, device=device)
    table = route_in_prepare(ids, layer, 4, weights, 0.6, counts)
    _, kept = prune(weights, ids, 0.6)
    assert bool((kept != ids).any())
    assert torch.equal(counts, 7 + pair_counts(ids, kept))
    pairs = [p for block in blocks_of(*table) for p in block[3]]
    assert len(pairs) == (layer.slot_of[kept.clamp(min=0).long()].ge(0) & (kept >= 0)).sum()
