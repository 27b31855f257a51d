"""Choose each layer's pruning ratio: the same share of experts dropped at the least damage.

One pass over the decoder layers of the (compressed) model. Beside the unpruned hidden states,
which give every layer's routing weights, one copy of a few windows is carried along for each layer
passed, pruned there and nowhere else: at the end its KL divergence to the unpruned model is what
pruning that layer alone costs at the probed share. A layer's cost at other shares is scaled by the
squares of the weights that are dropped, and shares are bought where the next one costs least.

The paper's rule instead takes the median of the weights' ratio in every layer, whatever it costs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mcmoe_kernels.pruning import Measure, beside_largest
from mcmoe_vllm.checkpoint.files import Checkpoint, open_checkpoint, read_config
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.checkpoint.pruning_table import RULES, PruningTable
from mcmoe_vllm.disk import explain_os_errors, write_json
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.flags import out_of_range
from mcmoe_vllm.limits import MAX_DROP, MAX_SEED, MAX_WINDOWS
from mcmoe_vllm.model.decoder_layer import DecoderLayer
from mcmoe_vllm.model.divergence import mean_divergences
from mcmoe_vllm.model.moe_model import MoeModel, open_model
from mcmoe_vllm.model.runner import LayerProgress, Prune, States, run_layer, walk_layers
from mcmoe_vllm.model.text import (
    load_tokenizer,
    require_known_tokens,
    sample_windows,
    window_length,
)
from mcmoe_vllm.places import require_changeable
from mcmoe_vllm.pruning.table import Pruning
from mcmoe_vllm.report.progress import Progress

PROBE_DROP = 0.35  # more than targets ask for: little drops hide what many of them do together
PROBE_TOKENS = 8192
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
PRUNING_WINDOWS = 64  # of the calibration text
TARGET_DROP = 0.15
STEPS = 64  # of the pairs that may be dropped, in which shares are bought


@dataclass(frozen=True)
class LayerRouting:
    """What a layer's router did to the calibration tokens.

    ratios: float32, ascending: each pair's measure, by default its weight over its token's largest;
    the largest is left out.
    damage: float64, of the same pairs: the square of the weight, summed up to each.
    activations: pairs in all. kl: nats a token that dropping PROBE_DROP of them costs.
    """

    ratios: torch.Tensor
    damage: torch.Tensor
    activations: int
    kl: float = 0.0

    def ratio_for(self, share: float) -> float:
        """The ratio below which lies a share of all activations."""
        count = min(round(share * self.activations), len(self.ratios) - 1)
        return float(self.ratios[count]) if count > 0 else 0.0

    def cost(self, share: float) -> float:
        """Estimated nats a token at a share: `kl` scaled by the damage."""
        return self.kl * self._damage_of(share) / max(self._damage_of(PROBE_DROP), 1e-30)

    def _damage_of(self, share: float) -> float:
        count = min(round(share * self.activations), len(self.damage))
        return float(self.damage[count - 1]) if count > 0 else 0.0


def summarize_routing(weights: torch.Tensor, measure: Measure = beside_largest) -> LayerRouting:
    """topk_weights [T, k] -> their ratios and damage."""
    weights = weights.float()
    place = weights.argmax(dim=1, keepdim=True)
    others = torch.ones_like(weights, dtype=torch.bool).scatter_(1, place, False)
    part, whole = measure(weights)
    ratios, order = (part / whole.clamp(min=1e-30))[others].sort()
    damage = weights[others][order].double().square().cumsum(0)
    return LayerRouting(ratios, damage, weights.numel())


def choose_shares(layers: Sequence[LayerRouting], target: float) -> list[float]:
    """A share for each layer whose mean is `target`, bought step by step where it costs least.

    It is less where layers have no more to drop.
    """
    limits = [len(layer.ratios) / layer.activations for layer in layers]
    shares = [0.0] * len(layers)
    bought = [0 if limit else STEPS for limit in limits]
    while sum(shares) < target * len(layers) - 1e-9 and min(bought, default=STEPS) < STEPS:
        _, cheapest = min(
            (layer.cost(share + limit / STEPS) - layer.cost(share), i)
            for i, (layer, share, limit) in enumerate(zip(layers, shares, limits, strict=True))
            if bought[i] < STEPS
        )
        missing = target * len(layers) - sum(shares)
        shares[cheapest] += min(limits[cheapest] / STEPS, missing)
        bought[cheapest] += 1
    return shares


def require_prunable(model: MoeModel) -> None:
    """Raises UserError for a model whose tokens have one expert each: the largest always stays."""
    top_k = model.skeleton.top_k
    if top_k < 2:
        raise UserError(
            f"{model.checkpoint.path} routes a token to {top_k} expert, which always stays: there "
            "is nothing for online pruning to drop. Serve it without; leave out --target-drop"
        )


def calibrate_pruning(
    model: MoeModel,
    tokens: torch.Tensor,
    target_drop: float,
    rule: str = "sensitivity",
    progress: LayerProgress | None = None,
) -> PruningTable:
    """Measure a model on token windows [S, L]. Raises UserError for a target out of range."""
    layers = measure_routing(model, tokens, probe=rule == "sensitivity", progress=progress)
    indices = tuple(layers)
    measured = list(layers.values())
    if rule == "median":
        medians = tuple(float(layer.ratios[len(layer.ratios) // 2]) for layer in measured)
        dropped = sum(len(layer.ratios) // 2 for layer in measured)
        share = dropped / sum(layer.activations for layer in measured)
        return PruningTable(rule, share, indices, {share: medians}, renormalize=True)
    wanted = sorted({*SHARES, target_drop})
    ratios = {
        share: tuple(
            layer.ratio_for(part)
            for layer, part in zip(measured, choose_shares(measured, share), strict=True)
        )
        for share in wanted
    }
    return PruningTable(rule, target_drop, indices, ratios)


def measure_routing(
    model: MoeModel,
    tokens: torch.Tensor,
    *,
    probe: bool,
    measure: Measure = beside_largest,
    progress: LayerProgress | None = None,
) -> dict[int, LayerRouting]:
    """MoE layer -> its routing of the windows [S, L]; with `probe` also what pruning it costs."""
    blocks = [block.cpu() for block in model.embed(tokens)]
    probe_blocks = _leading_blocks(blocks, PROBE_TOKENS) if probe else 0
    found: dict[int, LayerRouting] = {}

    def step(layer: DecoderLayer, states: States) -> tuple[States, str]:
        unpruned = states["unpruned"]
        before = unpruned[:probe_blocks]
        for name, blocks in states.items():
            if name != "unpruned":
                blocks[:] = (_run_block(layer, block)[0] for block in blocks)
        weights = []
        for position, block in enumerate(unpruned):
            unpruned[position], routed = _run_block(layer, block)
            weights += [] if routed is None else [routed]
        if not weights:
            return states, "dense layer, nothing to prune"
        summary = summarize_routing(torch.cat(weights), measure)
        found[layer.index] = summary
        if probe:
            pruning = Pruning({layer.index: summary.ratio_for(PROBE_DROP)}, measure=measure)
            name = f"pruned in layer {layer.index}"
            states[name] = [_run_block(layer, block, pruning)[0] for block in before]
        return states, f"{summary.activations} expert activations"

    states = walk_layers(
        model, {"unpruned": blocks}, step, phase="calibrating pruning", progress=progress
    )
    unpruned = states.pop("unpruned")
    costs = mean_divergences(model, unpruned[:probe_blocks], list(states.values()))
    return {
        index: replace(summary, kl=kl)
        for (index, summary), kl in zip(found.items(), costs or [0.0] * len(found), strict=True)
    }


def _run_block(
    layer: DecoderLayer, block: torch.Tensor, prune: Prune | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A block through the layer, and its routing weights [T, k], both in main memory."""
    run = run_layer(layer, [block], layer.experts, prune=prune)
    return run.outputs[0].cpu(), None if run.routing is None else run.routing.weights.cpu()


