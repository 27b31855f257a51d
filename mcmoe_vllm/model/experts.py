"""Routed experts: what a router decides, and what its experts make of it.

Shapes: T tokens, k experts a token, H the hidden size, I the experts' width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

TOKENS_AT_ONCE = 8192  # that go through an expert

# gates above ups [T, 2I] -> what the down projection is given, [T, I]
Activation = Callable[[torch.Tensor], torch.Tensor]


def gated(function: Callable[[torch.Tensor], torch.Tensor]) -> Activation:
    """function(gate) * up, of most families."""

    def activation(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return function(gate) * up

    return activation


def interleave(rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Gates above ups to pairs, gate 0, up 0, gate 1 and so on, as some checkpoints have them."""
    dim %= rows.dim()
    return torch.stack(rows.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


def deinterleave(rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The inverse of `interleave`."""
    dim %= rows.dim()
    return torch.cat(rows.unflatten(dim, (-1, 2)).unbind(dim + 1), dim)


def stack_parts(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """w13 and w2 of an expert's weights as they lie on disk: gate, up and down, or gate and up in
    pairs of rows, and down."""
    *halves, down = parts
    return torch.cat(halves) if len(halves) == 2 else deinterleave(halves[0]), down


@dataclass(frozen=True)
class Expert:
    """The weights of one expert: w13 [2I, H], gate rows above up rows, and w2 [H, I]; their biases
    [2I] and [H], or None."""

    w13: torch.Tensor
    w2: torch.Tensor
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Expert:
        # To the device first: it converts faster, and half the bytes travel.
        tensors = (self.w13, self.w2, self.w13_bias, self.w2_bias)
        return Expert(*(None if t is None else t.to(device).to(dtype) for t in tensors))  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        tensors = (self.w13, self.w2, self.w13_bias, self.w2_bias)
        return sum(t.nbytes for t in tensors if t is not None)


# expert -> its weights, None for a dropped one
ExpertWeights = Callable[[int], Expert | None]


@dataclass(frozen=True)
class Routing:
    """What the router decided for T tokens: hidden [T, H] goes in, ids int64 [T, k] and
    weights [T, k] come out."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def tokens_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows routed to an expert, ascending, and their weights."""
        rows, slots = torch.where(self.ids == expert)
        return rows, self.weights[rows, slots]

    def to(self, device: torch.device) -> Routing:
        return Routing(self.hidden.to(device), self.ids.to(device), self.weights.to(device))


def join_routings(routings: Sequence[Routing]) -> Routing:
    """The routings of all blocks as one."""
    return Routing(
        torch.cat([r.hidden for r in routings]),
        torch.cat([r.ids for r in routings]),
        torch.cat([r.weights for r in routings]),
    )


def count_tokens(routing: Routing, num_experts: int) -> list[int]:
    """How many tokens each expert is given."""
    return torch.bincount(routing.ids.flatten(), minlength=num_experts).tolist()


def experts_output(
    routing: Routing, experts: ExpertWeights, num_experts: int, activation: Activation
) -> torch.Tensor:
    """The routed experts' weighted outputs, summed by token: float32 [T, H]."""
    total = torch.zeros_like(routing.hidden, dtype=torch.float32)
    for number in range(num_experts):
        rows, weights = routing.tokens_of(number)
        expert = experts(number) if rows.numel() else None
        if expert is None:
            continue
        parts = zip(rows.split(TOKENS_AT_ONCE), weights.split(TOKENS_AT_ONCE), strict=True)
        for part, weight in parts:
            x = routing.hidden[part].to(expert.w13.device)
            output = run_expert(x, expert, activation).float().to(total.device)
            total.index_add_(0, part, output * weight.float().unsqueeze(1))
    return total


def run_expert(x: torch.Tensor, expert: Expert, activation: Activation) -> torch.Tensor:
    """x [T, H] through one expert -> [T, H]."""
    inner = expert_hidden(x, expert.w13, activation, expert.w13_bias)
    return nn.functional.linear(inner, expert.w2, expert.w2_bias)


def expert_hidden(
    x: torch.Tensor, w13: torch.Tensor, activation: Activation, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """What the down projection is given: of x [T, H] -> [T, I]."""
    return activation(nn.functional.linear(x, w13, bias))
