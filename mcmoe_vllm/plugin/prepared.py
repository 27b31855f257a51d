"""What the operator runs for a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mcmoe_vllm.plugin.pruning import LayerPruning

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class PreparedExperts:
    """What the operator runs for a layer. `path` names it for the log.

    tensors: all that `compute` reads of the checkpoint, in an order that the path decides.
    booked: bytes of the launch's budget that they take.
    """

    path: str
    compute: Compute
    keeps_packed: bool
    tensors: tuple[torch.Tensor, ...] = ()
    booked: int = 0


def add_pruning(prepared: PreparedExperts, pruning: LayerPruning | None) -> PreparedExperts:
    """The same experts behind the pruning rule in plain torch."""
    if pruning is None:
        return prepared
    compute = prepared.compute

    def pruned(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return compute(x, *pruning(weights, ids))

    return replace(prepared, compute=pruned)


def renew(old: PreparedExperts, new: PreparedExperts) -> PreparedExperts:
    """What computes with the new weights from now on: the old object, its tensors overwritten,
    because a captured CUDA graph knows their addresses. The new one where the tensors differ in
    form, which only a CPU's do, where nothing is captured."""
    if [_form(t) for t in old.tensors] != [_form(t) for t in new.tensors]:
        assert not any(t.is_cuda for t in old.tensors), "a graph would compute with freed memory"
        return new
    for target, source in zip(old.tensors, new.tensors, strict=True):
        target.copy_(source)
    return old


def _form(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
