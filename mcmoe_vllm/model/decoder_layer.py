"""A decoder layer in memory, its routed experts replaced by a tap.

What a layer makes of its experts' output is not always to add it: families scale it, normalise it,
or add it twice. `join` finds out once, by what the layer answers to an output of the tap's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mcmoe_vllm.model.expert_reader import LayerExperts
from mcmoe_vllm.model.experts import Activation, Routing

LINEAR = 3e-2  # relative error, in 16 bits, of a layer that does no more than scale and add


@dataclass(frozen=True)
class Arguments:
    """What transformers hands to a layer besides the hidden states."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class ExpertsTap(nn.Module):
    """Stands where transformers keeps the routed experts: records the routing and puts out nothing,
    or what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.routing: Routing | None = None
        self.output: torch.Tensor | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        shape = (len(hidden), -1)
        self.routing = Routing(hidden, top_k_index.view(shape), top_k_weights.view(shape))
        if self.output is None:
            return torch.zeros_like(hidden_states)
        return self.output.to(hidden_states.dtype).view_as(hidden_states)


class LastLayer(Exception):
    """All layers have been given what they are given."""


class StandIn(nn.Module):
    """Stands where a decoder layer does while what is before and behind the layers runs: records
    what it is given and hands it on. Of the layer it has what its model asks for."""

    def __init__(
        self, layer: nn.Module, seen: list[tuple[Arguments, torch.Tensor]], last: bool
    ) -> None:
        """last: whether the run is over once this has been given something."""
        super().__init__()
        object.__setattr__(self, "_last", last)
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_seen", seen)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, *positional: Any, **named: Any) -> torch.Tensor:
        hidden = positional[0] if positional else named.pop("hidden_states")
        object.__getattribute__(self, "_seen").append((Arguments(positional[1:], named), hidden))
        if object.__getattribute__(self, "_last"):
            raise LastLayer
        return hidden


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """module: transformers' layer, its experts replaced by a tap; router_name: of the router in the
    module, None for one that is more than a linear; arguments: of a block of so many windows, what
    transformers hands to the layer; joins: layer -> factor of the experts' output in the layer's,
    None where it is none."""

    index: int
    module: nn.Module
    router_name: str | None
    experts: LayerExperts
    num_experts: int
    activation: Activation
    device: torch.device
    dtype: torch.dtype
    arguments: Callable[[torch.Tensor], Arguments]
    tap: ExpertsTap | None
    joins: dict[int, float | None]

    @property
    def is_moe(self) -> bool:
        return self.tap is not None

    @property
    def router(self) -> Any:
        """The router of a layer with experts."""
        assert self.router_name is not None
        return self.module.get_submodule(self.router_name)

    def run(
        self,
        block: torch.Tensor,
        changed: Mapping[str, torch.Tensor] | None = None,
        experts_output: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Routing | None]:
        """A block [B, L, H] on the device through everything but the routed experts, or with what
        they put out [B * L, H]; and what these would be given (None for a dense layer).

        changed: parameters to use instead of the layer's, by their names in it; gradients flow to
        these alone.
        """
        given = self.arguments(block)
        if self.tap is not None:
            self.tap.output = experts_output
        arguments = (block, *given.positional)
        if changed is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and experts_output is not None):
                output = self.module(*arguments, **given.named)
        else:
            output = torch.func.functional_call(
                self.module, dict(changed), arguments, dict(given.named)
            )
        output = output[0] if isinstance(output, tuple) else output
        if self.tap is None:
            return output, None
        routing, self.tap.routing, self.tap.output = self.tap.routing, None, None
        return output, routing

    def factor(self, block: torch.Tensor) -> float | None:
        """What the experts' output is multiplied with before the layer adds it; None for a layer
        that does something else with it. block: any that the layer is given."""
        if self.index not in self.joins:
            self.joins[self.index] = self._measure_factor(block)
        return self.joins[self.index]

    @torch.no_grad()
    def _measure_factor(self, block: torch.Tensor) -> float | None:
        block = block.to(self.device)
        without, routing = self.run(block)
        assert routing is not None
        generator = torch.Generator().manual_seed(0)
        # As large as what the layer puts out, or rounding would hide it; tokens of different sizes,
        # or a layer that normalises each would look as if it scaled.
        noise = torch.randn(routing.hidden.shape, generator=generator)
        noise *= 0.5 + 1.5 * torch.rand(len(noise), 1, generator=generator)
        output = noise.to(routing.hidden) * without.float().square().mean().sqrt().to(block)
        change = (self.run(block, experts_output=output)[0] - without).double().flatten()
        wanted = output.double().flatten()
        factor = float(change @ wanted / (wanted @ wanted))
        error = float((change - factor * wanted).norm() / change.norm().clamp(min=1e-30))
        if error > LINEAR:
            return None
        return 1.0 if abs(factor - 1) < LINEAR else float(f"{factor:.4g}")


def join(
    layer: DecoderLayer,
    blocks: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    rows: torch.Tensor,
    *,
    held: torch.Tensor | None = None,
    changed: Mapping[str, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """What a layer puts out with its experts.

    blocks: what it is given, [B, L, H]; outputs: what it makes of that without experts, or with
    those whose outputs, [T, H], are `held`; rows: what experts put out (besides), float [T, H];
    changed: as in `DecoderLayer.run`.
    """
    factor = layer.factor(blocks[0])
    if factor is not None:
        return add_rows(outputs, rows if factor == 1 else rows * factor)
    total = rows if held is None else held[: len(rows)] + rows
    parts = total.split([b.shape[0] * b.shape[1] for b in blocks])
    joined = []
    for block, part, output in zip(blocks, parts, outputs, strict=True):
        given, added = block.to(layer.device), part.to(layer.device)
        joined.append(layer.run(given, changed, experts_output=added)[0].to(output))
    return joined


def add_rows(blocks: Sequence[torch.Tensor], rows: torch.Tensor) -> list[torch.Tensor]:
    """Blocks [B, L, H] plus the matching rows of [T, H]."""
    parts = rows.split([b.shape[0] * b.shape[1] for b in blocks])
    return [b + p.view_as(b).to(b) for b, p in zip(blocks, parts, strict=True)]
