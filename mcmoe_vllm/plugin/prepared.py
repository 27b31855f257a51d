"""What the operator runs for a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mcmoe_vllm.plugin.pruning import LayerPruning

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class PreparedExperts:
    """What the operator runs for a layer. `path` names it for the log."""

    path: str
    compute: Compute
    keeps_packed: bool


def add_pruning(prepared: PreparedExperts, pruning: LayerPruning | None) -> PreparedExperts:
    """The same experts behind the pruning rule in plain torch."""
    if pruning is None:
        return prepared
    compute = prepared.compute

    def pruned(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return compute(x, *pruning(weights, ids))

    return PreparedExperts(prepared.path, pruned, prepared.keeps_packed)
