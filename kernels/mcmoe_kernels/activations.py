"""How the results of w13 become the input of w2: a value, and its definition in plain torch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class Activation:
    """f(gate) * (up + up_offset), with f a key of FUNCTIONS; not gated, f of all there is.

    limit: gate is clamped to at most as much and up to as much either way, or with limit_after
    f(gate) instead of gate. alpha: silu is f(g) = g * sigmoid(alpha * g). Raises ValueError for
    what is not computed.

        GPT-OSS              Activation("silu", limit=7.0, alpha=1.702, up_offset=1.0)
        DeepSeek-V4          Activation("silu", limit=10.0)
        Step-3.5             Activation("silu", limit=7.0, limit_after=True)
        Nemotron             Activation("relu2", gated=False)
    """

    function: str = "silu"
    gated: bool = True
    limit: float | None = None
    limit_after: bool = False
    alpha: float = 1.0
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if self.function not in FUNCTIONS:
            problems.append(
                f"activation {self.function!r} is not supported, use one of "
                f"{', '.join(sorted(FUNCTIONS))}"
            )
        if self.limit is not None and not self.limit > 0:
            problems.append(f"limit must be above 0, or None for none, got {self.limit}")
        if self.alpha != 1 and self.function != "silu":
            problems.append(f"alpha {self.alpha} is for silu alone, {self.function} takes 1")
        if not self.gated and (self.limit is not None or self.up_offset):
            problems.append(
                f"limit {self.limit} and up_offset {self.up_offset} are for gated activations, "
                "others take None and 0"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def rows(self) -> int:
        """Rows of w13 for each of its results: a row of gate and one of up, or one alone."""
        return 2 if self.gated else 1


def activate(h: torch.Tensor, activation: Activation) -> torch.Tensor:
    """h [..., rows * I], the gate's columns first -> [..., I], in h's dtype."""
    if not activation.gated:
        return _function(h, activation)
    gate, up = h.chunk(2, dim=-1)
    limit = activation.limit
    if limit is not None:
        up = up.clamp(-limit, limit)
        gate = gate if activation.limit_after else gate.clamp(max=limit)
    value = _function(gate, activation)
    if limit is not None and activation.limit_after:
        value = value.clamp(max=limit)
    return value * (up + activation.up_offset)


def _function(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation.alpha != 1:
        return x * torch.sigmoid(activation.alpha * x)
    return FUNCTIONS[activation.function](x)
