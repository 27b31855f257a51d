"""Layer after layer, quantized and written, each calibrated on what the quantized layers before it
put out."""

from __future__ import annotations

import time
from typing import Any

import torch

from mcmoe_vllm.checkpoint.format import DENSE_WIDTH
from mcmoe_vllm.checkpoint.writing import shard_name, write_shard
from mcmoe_vllm.compress.experts import pack_expert, quantize_experts, routed_output
from mcmoe_vllm.compress.linears import dense_groups, quantize_dense, quantize_router
from mcmoe_vllm.compress.workdirectory import WorkDirectory
from mcmoe_vllm.model.decoder_layer import DecoderLayer, join
from mcmoe_vllm.model.memory import peak_rss_bytes
from mcmoe_vllm.model.moe_model import MoeModel
from mcmoe_vllm.model.runner import (
    LayerRun,
    States,
    run_layer,
    to_main_memory,
    walk_layers,
)
from mcmoe_vllm.plan import Plan
from mcmoe_vllm.recipes import Recipe
from mcmoe_vllm.report.progress import Progress
from mcmoe_vllm.report.tables import describe_layer


def quantize_layers(
    model: MoeModel,
    windows: torch.Tensor,
    plan: Plan,
    recipe: Recipe,
    work: WorkDirectory,
    progress: Progress,
) -> list[dict[str, Any]]:
    """What report.json says of every layer; the shards are in the work directory then, and the
    16-bit model's final states among its states, if the recipe follows them."""
    shards = model.num_layers + 1
    first = work.checkpoint / shard_name(1, shards)
    if not first.exists():
        outside = [n for n in model.checkpoint.tensors if not model.layout.is_of_layers(n)]
        write_shard(first, model.checkpoint.read_weights(outside))

    def step(layer: DecoderLayer, states: States) -> tuple[States, str]:
        began = time.perf_counter()
        states, tensors, lost = _quantize_layer(model, layer, states, plan, recipe)
        write_shard(work.checkpoint / shard_name(layer.index + 2, shards), tensors)
        summary = {"layer": layer.index, "seconds": round(time.perf_counter() - began, 3), **lost}
        summary["peak_rss_bytes"] = peak_rss_bytes()
        work.save_layer("layers", layer.index, summary)
        return states, describe_layer(summary)

    blocks = [b.cpu() for b in model.embed(windows)]
    begin = dict.fromkeys(_states_of(recipe), blocks)
    walk_layers(model, begin, step, phase="quantizing", store=work, progress=progress)
    return [work.load_layer("layers", i) for i in range(model.num_layers)]


def final_states(work: WorkDirectory) -> list[torch.Tensor]:
    """The 16-bit model's final states of the calibration windows, blocks [B, L, H]."""
    found = work.load_states("quantizing")
    assert found is not None and "exact" in found[1], "the recipe does not follow them"
    return found[1]["exact"]


def _states_of(recipe: Recipe) -> list[str]:
    """Whose states go from layer to layer: those that the quantized layers before leave, and those
    of the 16-bit model. A recipe that is not sequential calibrates on the latter."""
    follows_exact = recipe.exact_targets or recipe.finetune_passes > 0
    return (["compressed"] if recipe.sequential else []) + (
        ["exact"] if follows_exact or not recipe.sequential else []
    )


def _quantize_layer(
    model: MoeModel, layer: DecoderLayer, states: States, plan: Plan, recipe: Recipe
) -> tuple[States, dict[str, torch.Tensor], dict[str, Any]]:
    """The next layer's states, the layer's tensors by checkpoint name, and what was lost."""
    layout, index = model.layout, layer.index
    tensors = model.checkpoint.read_weights(model.parameter_names(index))
    lost: dict[str, Any] = {}
    linears = layout.dense_linears if plan.dense_bits == DENSE_WIDTH else ()
    groups = dense_groups(layer, linears)
    fits_exact = recipe.exact_targets and recipe.sequential
    exact: LayerRun | None = None
    following: States = {}
    given = states.pop("exact", [])
    blocks = states["compressed"] if recipe.sequential else given
    if given:
        observed = [group[0] for group in groups] if fits_exact else []
        read = layer.experts.on(layer.device, layer.dtype)
        exact = run_layer(layer, given, read, observe=observed)
        following["exact"] = to_main_memory(exact.outputs)
    del given
    wanted = exact if fits_exact else None
    if linears:
        lost["dense"], stored = quantize_dense(
            layer, groups, blocks, wanted.inputs if wanted else None, plan.group_size["dense"],
            recipe,
        )  # fmt: skip
        for name, parts in stored.items():
            del tensors[layout.stored_name(index, f"{name}.weight")]
            for part, tensor in parts.items():
                tensors[layout.stored_name(index, f"{name}.{part}")] = tensor
    if recipe.router_bits != 16 and layer.router_name is not None:
        router = layout.stored_name(index, f"{layer.router_name}.weight")
        lost["router"], tensors[router] = quantize_router(
            layer, blocks, tensors[router].dtype, plan.group_size["w13"], recipe
        )
    routed = wanted.routing.hidden if wanted and wanted.routing else None
    del exact, wanted  # what the linears are given is as large as the states themselves
    run = run_layer(layer, blocks, None)
    outputs = run.outputs
    if run.routing is not None:
        widths = plan.pairs()[plan.layers.index(index)]
        lost["experts"], experts = quantize_experts(
            layer, run.routing, widths, plan.group_size, recipe, routed
        )
        for expert, matrices in experts.items():
            names = layout.expert_weights(index, expert)
            tensors |= pack_expert(names, matrices, widths[expert])
        outputs = join(layer, blocks, outputs, routed_output(layer, run.routing, experts))
    if recipe.sequential:
        following["compressed"] = to_main_memory(outputs)
    return following, tensors, lost
