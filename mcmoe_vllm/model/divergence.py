"""KL divergences of a model's predictions, and losses that are numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.moe_model import MoeModel


@torch.no_grad()
def mean_divergences(
    model: MoeModel, base: list[torch.Tensor], others: Sequence[list[torch.Tensor]]
) -> list[float]:
    """Mean KL(base || other) per token of one model's hidden states, blocks [B, L, H], in nats.

    Raises UserError where one is not finite.
    """
    if not others:
        return []
    # Window by window, the base first: its logits are computed once and the head is read once.
    windows = [
        states[b][w : w + 1]
        for b, block in enumerate(base)
        for w in range(block.shape[0])
        for states in (base, *others)
    ]
    found: list[list[torch.Tensor]] = [[] for _ in others]
    for i, row in enumerate(model.logits(windows)):
        other = i % (1 + len(others)) - 1
        if other < 0:
            log_q = row.log_softmax(-1)
        else:
            found[other].append(divergence(log_q, row.log_softmax(-1)).mean())
    means = [torch.stack(each).double() for each in found]
    return [float(require_finite(each, "the KL divergence").mean()) for each in means]


def divergence(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """KL(q || p) of each row of log-probabilities [L, vocabulary]."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def require_finite(values: torch.Tensor, what: str) -> torch.Tensor:
    """The values of windows, float [S]. Raises UserError, naming what they are, if any is NaN or
    infinite: no figure follows from such a model."""
    wrong = int((~torch.isfinite(values)).sum())
    if wrong:
        raise UserError(
            f"{what} is not finite in {wrong} of {values.numel()} windows: weights of the model "
            "are damaged, or too large to compute with. Download or compress it again; `mcmoe "
            "inspect --check` verifies a compressed folder"
        )
    return values
