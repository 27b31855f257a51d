"""What each expert is worth: how often it is used, how heavily, and what each width costs.

Paper, section 3.2: activation frequency phi_i, mean routing weight w_i, and eps_ij, the
Frobenius norm of the change of the MoE block's output when expert i alone goes to j bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mcmoe_vllm.compress.recipes import BEST, Recipe
from mcmoe_vllm.model.streaming import Routing, run_expert
from mcmoe_vllm.quantize import quantizer
from mcmoe_vllm.quantize.gptq import factor_hessian
from mcmoe_vllm.quantize.hessians import (
    ROWS,
    Activation,
    count_tokens,
    expert_chunks,
    inner_hessians,
    input_hessians,
    shared_gram,
    starved_experts,
)


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


@torch.no_grad()
def measure_layer(
    layer: int,
    routing: Routing,
    read_expert: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    num_experts: int,
    candidate_bits: Sequence[int],
    group_size: int,
    activation: Activation,
    recipe: Recipe = BEST,
    *,
    scores: torch.Tensor | None = None,
    window: int | None = None,
    probe: int | None = None,
    probe_tokens: int | None = None,
) -> tuple[LayerSignificance, torch.Tensor, torch.Tensor]:
    """Measure one layer and compute its routed experts' output, float32 [T, H], and the change of
    it if all experts are quantized at candidate number `probe` (none for None). Errors and change
    are of the first `probe_tokens` tokens alone (default: of all).

    routing: all calibration tokens; read_expert: expert -> (w13 [2I, H], w2 [H, I]);
    recipe: its traits of significance; scores [T, k]: what `routing_weight` sums (default: the
    routing's weights); window: tokens of a window, for the error norm "windows".
    """
    scored = routing if scores is None else replace(routing, weights=scores)
    if recipe.error_norm == "total" or window is None:
        window = routing.hidden.shape[0]
    windows = -(-routing.hidden.shape[0] // window)
    tokens = count_tokens(routing, num_experts)
    total = routing.hidden.shape[0]
    output = torch.zeros_like(routing.hidden, dtype=torch.float32)
    errors: list[list[float]] = []
    projection_errors: list[list[list[float]]] = []
    trace_errors: list[list[float]] = []
    limit = total if probe_tokens is None else probe_tokens
    changes = torch.zeros_like(output[: 0 if probe is None else limit])
    weight_sums: list[float] = []
    rounding_kept = matrices = 0
    how: dict[str, Any] = {
        "method": recipe.error_method,
        "recipe": replace(recipe, refinements=recipe.error_refinements),
    }
    first = read_expert(0)
    shared = shared_gram(routing, recipe.shared_tokens, first[0].device)
    for chunk in expert_chunks(num_experts, *_hidden_and_width(first)):
        pairs = [read_expert(e) for e in chunk]
        w13, w2 = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
        del pairs
        weighting = recipe.hessian_weighting
        hessian13 = input_hessians(routing, chunk, weighting, shared)
        hessian2, _ = inner_hessians(routing, chunk, w13, w13, activation, weighting)
        traces = [h.diagonal(dim1=1, dim2=2).mean(1) for h in (hessian13, hessian2)]
        factored13, factored2 = (
            factor_hessian(h) if recipe.error_method == "gptq" else h for h in (hessian13, hessian2)
        )
        candidates: list[tuple[torch.Tensor, torch.Tensor] | None] = []  # None: dropped
        for bits in candidate_bits:
            if bits == 0:
                candidates.append(None)
                continue
            q13 = quantizer.quantize(w13, factored13, bits, group_size, splits=2, **how)
            q2 = quantizer.quantize(w2, factored2, bits, group_size, **how)
            candidates.append((q13.dequantize(), q2.dequantize()))
            rounding_kept += int((~q13.gptq_kept).sum() + (~q2.gptq_kept).sum())
            matrices += q13.gptq_kept.numel() + q2.gptq_kept.numel()
        del hessian13, hessian2, factored13, factored2
        for position, expert in enumerate(chunk):
            rows, weights = routing.tokens_of(expert)
            trace_errors.append(
                [
                    sum(
                        float(trace[position] * (w[position] - d[position]).square().sum())
                        if d is not None
                        else float(trace[position] * w[position].square().sum())
                        for trace, w, d in zip(traces, (w13, w2), pair or (None, None), strict=True)
                    )
                    for pair in candidates
                ]
            )
            weight_sums.append(float(scored.tokens_of(expert)[1].float().sum()))
            parts = 2 if recipe.allocation == "sensitivity" else 1
            squares = torch.zeros(len(candidates), parts, windows, dtype=torch.float64)
            exact = (w13[position], w2[position])
            for part in torch.arange(rows.numel(), device=rows.device).split(ROWS):
                x = routing.hidden[rows[part]].to(w13.device)
                scale = weights[part].float().to(w13.device).unsqueeze(1)
                y = _weighted_output(x, scale, *exact, activation)
                output.index_add_(0, rows[part], y.to(output.device))
                probed = rows[part][: int((rows[part] < limit).sum())]  # rows ascend
                x, scale, y = (t[: len(probed)] for t in (x, scale, y))
                for column, pair in enumerate(candidates):
                    for number, weight in enumerate(_changed(exact, pair, position, parts)):
                        if weight is None:
                            change = -y
                        else:
                            change = _weighted_output(x, scale, *weight, activation) - y
                        of_rows = change.double().square().sum(1).cpu()
                        squares[column, number].index_add_(0, probed.cpu() // window, of_rows)
                        if column == probe:
                            changes.index_add_(0, probed, change.to(changes.device))
            norms = squares.sqrt().sum(2)
            errors.append(norms.square().sum(1).sqrt().tolist())
            projection_errors.append(norms.tolist() if parts == 2 else [])
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
    return significance, output, changes


def _changed(
    exact: tuple[torch.Tensor, torch.Tensor],
    quantized: tuple[torch.Tensor, torch.Tensor] | None,
    position: int,
    parts: int,
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """The expert's weights as a candidate leaves them: both changed, or each alone. None: dropped,
    which counts as the first's error."""
    if quantized is None:
        return [None, exact][:parts]
    w13, w2 = quantized[0][position], quantized[1][position]
    return [(w13, w2)] if parts == 1 else [(w13, exact[1]), (exact[0], w2)]


def _weighted_output(
    x: torch.Tensor, scale: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, act: Activation
) -> torch.Tensor:
    return run_expert(x, w13.to(x.dtype), w2.to(x.dtype), act).float() * scale


def _hidden_and_width(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, int]:
    return pair[1].shape[0], pair[1].shape[1]
