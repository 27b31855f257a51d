"""What each expert is worth: how often it is used, how heavily, and what each width costs.

Paper, section 3.2: activation frequency phi_i, mean routing weight w_i, and eps_ij, the
Frobenius norm of the change of the MoE block's output when expert i alone goes to j bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mcmoe_vllm import quantizer
from mcmoe_vllm.precision import fast_products
from mcmoe_vllm.recipes import BEST, Recipe
from mcmoe_vllm.streaming import Routing, expert_hidden, run_expert

# Fewer rows than this leave a Hessian that says little; the expert is completed with tokens of
# others and reported.
MIN_TOKENS = 256
ROWS = 8192  # tokens that go through an expert, or into X^T X, at once
CHUNK_BYTES = 4 << 30  # scratch memory of a batch of experts

Activation = Callable[[torch.Tensor], torch.Tensor]


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


def starved_experts(tokens: Sequence[int]) -> list[int]:
    """Experts that calibration hardly reached."""
    return [e for e, n in enumerate(tokens) if n < MIN_TOKENS]


def concatenate(routings: Sequence[Routing]) -> Routing:
    """The routings of all blocks as one."""
    return Routing(
        torch.cat([r.hidden for r in routings]),
        torch.cat([r.ids for r in routings]),
        torch.cat([r.weights for r in routings]),
    )


def count_tokens(routing: Routing, num_experts: int) -> list[int]:
    return torch.bincount(routing.ids.flatten(), minlength=num_experts).tolist()


def calibration_rows(routing: Routing, expert: int) -> torch.Tensor:
    """The rows of `routing.hidden` that calibrate an expert: its own, completed by an even
    choice among all tokens if it has fewer than MIN_TOKENS."""
    rows, _ = routing.tokens_of(expert)
    total = routing.hidden.shape[0]
    wanted = min(MIN_TOKENS, total)
    if rows.numel() >= wanted:
        return rows
    others = torch.arange(wanted - rows.numel(), device=rows.device)
    return torch.cat([rows, others * total // max(others.numel(), 1)])


@fast_products
def gram(rows: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """X^T X in float32 for rows X [T, K], or Y^T X for others Y [T, K], which may be in main memory
    while X is not."""
    k = rows.shape[1]
    total = torch.zeros(k, k, device=rows.device)
    for part, other in zip(
        rows.split(ROWS), (rows if others is None else others).split(ROWS), strict=True
    ):
        part = part.float()
        total.addmm_((part if others is None else other.to(part)).t(), part)
    return total


def shared_gram(
    routing: Routing, tokens: int, device: torch.device, exact: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean of x x^T over all tokens, times `tokens`: [H, H]. exact: as in `input_hessians`."""
    if not tokens:
        hidden = routing.hidden.shape[1]
        return torch.zeros(hidden, hidden, device=device)
    return gram(routing.hidden.to(device), exact) * (tokens / len(routing.hidden))


def input_hessians(
    routing: Routing,
    experts: Sequence[int],
    weighting: str,
    shared: torch.Tensor,
    exact: torch.Tensor | None = None,
) -> torch.Tensor:
    """X^T X [C, H, H] of what experts are given, and the layer's `shared_gram`, on its device: few
    tokens say little of an expert's inputs, and all experts of a layer see similar ones.

    weighting: as `Recipe.hessian_weighting`. exact: what the 16-bit model's tokens are there,
    [T, H]; then Y^T X with these as Y.
    """
    found = []
    for expert in experts:
        rows, scale = calibration_weights(routing, expert, weighting)
        own = (routing.hidden[rows] * scale).to(shared.device)
        others = None if exact is None else exact[rows.to(exact.device)] * scale.to(exact)
        found.append(gram(own, others) + float(scale.float().square().mean()) * shared)
    return torch.stack(found)


def calibration_weights(
    routing: Routing, expert: int, weighting: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that calibrate an expert, [T], and what to multiply each with, [T, 1]."""
    rows = calibration_rows(routing, expert)
    scale = torch.ones(len(rows), 1, device=rows.device, dtype=routing.hidden.dtype)
    own = routing.tokens_of(expert)[1]
    if weighting == "routing" and own.numel():
        scale[: own.numel()] = own.to(scale).unsqueeze(1)
        scale[own.numel() :] = own.min().to(scale)
    return rows, scale


@fast_products
def inner_hessians(
    routing: Routing,
    experts: Sequence[int],
    given: torch.Tensor,
    wanted: torch.Tensor,
    activation: Activation,
    weighting: str,
    exact: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Z^T Z and Y^T Z [C, I, I] of what w2 is given by one w13 (Z) and by another (Y), weights
    [C, 2I, H]; one sum serves as both where the two are one tensor. exact: as in `input_hessians`,
    what the other w13 is given."""
    found = []
    for position, expert in enumerate(experts):
        rows, scale = calibration_weights(routing, expert, weighting)
        width = given.shape[1] // 2
        own = torch.zeros(width, width, device=given.device)
        cross = own if wanted is given and exact is None else torch.zeros_like(own)
        for part, share in zip(rows.split(ROWS), scale.split(ROWS), strict=True):
            x, share = routing.hidden[part].to(given.device), share.to(given.device)
            z = expert_hidden(x, given[position].to(x.dtype), activation) * share
            own.addmm_(z.t().float(), z.float())
            if cross is not own:
                x = x if exact is None else exact[part.to(exact.device)].to(x)
                y = expert_hidden(x, wanted[position].to(x.dtype), activation) * share
                cross.addmm_(y.t().float(), z.float())
        found.append((own, cross))
    hessians, crosses = zip(*found, strict=True)
    hessian = torch.stack(hessians)
    return hessian, hessian if crosses[0] is hessians[0] else torch.stack(crosses)


def expert_chunks(
    num_experts: int, hidden: int, width: int, limit: int = CHUNK_BYTES
) -> list[range]:
    """Experts to quantize together: as many as the scratch memory allows, at least one.

    hidden, width: H and I; a batch holds about eight float32 copies of the weights and four of
    the Hessians.
    """
    bytes_each = 4 * (8 * 3 * hidden * width + 4 * (hidden**2 + width**2))
    size = max(1, min(num_experts, limit // bytes_each))
    return [range(i, min(i + size, num_experts)) for i in range(0, num_experts, size)]


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
            quantizer.factor_hessian(h) if recipe.error_method == "gptq" else h
            for h in (hessian13, hessian2)
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
