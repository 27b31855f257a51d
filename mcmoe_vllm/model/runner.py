"""Blocks of hidden states on their way through the decoder layers.

`run_layer` is the one way to run a layer: measuring, quantizing, finetuning, evaluating and
calibrating differ in which experts they run it with, what they watch, and what they prune.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.hooks import RemovableHandle

from mcmoe_vllm.model.decoder_layer import DecoderLayer, join
from mcmoe_vllm.model.experts import ExpertWeights, Routing, experts_output, join_routings
from mcmoe_vllm.model.moe_model import MoeModel

DEVICE_BYTES = 3 << 30  # of tokens' states that stay on the device while their layer is worked on

# name -> blocks [B, L, H]: the same tokens, as different models leave them
States = dict[str, list[torch.Tensor]]
# layer, topk_weights [T, k], topk_ids [T, k] -> the same without what is pruned
Prune = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# an open layer and the states it is given -> the next layer's, and a line on what was done
Step = Callable[[DecoderLayer, States], tuple[States, str]]


class StateStore(Protocol):
    """Where states wait between two layers of a phase."""

    def load_states(self, phase: str) -> tuple[int, States] | None: ...

    def save_states(self, phase: str, layer: int, states: States) -> None: ...


class LayerProgress(Protocol):
    """Who is told of each layer."""

    def start(self, phase: str, total: int, done: int) -> None: ...

    def layer_done(self, index: int, message: str) -> None: ...


@dataclass(frozen=True)
class LayerRun:
    """outputs: blocks [B, L, H]; routing: of all their tokens, before pruning, None for a dense
    layer; inputs: what the observed modules were given, rows [B * L, K] of each block."""

    outputs: list[torch.Tensor]
    routing: Routing | None
    inputs: dict[str, list[torch.Tensor]]


def run_layer(
    layer: DecoderLayer,
    blocks: Sequence[torch.Tensor],
    experts: ExpertWeights | None,
    *,
    prune: Prune | None = None,
    observe: Sequence[str] = (),
    changed: Mapping[str, torch.Tensor] | None = None,
) -> LayerRun:
    """Blocks through a decoder layer.

    experts: the weights that its tokens are routed to, in the layer's dtype; None leaves the routed
    experts' part out of the outputs. prune: applied to the routing first. observe: names of modules
    whose inputs are kept. changed: as in `DecoderLayer.run`; gradients flow to these and to the
    experts.
    Everything stays on the device if it is not too large for it, else it goes to main memory.
    """
    place = _place_of(layer.device, blocks)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in observe}
    outputs, routings = [], []
    with watch_inputs(layer, observe, lambda name, rows: inputs[name].append(rows.to(place))):
        for block in blocks:
            output, routing = layer.run(block.to(layer.device), changed)
            outputs.append(output.to(place))
            if routing is not None:
                routings.append(routing.to(place))
    if not routings:
        return LayerRun(outputs, None, inputs)
    routed = join_routings(routings)
    if experts is not None:
        kept = routed
        if prune is not None:
            weights, ids = prune(layer.index, routed.weights, routed.ids)
            kept = Routing(routed.hidden, ids, weights)
        change = experts_output(kept, experts, layer.num_experts, layer.activation)
        outputs = join(layer, blocks, outputs, change, changed=changed)
    return LayerRun(outputs, routed, inputs)


def walk_layers(
    model: MoeModel,
    states: States,
    step: Step,
    *,
    phase: str = "",
    store: StateStore | None = None,
    progress: LayerProgress | None = None,
) -> States:
    """States through all layers, one `step` each; with a store, from where the phase was left."""
    start, states = (store and store.load_states(phase)) or (0, states)
    if progress is not None:
        progress.start(phase, model.num_layers, start)
    for index in range(start, model.num_layers):
        with model.open_layer(index) as layer:
            states, line = step(layer, states)
        if store is not None:
            store.save_states(phase, index + 1, states)
        if progress is not None:
            progress.layer_done(index, line)
    return states


def final_hidden(
    model: MoeModel, tokens: torch.Tensor, prune: Prune | None = None
) -> list[torch.Tensor]:
    """Token windows [S, L] through all decoder layers; blocks [B, L, H] in main memory."""

    def step(layer: DecoderLayer, states: States) -> tuple[States, str]:
        # Block by block: what all tokens are routed with would take as much room again.
        blocks = states["tokens"]
        for position, block in enumerate(blocks):
            (output,) = run_layer(layer, [block], layer.experts, prune=prune).outputs
            blocks[position] = output.cpu()
        return states, ""

    blocks = [block.cpu() for block in model.embed(tokens)]
    return walk_layers(model, {"tokens": blocks}, step)["tokens"]


def to_main_memory(blocks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of blocks that are on a GPU, by way of one page-locked block: several times as fast as
    straight into memory that nothing has touched yet."""
    if not blocks or not blocks[0].is_cuda:
        return list(blocks)
    largest = max(blocks, key=lambda b: b.numel())
    staging = torch.empty_like(largest, device="cpu", pin_memory=True).flatten()
    return [staging[: b.numel()].view_as(b).copy_(b).clone() for b in blocks]


@contextmanager
def watch_inputs(
    layer: DecoderLayer, names: Sequence[str], see: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """While the layer runs, show what its modules are given: `see(name, rows)`, rows [T, K]."""

    def watch(name: str) -> RemovableHandle:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            see(name, arguments[0].detach().reshape(-1, arguments[0].shape[-1]))

        return layer.module.get_submodule(name).register_forward_pre_hook(hook)

    hooks = [watch(name) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _place_of(device: torch.device, blocks: Sequence[torch.Tensor]) -> torch.device:
    """Where states are kept while their layer is worked on."""
    small = sum(b.nbytes for b in blocks) <= DEVICE_BYTES
    return device if small else torch.device("cpu")
