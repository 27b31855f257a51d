"""KL divergences of a model's predictions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mcmoe_vllm.model.moe_model import MoeModel


@torch.no_grad()
def mean_divergences(
    model: MoeModel, base: list[torch.Tensor], others: Sequence[list[torch.Tensor]]
) -> list[float]:
    """Mean KL(base || other) per token of one model's hidden states, blocks [B, L, H], in nats."""
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
    return [float(torch.stack(each).double().mean()) for each in found]


def divergence(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """KL(q || p) of each row of log-probabilities [L, vocabulary]."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)
