"""Online pruning of one layer while vLLM runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mcmoe_vllm.plugin.metrics import LayerCounts
from mcmoe_vllm.pruning import prune


@dataclass(frozen=True)
class LayerPruning:
    """ratio, renormalize: as in the checkpoint's table. counts: None on ranks that do not count."""

    ratio: float
    renormalize: bool = False
    counts: LayerCounts | None = None

    def __call__(
        self, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [T, k] and ids [T, k] of what is left, counted."""
        weights, ids = prune(topk_weights, topk_ids, self.ratio, self.renormalize)
        if self.counts is not None:
            self.counts.add(topk_ids, ids)
        return weights, ids
