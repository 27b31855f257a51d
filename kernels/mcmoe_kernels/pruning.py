"""Which of a token's routed experts are worth computing: the rule, in plain torch.

Of a token's experts, one whose weight is below `ratio` times the token's largest is dropped (Huang
et al., arXiv 2410.06270, section 3.3, for two experts a token). The largest always stays. Whatever
serves the rule must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# weights float32 [T, k], 0 where a pair is skipped -> two tensors, [T, k] and [T, 1]: a pair is
# dropped where the first is below a threshold times the second.
Measure = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def beside_largest(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The served measure: a pair's weight, and its token's largest."""
    return weights, weights.amax(dim=-1, keepdim=True)


def drop_mask(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    ratio: float,
    measure: Measure = beside_largest,
) -> torch.Tensor:
    """Which pairs are dropped: bool [T, k], from topk_weights float [T, k] and topk_ids int [T, k].

    The experts of a row may come in any order. An id of -1 is nobody's largest and is not dropped
    again. A row's mask depends on that row alone.
    """
    valid = topk_ids >= 0
    part, whole = measure(topk_weights.float().masked_fill(~valid, 0.0))
    return valid & (part < whole * ratio)


def prune(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    ratio: float,
    renormalize: bool = False,
    measure: Measure = beside_largest,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New weights and ids, -1 where an expert is dropped. Inputs as in `drop_mask`; they stay."""
    dropped = drop_mask(topk_weights, topk_ids, ratio, measure)
    ids = torch.where(dropped, torch.full_like(topk_ids, -1), topk_ids)
    if not renormalize:
        return topk_weights, ids
    valid = topk_ids >= 0
    whole = (topk_weights * valid).sum(-1, keepdim=True)
    kept = (topk_weights * (ids >= 0)).sum(-1, keepdim=True)
    return torch.where(kept > 0, topk_weights * (whole / kept), topk_weights), ids


def pair_counts(topk_ids: torch.Tensor, kept_ids: torch.Tensor) -> torch.Tensor:
    """Pairs that were routed, and those of them that were dropped: int64 [2]."""
    routed = topk_ids >= 0
    return torch.stack([routed.sum(), (routed & (kept_ids < 0)).sum()])
