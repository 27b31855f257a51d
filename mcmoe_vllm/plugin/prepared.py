"""What the operator runs for a layer, and how much memory a CPU engine spends on weights that are
kept dequantized for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin.pruning import LayerPruning

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

GIB = 1 << 30
CACHE_OPTION = "cpu_weight_cache_gib"
# What fits is kept dequantized, which is fastest; larger models compute from 4-bit codes.
DEFAULT_CACHE_GIB = 2.0


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


class CacheBudget:
    """Bytes that may still be spent on dequantized weights in this engine."""

    def __init__(self, gib: float = DEFAULT_CACHE_GIB) -> None:
        number = isinstance(gib, int | float) and not isinstance(gib, bool)
        if not number or not 0 <= gib < float("inf"):
            raise UserError(
                f"{CACHE_OPTION} is {gib!r}, needs a number of GiB from 0, as in "
                f"--additional-config '{{\"{CACHE_OPTION}\": 4}}'"
            )
        self.bytes = int(gib * GIB)

    def take(self, nbytes: int) -> bool:
        """Whether so much is left; if it is, it is spent."""
        if nbytes > self.bytes:
            return False
        self.bytes -= nbytes
        return True

    def give(self, nbytes: int) -> None:
        """What `take` spent is to be spent again."""
        self.bytes += nbytes

    @classmethod
    def from_additional_config(cls, options: object) -> CacheBudget:
        given = options.get(CACHE_OPTION) if isinstance(options, dict) else None
        return cls(DEFAULT_CACHE_GIB if given is None else given)