def _leading_blocks(blocks: Sequence[torch.Tensor], tokens: int) -> int:
    """How many blocks hold at least as many tokens; at least one."""
    held = 0
    for count, block in enumerate(blocks, 1):
        held += block.shape[0] * block.shape[1]
        if held >= tokens:
            return count
    return len(blocks)


def calibrate_checkpoint(
    folder: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    target_drop: float | None = None,
    rule: str = "sensitivity",
    samples: int = PRUNING_WINDOWS,
    sequence_length: int | None = None,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> PruningTable:
    """Calibrate a compressed checkpoint and store the table in its config.json.

    target_drop: None for TARGET_DROP; the rule "median" drops what the medians say, and takes none.
    Raises UserError for a folder that mcmoe did not make, unusable text or options out of range.
    """
    _require_usable(target_drop, rule, samples, seed)
    checkpoint = _uncalibrated(open_checkpoint(folder))
    read_config(checkpoint)  # refuses a folder that mcmoe did not make
    require_changeable(checkpoint.path / "config.json")
    model = open_model(checkpoint, device)
    require_prunable(model)
    tokenizer = load_tokenizer(checkpoint.path, trust_remote_code)
    length = window_length(model.config, sequence_length)
    with Progress() as progress:
        tokens = sample_windows(text, tokenizer, samples, length, seed, progress.say)
        require_known_tokens(tokens, model.vocabulary, checkpoint.path)
        table = calibrate_pruning(model, tokens, target_drop or TARGET_DROP, rule, progress)
    store_table(checkpoint, table)
    return table


def _require_usable(target_drop: float | None, rule: str, samples: int, seed: int) -> None:
    wrong = [
        *out_of_range("samples", samples, 1, MAX_WINDOWS),
        *out_of_range("seed", seed, 0, MAX_SEED),
    ]
    if target_drop is not None and not 0 < target_drop <= MAX_DROP:
        wrong.append(f"target_drop is {target_drop}, allowed are shares up to {MAX_DROP}")
    if rule not in RULES:
        wrong.append(f"rule is {rule!r:.40}, allowed are {list(RULES)}")
    elif rule == "median" and target_drop is not None:
        wrong.append(
            f"target_drop is {target_drop}, but the rule median drops what lies below the layers' "
            "medians; leave out one of the two"
        )
    if wrong:
        raise UserError("\n".join(wrong))


def _uncalibrated(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without its table, which may be the broken one that is to be replaced."""
    settings = checkpoint.config.get("quantization_config")
    if not isinstance(settings, dict):
        return checkpoint
    config = {**checkpoint.config, "quantization_config": {**settings, "pruning": None}}
    return replace(checkpoint, config=config)


def store_table(checkpoint: Checkpoint, table: PruningTable) -> None:
    """Put a table into the config.json of a compressed checkpoint."""
    quantization = QuantizationConfig.from_dict(checkpoint.config["quantization_config"])
    calibrated = replace(quantization, pruning=table)
    config = {**checkpoint.config, "quantization_config": calibrated.to_dict()}
    with explain_os_errors(f"writing {checkpoint.path / 'config.json'}"):
        write_json(checkpoint.path / "config.json", config)
