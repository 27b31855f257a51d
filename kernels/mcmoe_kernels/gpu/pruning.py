"""Experts that are not worth their time are dropped in one launch: their ids become -1.

The rule, its counts and their definitions in plain torch are in `mcmoe_kernels.pruning`.
"""

import torch
import triton
import triton.language as tl

from mcmoe_kernels.gpu.routing import add_pair_counts, is_pruned

TOKENS_AT_ONCE = 64


@triton.jit(do_not_specialize=["tokens", "top_k"])
def prune_kernel(topk_weights, ids, out, counts, ratio, tokens, top_k, BLOCK_T: tl.constexpr,
                 BLOCK_K: tl.constexpr):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    place = tl.arange(0, BLOCK_K)
    inside = (token < tokens)[:, None] & (place < top_k)[None, :]
    at = token[:, None] * top_k + place[None, :]
    expert = tl.load(ids + at, mask=inside, other=-1)
    weight = tl.load(topk_weights + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.where(expert >= 0, weight, 0.0), 1)
    kept = tl.where(is_pruned(weight, largest[:, None], ratio), -1, expert)
    tl.store(out + at, kept, mask=inside)
    add_pair_counts(counts, ids, kept, at, inside)


def prune_ids(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    ratio: float,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """topk_weights float [T, k], topk_ids int [T, k] -> new ids, -1 where a weight is below `ratio`
    times its token's largest. An id of -1 stays and is nobody's largest. counts: int64 [2], to
    which the pairs with an id and those of them that are dropped are added."""
    tokens, top_k = topk_ids.shape
    out = torch.empty_like(topk_ids)
    if tokens:
        prune_kernel[(triton.cdiv(tokens, TOKENS_AT_ONCE),)](
            topk_weights.contiguous(), topk_ids.contiguous(), out, counts, ratio, tokens, top_k,
            BLOCK_T=TOKENS_AT_ONCE, BLOCK_K=triton.next_power_of_2(top_k), num_warps=2,
        )  # fmt: skip
    return out
