"""What each expert is worth: how often it is used, how heavily, and what each width costs.

Paper, section 3.2: activation frequency phi_i, mean routing weight w_i, and eps_ij, the
Frobenius norm of the change of the MoE block's output when expert i alone goes to j bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mcmoe_vllm.model.experts import Activation, Expert, Routing, count_tokens, run_expert
from mcmoe_vllm.quantize import quantizer
from mcmoe_vllm.quantize.gptq import factor_hessian
from mcmoe_vllm.quantize.hessians import (
    ROWS,
    expert_chunks,
    inner_hessians,
    input_hessians,
    shared_gram,
    starved_experts,
)
from mcmoe_vllm.recipes import BEST, Recipe

Pair = tuple[torch.Tensor, torch.Tensor]  # w13 and w2


@dataclass(frozen=True)
class LayerSignificance:
    """One layer's factors, a list entry per expert.

    tokens: calibration tokens routed to the expert; frequency: tokens / all tokens;
    routing_weight: sum of the weights it was given / all tokens;
    reconstruction_error[expert][candidate]: eps, Frobenius norm over the tokens probed;
    projection_errors[expert][candidate]: the same with w13 alone and with w2 alone quantized, for
    the allocation "sensitivity"; empty for "pmq";
    trace_error[expert][candidate]: sum over the matrices of the Hessian's mean diagonal times the
    squared change of the weights (HAWQ-V2's estimate of eps^2, for comparison);
    sensitivity: KL in nats per token that a unit of squared error of the output causes, None for
    "pmq".
    """

    layer: int
    tokens: list[int]
    frequency: list[float]
    routing_weight: list[float]
    reconstruction_error: list[list[float]]
    projection_errors: list[list[list[float]]]
    trace_error: list[list[float]]
    rounding_kept: int
    matrices: int
    sensitivity: float | None = None

    @property
    def starved(self) -> list[int]:
        return starved_experts(self.tokens)


@dataclass(frozen=True)
class Probe:
    """What besides the factors is measured. scores [T, k]: what `routing_weight` sums, None for the
    routing's weights; window: tokens of a window, for the error norm "windows"; tokens: errors are
    of so many first tokens, None for all; candidate: whose change of the output is summed up over
    all experts, None for no candidate's."""

    scores: torch.Tensor | None = None
    window: int | None = None
    tokens: int | None = None
    candidate: int | None = None


OF_EVERYTHING = Probe()


@torch.no_grad()
def measure_layer(
    layer: int,
    routing: Routing,
    experts: Callable[[int], Expert],
    num_experts: int,
    candidate_bits: Sequence[int],
    group_size: Mapping[str, int],
    activation: Activation,
    recipe: Recipe = BEST,
    probe: Probe = OF_EVERYTHING,
) -> tuple[LayerSignificance, torch.Tensor, torch.Tensor]:
    """Measure one layer and compute its routed experts' output, float32 [T, H], and the change of
    it if all experts are quantized at the probed candidate, of the probed tokens.

    routing: all calibration tokens; experts: their weights, float32 on the device that computes;
    recipe: its traits of significance.
    """
    total = routing.hidden.shape[0]
    scored = routing if probe.scores is None else replace(routing, weights=probe.scores)
    sums = _OutputSums.of(routing, len(candidate_bits), recipe, probe)
    errors: list[list[float]] = []
    projection_errors: list[list[list[float]]] = []
    trace_errors: list[list[float]] = []
    weight_sums: list[float] = []
    rounding_kept = matrices = 0
    first = experts(0)
    shared = shared_gram(routing, recipe.shared_tokens, first.w13.device)
    for chunk in expert_chunks(num_experts, *first.w2.shape):
        batch = [experts(e) for e in chunk]
        w13, w2 = torch.stack([e.w13 for e in batch]), torch.stack([e.w2 for e in batch])
        weighting = recipe.hessian_weighting
        hessian13 = input_hessians(routing, chunk, weighting, shared)
        biases = [e.w13_bias for e in batch]
        hessian2, _ = inner_hessians(routing, chunk, w13, w13, activation, weighting, biases=biases)
        traces = [h.diagonal(dim1=1, dim2=2).mean(1) for h in (hessian13, hessian2)]
        candidates, kept = _quantize_candidates(
            (w13, w2), (hessian13, hessian2), candidate_bits, group_size, recipe
        )
        del hessian13, hessian2
        rounding_kept += sum(int((~k).sum()) for k in kept)
        matrices += sum(k.numel() for k in kept)
        for position, expert in enumerate(chunk):
            exact = batch[position]
            quantized = [p and (p[0][position], p[1][position]) for p in candidates]
            trace_errors.append(_trace_errors([t[position] for t in traces], exact, quantized))
            weight_sums.append(float(scored.tokens_of(expert)[1].float().sum()))
            norms = sums.add(expert, exact, quantized, activation)
            errors.append(norms.square().sum(1).sqrt().tolist())
            projection_errors.append(norms.tolist() if norms.shape[1] == 2 else [])
    tokens = count_tokens(routing, num_experts)
    significance = LayerSignificance(
        layer=layer,
        tokens=tokens,
        frequency=[n / total for n in tokens],
        routing_weight=[w / total for w in weight_sums],
        reconstruction_error=errors,
        projection_errors=projection_errors,
        trace_error=trace_errors,
        rounding_kept=rounding_kept,
        matrices=matrices,
    )
    return significance, sums.output, sums.changes


def _quantize_candidates(
    weights: Pair,
    hessians: Pair,
    candidate_bits: Sequence[int],
    group_size: Mapping[str, int],
    recipe: Recipe,
) -> tuple[list[Pair | None], list[torch.Tensor]]:
    """A batch of experts at every candidate, dequantized (None: dropped), and where GPTQ was kept.

    weights: [C, 2I, H] and [C, H, I]; hessians: of their inputs.
    """
    how: dict[str, Any] = {
        "method": recipe.error_method,
        "recipe": replace(recipe, refinements=recipe.error_refinements),
    }
    factored13, factored2 = (
        factor_hessian(h) if recipe.error_method == "gptq" else h for h in hessians
    )
    candidates: list[Pair | None] = []
    kept = []
    for bits in candidate_bits:
        if bits == 0:
            candidates.append(None)
            continue
        q13 = quantizer.quantize(weights[0], factored13, bits, group_size["w13"], splits=2, **how)
        q2 = quantizer.quantize(weights[1], factored2, bits, group_size["w2"], **how)
        candidates.append((q13.dequantize(), q2.dequantize()))
        kept += [q13.gptq_kept, q2.gptq_kept]
    return candidates, kept


def _trace_errors(
    traces: Sequence[torch.Tensor], exact: Expert, candidates: Sequence[Pair | None]
) -> list[float]:
    """`LayerSignificance.trace_error` of one expert. traces: the mean diagonals, of w13 and w2."""
    return [
        sum(
            float(trace * (w if d is None else w - d).square().sum())
            for trace, w, d in zip(traces, (exact.w13, exact.w2), pair or (None, None), strict=True)
        )
        for pair in candidates
    ]


@dataclass(frozen=True)
class _OutputSums:
    """What the experts of a layer add up to: output [T, H], and the probed candidate's changes of
    it [probed tokens, H]. parts: 2 if w13 and w2 are measured apart; window: tokens whose squared
    errors are summed before the norm is taken."""

    routing: Routing
    output: torch.Tensor
    changes: torch.Tensor
    candidates: int
    parts: int
    window: int
    limit: int
    probed: int | None

    @classmethod
    def of(cls, routing: Routing, candidates: int, recipe: Recipe, probe: Probe) -> _OutputSums:
        total = routing.hidden.shape[0]
        limit = total if probe.tokens is None else probe.tokens
        output = torch.zeros_like(routing.hidden, dtype=torch.float32)
        changes = torch.zeros_like(output[: 0 if probe.candidate is None else limit])
        window = total if recipe.error_norm == "total" else probe.window or total
        parts = 2 if recipe.allocation == "sensitivity" else 1
        return cls(routing, output, changes, candidates, parts, window, limit, probe.candidate)

    def add(
        self, expert: int, exact: Expert, quantized: Sequence[Pair | None], activation: Activation
    ) -> torch.Tensor:
        """An expert's part of all sums; the norm of what each candidate changes, float64
        [candidates, parts]."""
        rows, weights = self.routing.tokens_of(expert)
        windows = -(-self.routing.hidden.shape[0] // self.window)
        squares = torch.zeros(self.candidates, self.parts, windows, dtype=torch.float64)
        device = exact.w13.device
        for part in torch.arange(rows.numel(), device=rows.device).split(ROWS):
            x = self.routing.hidden[rows[part]].to(device)
            scale = weights[part].float().to(device).unsqueeze(1)
            y = _weighted_output(x, scale, exact, activation)
            self.output.index_add_(0, rows[part], y.to(self.output.device))
            probed = rows[part][: int((rows[part] < self.limit).sum())]  # rows ascend
            x, scale, y = (t[: len(probed)] for t in (x, scale, y))
            for column, pair in enumerate(quantized):
                for number, weight in enumerate(_changed(exact, pair, self.parts)):
                    change = -y
                    if weight is not None:
                        change = _weighted_output(x, scale, weight, activation) - y
                    of_rows = change.double().square().sum(1).cpu()
                    squares[column, number].index_add_(0, probed.cpu() // self.window, of_rows)
                    if column == self.probed:
                        self.changes.index_add_(0, probed, change.to(self.changes.device))
        return squares.sqrt().sum(2)


def _changed(exact: Expert, quantized: Pair | None, parts: int) -> list[Expert | None]:
    """The expert's weights as a candidate leaves them: both changed, or each alone. None: dropped,
    which counts as the first's error."""
    if quantized is None:
        return [None, exact][:parts]
    w13, w2 = quantized
    if parts == 1:
        return [replace(exact, w13=w13, w2=w2)]
    return [replace(exact, w13=w13), replace(exact, w2=w2)]


def _weighted_output(
    x: torch.Tensor, scale: torch.Tensor, expert: Expert, activation: Activation
) -> torch.Tensor:
    return run_expert(x, expert.to(x.device, x.dtype), activation).float() * scale
