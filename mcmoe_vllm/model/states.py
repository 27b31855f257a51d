"""Hidden states of the calibration text on their way through a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.hooks import RemovableHandle

from mcmoe_vllm.model.streaming import Routing, StreamedModel, concatenate, experts_output

if TYPE_CHECKING:
    from mcmoe_vllm.compress.job import Job


DEVICE_BYTES = 3 << 30  # of tokens' states that stay on the device while their layer is measured


@dataclass(frozen=True)
class ExactLayer:
    """A layer of the 16-bit model on the calibration text. outputs: blocks [B, L, H], in main
    memory; where `_run_blocks` keeps states: inputs, what the observed linears are given, rows
    [B * L, K] of each block, and routed, what the routed experts are given, [T, H], None for a
    dense layer or if nothing is observed."""

    outputs: list[torch.Tensor]
    inputs: dict[str, list[torch.Tensor]]
    routed: torch.Tensor | None


def run_exact(
    job: Job,
    layer: torch.nn.Module,
    index: int,
    blocks: list[torch.Tensor],
    observed: Sequence[str] | None = None,
) -> ExactLayer:
    """Blocks of the 16-bit model's states through a layer that is not quantized yet. Without
    `observed`, outputs are all that is kept."""
    model = job.model
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in observed or ()}
    kept = _place_of(model, blocks)
    with observing(layer, list(inputs), lambda name, rows: inputs[name].append(rows.to(kept))):
        outputs, routing = run_blocks(model, layer, index, blocks)
    if routing is None:
        return ExactLayer(to_main_memory(outputs), inputs, None)

    def read(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        w13, w2 = job.read_expert(index, expert)
        return w13.to(model.dtype), w2.to(model.dtype)

    changes = experts_output(routing, read, job.num_experts, model.activation())
    outputs = to_main_memory(add_rows(outputs, changes))
    return ExactLayer(outputs, inputs, None if observed is None else routing.hidden)


@contextmanager
def observing(
    layer: torch.nn.Module, names: Sequence[str], see: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """While the layer runs, show what its linears are given: `see(name, rows)`, rows [T, K]."""

    def observe(name: str) -> RemovableHandle:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            see(name, arguments[0].detach().reshape(-1, arguments[0].shape[-1]))

        return layer.get_submodule(name).register_forward_pre_hook(hook)

    hooks = [observe(name) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Seen(Exception):
    """All that was looked for in a layer has been seen."""


def run_blocks(
    model: StreamedModel, layer: torch.nn.Module, index: int, blocks: list[torch.Tensor]
) -> tuple[list[torch.Tensor], Routing | None]:
    """All blocks through a layer, and the routing of all their tokens, kept in `_place_of` them."""
    outputs, routings = [], []
    kept = _place_of(model, blocks)
    for block in blocks:
        output, routing = model.run_layer(layer, index, block.to(model.device))
        outputs.append(output.to(kept))
        if routing is not None:
            routings.append(
                Routing(routing.hidden.to(kept), routing.ids.to(kept), routing.weights.to(kept))
            )
    return outputs, concatenate(routings) if routings else None


def _place_of(model: StreamedModel, blocks: list[torch.Tensor]) -> torch.device:
    """Where tokens' states are kept while their layer is worked on: the device if they are not too
    large for it, else main memory."""
    small = sum(b.nbytes for b in blocks) <= DEVICE_BYTES
    return model.device if small else torch.device("cpu")


def add_rows(blocks: list[torch.Tensor], rows: torch.Tensor) -> list[torch.Tensor]:
    """Blocks [B, L, H] plus the matching rows of [T, H]."""
    parts = rows.split([b.shape[0] * b.shape[1] for b in blocks])
    return [b + p.view_as(b).to(b) for b, p in zip(blocks, parts, strict=True)]


def to_main_memory(blocks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of blocks that are on a GPU, by way of one page-locked block: several times as fast as
    straight into memory that nothing has touched yet."""
    if not blocks[0].is_cuda:
        return blocks
    largest = max(blocks, key=lambda b: b.numel())
    staging = torch.empty_like(largest, device="cpu", pin_memory=True).flatten()
    return [staging[: b.numel()].view_as(b).copy_(b).clone() for b in blocks]
