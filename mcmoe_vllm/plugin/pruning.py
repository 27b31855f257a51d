"""Online pruning of one layer while vLLM runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mcmoe_kernels.pruning import prune
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin.metrics import LayerCounts
from mcmoe_vllm.pruning.table import DECODE_ONLY, lone_tokens


@dataclass(frozen=True)
class LayerPruning:
    """ratio, renormalize: as in the checkpoint's table. counts: None on ranks that do not count.

    decode_only: prune only tokens that are their request's only one in a step. That is what vLLM
    lets the experts know of a token: an output token without speculation, and now and then a
    prompt's last one.
    """

    ratio: float
    renormalize: bool = False
    decode_only: bool = False
    counts: LayerCounts | None = None

    def __call__(
        self, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [T, k] and ids [T, k] of what is left, counted."""
        weights, ids = prune(topk_weights, topk_ids, self.ratio, self.renormalize)
        if self.decode_only:
            alone = lone_tokens(_query_starts(ids.device), len(ids)).unsqueeze(1)
            weights = torch.where(alone, weights, topk_weights)
            ids = torch.where(alone, ids, topk_ids)
        if self.counts is not None:
            self.counts.add(topk_ids, ids)
        return weights, ids


def refuse_decode_only(device: torch.device, data_parallel_size: int) -> None:
    """Raise UserError, with all reasons, where the experts cannot tell prompts from output."""
    reasons = {
        "a GPU runs the experts from CUDA graphs, which know no requests": device.type != "cpu",
        "with data parallelism the experts are given other ranks' tokens": data_parallel_size > 1,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise UserError(
            f'pruning is "{DECODE_ONLY}", which cannot be served here: {"; ".join(found)}. Ask for '
            '"on", "off" or a share.'
        )


def _query_starts(device: torch.device) -> torch.Tensor:
    """Where the tokens of each request begin in the batch that runs: int [R + 1]; no request while
    vLLM runs the model for itself."""
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().attn_metadata
    if not metadata:
        return torch.zeros(1, dtype=torch.int32, device=device)
    return next(iter(metadata.values())).query_start_loc
