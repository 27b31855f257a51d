"""The pruning kernel gives the bits of its definition."""

import pytest
import torch

pytest.importorskip("triton")

from mcmoe_kernels.gpu.pruning import prune_ids
from mcmoe_kernels.pruning import pair_counts, prune


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [0, 1, 63, 130])
def test_every_pair(tokens, top_k, device):
    torch.manual_seed(tokens)
    weights, ids = torch.rand(tokens, 16).softmax(1).topk(top_k, sorted=False)
    ids = ids.int()
    ids[torch.rand(ids.shape) < 0.2] = -1  # padding and remote experts
    weights[ids < 0] = float("nan")
    weights, ids = weights.to(device), ids.to(device)
    for ratio in (0.0, 0.5, 0.9, 1.0):
        counts = torch.full((2,), 7, dtype=torch.int64, device=device)
        pruned = prune_ids(weights, ids, ratio, counts)
        assert torch.equal(counts, 7 + pair_counts(ids, pruned))
        assert pruned.dtype == ids.dtype
        assert torch.equal(pruned, prune(weights, ids, ratio)[1])
    if tokens > 60 and top_k > 1:
        assert bool((pruned != ids).any())


def test_ties_and_thresholds_that_are_met_exactly(device):
    weights = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.3, 0.1]], device=device)
    ids = torch.tensor([[0, 1], [2, 3], [4, 5]], device=device)
    for ratio in (0.25 / 0.75, 0.1 / 0.3, 1.0):
        assert torch.equal(prune_ids(weights, ids, ratio), prune(weights, ids, ratio)[1])
