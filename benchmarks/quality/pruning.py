"""What online pruning costs: the calibrated rule beside others.

    python benchmarks/quality/pruning.py MODEL --calibration A.jsonl --text B.jsonl

MODEL is a 16-bit or a compressed folder. Appends rows to benchmarks/results/pruning.jsonl and
prints them. Figures are against the same model unpruned, by the protocol of `mcmoe eval`. --rules:

    default      weight beside the token's largest, thresholds by measured cost: what is served
    tail         the same choice of thresholds for the mass of an expert and all that weigh less;
                 for two experts a token that is the default
    paper        weight beside the largest, medians, renormalized
    fixed        one ratio for all layers, renormalized
    random       by chance

--importance compares ways to tell tokens whose experts are all kept (the top 2 % of calibration
tokens):

    attention    L1 norm of the hidden state times the attention received from later tokens (paper)
    hidden       norm of the hidden state before the layer norm
    key          norm of the key
    output       norm of what the output projection of attention is given
    entropy      of the routing weights

--phases prunes everywhere ("both"), or one half of every window alone and scores the second half:
the first ("prefill": a prompt was pruned, the answer is not) or the second ("decode").
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch.utils.hooks import RemovableHandle

from mcmoe_kernels.pruning import Measure, beside_largest, pair_counts, prune
from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.evaluate.perplexity import WINDOWS, compare
from mcmoe_vllm.model.moe_model import MoeModel, open_model
from mcmoe_vllm.model.runner import final_hidden
from mcmoe_vllm.model.text import load_tokenizer, sample_windows, strided_windows, window_length
from mcmoe_vllm.pruning.calibration import LayerRouting, choose_shares, measure_routing
from mcmoe_vllm.pruning.table import Pruning

RESULTS = Path(__file__).parents[1] / "results" / "pruning.jsonl"
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
FIXED_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
RULES = ("default", "tail", "paper", "fixed", "random")
PROTECTED = 0.02
PHASES = ("both", "prefill", "decode")


@dataclass
class RandomPruning(Pruning):
    """Drops pairs by chance, but not a token's largest. ratios: the chance of each other one."""

    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __call__(
        self, layer: int, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.rand(topk_ids.shape, generator=self.generator).to(topk_ids.device)
        draw.scatter_(1, topk_weights.argmax(1, keepdim=True), 2.0)
        dropped = draw < self.ratios[layer]
        ids = torch.where(dropped, torch.full_like(topk_ids, -1), topk_ids)
        self.routed += ids.numel()
        self.dropped += int(dropped.sum())
        return topk_weights, ids


@dataclass
class ProtectedPruning(Pruning):
    """Prunes only tokens whose importance does not exceed their layer's limit."""

    importance: Importance | None = None
    limits: dict[int, float] = field(default_factory=dict)

    def __call__(
        self, layer: int, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.importance is not None
        weights, ids = prune(topk_weights, topk_ids, self.ratios[layer])
        keep = self.importance(layer, topk_weights) > self.limits[layer]
        ids = torch.where(keep[:, None], topk_ids, ids)
        self.routed += ids.numel()
        self.dropped += int((ids < 0).sum())
        return weights, ids


@dataclass
class PhasePruning(Pruning):
    """Another pruning in the first half of every window ("prefill") or in the second ("decode")."""

    whole: Pruning | None = None
    phase: str = "decode"
    length: int = 0  # of a window

    def __call__(
        self, layer: int, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.whole is not None
        weights, ids = self.whole(layer, topk_weights, topk_ids)
        position = torch.arange(len(ids), device=ids.device) % self.length
        own = (position >= self.length // 2) == (self.phase == "decode")
        routed, dropped = pair_counts(topk_ids[own], ids[own]).tolist()
        self.routed += routed
        self.dropped += dropped
        own = own.unsqueeze(1)
        return torch.where(own, weights, topk_weights), torch.where(own, ids, topk_ids)


class Importance:
    """Each token's importance in the block that runs, tapped from the decoder layers."""

    def __init__(self, loaded: MoeModel, kind: str) -> None:
        self.kind, self.tapped = kind, {}
        tap = getattr(self, f"_tap_{kind}", None)
        layers = loaded.skeleton.body.layers if tap else ()
        self.hooks = [tap(index, layer) for index, layer in enumerate(layers)]

    def __call__(self, layer: int, topk_weights: torch.Tensor) -> torch.Tensor:
        if self.kind == "entropy":
            p = topk_weights.float() / topk_weights.float().sum(1, keepdim=True)
            return -(p * p.clamp(min=1e-9).log()).sum(1)
        return self.tapped[layer]

    def _keep(self, index: int, value: torch.Tensor) -> None:
        self.tapped[index] = value.flatten(0, -2).float().norm(dim=-1)

    def _tap_hidden(self, index: int, layer: Any) -> RemovableHandle:
        norm = layer.post_attention_layernorm
        return norm.register_forward_pre_hook(lambda _, given: self._keep(index, given[0]))

    def _tap_key(self, index: int, layer: Any) -> RemovableHandle:
        k_proj = layer.self_attn.k_proj
        return k_proj.register_forward_hook(lambda _, __, key: self._keep(index, key))

    def _tap_output(self, index: int, layer: Any) -> RemovableHandle:
        o_proj = layer.self_attn.o_proj
        return o_proj.register_forward_pre_hook(lambda _, given: self._keep(index, given[0]))

    def _tap_attention(self, index: int, layer: Any) -> RemovableHandle:
        def tap(module: Any, _: Any, given: dict[str, Any]) -> None:
            hidden = given["hidden_states"]
            received = attention_received(module, hidden, *given["position_embeddings"])
            self.tapped[index] = (hidden.float().norm(p=1, dim=-1) * received).flatten()

        return layer.self_attn.register_forward_pre_hook(tap, with_kwargs=True)

    def release(self) -> None:
        """Tap nothing any more."""
        for hook in self.hooks:
            hook.remove()


def attention_received(
    module: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Mean attention over heads and over the tokens from itself on: [B, L]; paper, equation 6."""
    from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb, repeat_kv

    shape = (*hidden.shape[:2], -1, module.head_dim)
    q, k = module.q_proj(hidden).view(shape), module.k_proj(hidden).view(shape)
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    k = repeat_kv(k, q.shape[1] // k.shape[1])
    length = hidden.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
    scores = (q @ k.transpose(2, 3) * module.scaling).masked_fill(future, float("-inf"))
    received = scores.softmax(-1).mean(1).sum(1)
    return received / torch.arange(length, 0, -1, device=hidden.device)


def tail_mass(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A measure: the mass of the pair and of all that weigh less, and the token's whole mass."""
    ascending, order = weights.sort(dim=-1, stable=True)
    tail = torch.empty_like(weights).scatter_(-1, order, ascending.cumsum(-1))
    # The largest is dropped by no threshold, however the sums round.
    largest = weights.argmax(-1, keepdim=True)
    return tail.scatter_(-1, largest, float("inf")), weights.sum(-1, keepdim=True)


def calibrated(layers: dict[int, LayerRouting], share: float, measure: Measure) -> Pruning:
    """The default's choice of thresholds, for any measure."""
    measured = list(layers.values())
    pairs = zip(layers, measured, choose_shares(measured, share), strict=True)
    return Pruning({i: m.ratio_for(s) for i, m, s in pairs}, measure=measure)


def rules(
    layers: dict[int, LayerRouting], tails: dict[int, LayerRouting], shares: Sequence[float]
) -> list[tuple[str, Pruning]]:
    """Name and pruning of every point of the curves. tails: the routing by `tail_mass`."""
    found: list[tuple[str, Pruning]] = []
    for share in shares:
        found.append(("default", calibrated(layers, share, beside_largest)))
        if tails:
            found.append(("tail", calibrated(tails, share, tail_mass)))
        chance = {i: share * m.activations / len(m.ratios) for i, m in layers.items()}
        found.append(("random", RandomPruning(chance)))
    medians = {i: float(m.ratios[len(m.ratios) // 2]) for i, m in layers.items()}
    found.append(("paper", Pruning(medians, renormalize=True)))
    for ratio in FIXED_RATIOS:
        found.append(("fixed", Pruning(dict.fromkeys(layers, ratio), renormalize=True)))
    return found


def protected(
    loaded: MoeModel, kind: str, tokens: torch.Tensor, ratios: dict[int, float]
) -> ProtectedPruning:
    importance = Importance(loaded, kind)
    seen: dict[int, list[torch.Tensor]] = {}

    class Watch(Pruning):
        def __call__(self, layer: int, topk_weights: Any, topk_ids: Any) -> Any:
            seen.setdefault(layer, []).append(importance(layer, topk_weights).cpu())
            return topk_weights, topk_ids

    final_hidden(loaded, tokens, Watch({}))
    limits = {}
    for layer, values in seen.items():
        everything = torch.cat(values)
        rank = max(1, int((1 - PROTECTED) * len(everything)))
        limits[layer] = float(everything.kthvalue(rank)[0])
    return ProtectedPruning(ratios, importance=importance, limits=limits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument(
        "--importance", nargs="*", default=(),
        choices=("attention", "hidden", "key", "output", "entropy"),
    )  # fmt: skip
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES)
    parser.add_argument("--phases", nargs="+", default=("both",), choices=PHASES)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="recorded in the rows (default: of this checkout)")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(Path(arguments.model))
    loaded = open_model(checkpoint)
    tokenizer = load_tokenizer(Path(arguments.model))
    length = window_length(loaded.config, None)
    tokens = strided_windows(arguments.text, tokenizer, arguments.windows, length)
    calibration = sample_windows(arguments.calibration, tokenizer, arguments.samples, length, 0)
    base = final_hidden(loaded, tokens)
    layers = measure_routing(loaded, calibration, probe=True)
    tails = {}
    if "tail" in arguments.rules:
        tails = measure_routing(loaded, calibration, probe=True, measure=tail_mass)
    run = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    bits = 16.0
    if loaded.quantization is not None:
        bits = float(loaded.quantization.average_bits.get("nominal", 0.0))

    def measure(rule: str, importance: str, pruning: Pruning | None) -> None:
        for phase in arguments.phases:
            measure_phase(rule, importance, pruning, phase)

    def measure_phase(rule: str, importance: str, pruning: Pruning | None, phase: str) -> None:
        scored, start = tokens, 0
        if phase != "both":
            start = length // 2
            scored = tokens[:, start:]
            if pruning is not None:
                pruning = PhasePruning({}, whole=pruning, phase=phase, length=length)
        hidden = base if pruning is None else final_hidden(loaded, tokens, pruning)
        pruned, exact = ([block[:, start:] for block in blocks] for blocks in (hidden, base))
        figures = compare(loaded, pruned, loaded, exact, scored)
        row = {
            "model": Path(arguments.model).name, "bits": bits, "rule": rule,
            "importance": importance, "phase": phase,
            "dropped_fraction": pruning.dropped_fraction if pruning else 0.0, **figures,
            "text": Path(arguments.text).name, "calibration": Path(arguments.calibration).name,
            "windows": len(tokens), "sequence_length": length, "run": run,
            **machine(arguments.commit),
        }  # fmt: skip
        with arguments.results.open("a") as f:
            f.write(json.dumps(row) + "\n")
        lost = 100 * (figures["perplexity"] / figures["base_perplexity"] - 1)
        print(
            f"{row['model']} {rule:8} {importance:9} {phase:7} "
            f"dropped {row['dropped_fraction']:.3f} perplexity {lost:+.3f} % +- "
            f"{100 * figures['paired_stderr']:.3f} KL {figures['kl']:.5f}",
            flush=True,
        )

    measure("none", "none", None)
    for rule, pruning in rules(layers, tails, arguments.shares):
        if rule in arguments.rules:
            measure(rule, "none", pruning)
    for kind in arguments.importance:
        for share in (0.15, 0.2, 0.25):
            ratios = calibrated(layers, share / (1 - PROTECTED), beside_largest).ratios
            pruning = protected(loaded, kind, calibration, dict(ratios))
            measure("default", kind, pruning)
            assert pruning.importance is not None
            pruning.importance.release()


if __name__ == "__main__":
    main()
