"""The significance of every layer, on the unquantized model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from mcmoe_vllm.compress.significance import LayerSignificance, Probe, measure_layer
from mcmoe_vllm.compress.workdirectory import WorkDirectory
from mcmoe_vllm.model.decoder_layer import DecoderLayer, join
from mcmoe_vllm.model.divergence import mean_divergences
from mcmoe_vllm.model.experts import Routing
from mcmoe_vllm.model.moe_model import MoeModel
from mcmoe_vllm.model.runner import States, run_layer, to_main_memory, walk_layers
from mcmoe_vllm.quantize.hessians import ROWS
from mcmoe_vllm.recipes import Recipe
from mcmoe_vllm.report.progress import Progress
from mcmoe_vllm.report.tables import describe_measurement

PROBE_TOKENS = 16384  # that tell what widths change and what a change costs the model
PROBE_BITS = 2  # the candidate next to it is what the model's predictions are asked about


def measure_layers(
    model: MoeModel,
    windows: torch.Tensor,
    candidates: Sequence[int],
    group_size: Mapping[str, int],
    recipe: Recipe,
    work: WorkDirectory,
    progress: Progress,
    *,
    resumable: bool = True,
) -> list[LayerSignificance]:
    """windows: tokens [S, L]; candidates: widths in ascending order, none of them to count tokens
    alone. What is measured is kept in `work`; with `resumable` the states between layers too."""
    blocks = [b.cpu() for b in model.embed(windows)]
    probing = recipe.allocation == "sensitivity" and len(candidates) > 0
    probe, probe_blocks = Probe(window=windows.shape[1]), 0
    if probing:
        nearest = min(range(len(candidates)), key=lambda c: abs(candidates[c] - PROBE_BITS))
        per_block = blocks[0].shape[0] * blocks[0].shape[1]
        probe_blocks = min(len(blocks), -(-PROBE_TOKENS // per_block))
        tokens = sum(b.shape[0] * b.shape[1] for b in blocks[:probe_blocks])
        probe = replace(probe, candidate=nearest, tokens=tokens)

    def step(layer: DecoderLayer, states: States) -> tuple[States, str]:
        exact = layer.experts.on(layer.device, layer.dtype)
        blocks, probes = states["exact"], _without(states, "exact")
        # All of them at once: every expert is fetched once.
        changed = run_layer(layer, _flat(probes), exact).outputs
        probes = _like(probes, to_main_memory(changed))
        run = run_layer(layer, blocks, None)
        if run.routing is None:
            exact_states = to_main_memory(run.outputs)
            return {"exact": exact_states, **probes}, "dense layer, nothing to measure"
        scores = _softmax_scores(layer, run.routing) if recipe.routing_score == "softmax" else None
        measured, routed, change = measure_layer(
            layer.index,
            run.routing,
            lambda e: layer.experts.present(e).to(layer.device, torch.float32),
            layer.num_experts,
            candidates,
            group_size,
            layer.activation,
            recipe,
            replace(probe, scores=scores),
        )
        outputs = join(layer, blocks, run.outputs, routed)
        if probing:
            first, probed = blocks[:probe_blocks], outputs[:probe_blocks]
            begun = join(layer, first, probed, change, held=routed)
            probes[_changed_in(layer.index)] = to_main_memory(begun)
        saved = {**asdict(measured), "probe_change": float(change.double().square().sum())}
        work.save_layer("significance", layer.index, saved)
        line = describe_measurement(measured.tokens, measured.frequency, measured.starved)
        return {"exact": to_main_memory(outputs), **probes}, line

    states = walk_layers(
        model,
        {"exact": blocks},
        step,
        phase="measuring",
        store=work if resumable else None,
        progress=progress,
    )
    found = [work.load_layer("significance", i) for i in model.moe_layers]
    sensitivities = _sensitivities(model, states, found) if probing else [None] * len(found)
    return [
        LayerSignificance(**_without(layer, "probe_change"), sensitivity=sensitivity)
        for layer, sensitivity in zip(
            (_without(layer, "sensitivity") for layer in found), sensitivities, strict=True
        )
    ]


def _sensitivities(
    model: MoeModel, states: States, measured: Sequence[dict[str, Any]]
) -> list[float]:
    """Nats a token that a unit of squared change of each measured layer's output causes."""
    probes = [states[_changed_in(layer["layer"])] for layer in measured]
    probed = len(probes[0]) if probes else 0
    divergences = mean_divergences(model, states["exact"][:probed], probes)
    return [
        kl / max(layer["probe_change"], 1e-30)
        for layer, kl in zip(measured, divergences, strict=True)
    ]


def _changed_in(layer: int) -> str:
    """The name of the states that follow from a change of one layer's experts."""
    return f"changed in layer {layer:05d}"


def _without(table: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != name}


def _flat(states: States) -> list[torch.Tensor]:
    return [block for blocks in states.values() for block in blocks]


def _like(states: States, blocks: Sequence[torch.Tensor]) -> States:
    """The inverse of `_flat`."""
    rest = iter(blocks)
    return {name: [next(rest) for _ in kept] for name, kept in states.items()}


def _softmax_scores(layer: DecoderLayer, routing: Routing) -> torch.Tensor:
    """The routed experts' shares of the softmax over all experts, float32 [T, k]."""
    weight, bias = layer.router.weight.float(), getattr(layer.router, "bias", None)
    bias = None if bias is None else bias.float()
    parts = [
        torch.nn.functional.linear(hidden.to(weight), weight, bias)
        .softmax(-1)
        .gather(1, ids.to(weight.device))
        .to(ids.device)
        for hidden, ids in zip(routing.hidden.split(ROWS), routing.ids.split(ROWS), strict=True)
    ]
    return torch.cat(parts)
