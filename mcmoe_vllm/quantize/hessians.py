"""Second moments of what experts are given: X^T X of their calibration tokens."""

from collections.abc import Sequence

import torch

from mcmoe_vllm.model.experts import Activation, Routing, expert_hidden
from mcmoe_vllm.quantize.precision import fast_products

# Fewer rows than this leave a Hessian that says little; the expert is completed with tokens of
# others and reported.
MIN_TOKENS = 256
ROWS = 8192  # tokens that go through an expert, or into X^T X, at once
CHUNK_BYTES = 4 << 30  # scratch memory of a batch of experts


def starved_experts(tokens: Sequence[int]) -> list[int]:
    """Experts that calibration hardly reached."""
    return [e for e, n in enumerate(tokens) if n < MIN_TOKENS]


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
    biases: Sequence[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Z^T Z and Y^T Z [C, I, I] of what w2 is given by one w13 (Z) and by another (Y), weights
    [C, 2I, H]; one sum serves as both where the two are one tensor. exact: as in `input_hessians`,
    what the other w13 is given; biases: of each expert's w13, [2I], if there are any."""
    found = []
    biases = biases or [None] * len(experts)
    for position, expert in enumerate(experts):
        rows, scale = calibration_weights(routing, expert, weighting)
        width, bias = given.shape[1] // 2, biases[position]
        own = torch.zeros(width, width, device=given.device)
        cross = own if wanted is given and exact is None else torch.zeros_like(own)
        for part, share in zip(rows.split(ROWS), scale.split(ROWS), strict=True):
            x, share = routing.hidden[part].to(given.device), share.to(given.device)
            bias = None if bias is None else bias.to(x)
            z = expert_hidden(x, given[position].to(x.dtype), activation, bias) * share
            own.addmm_(z.t().float(), z.float())
            if cross is not own:
                x = x if exact is None else exact[part.to(exact.device)].to(x)
                y = expert_hidden(x, wanted[position].to(x.dtype), activation, bias) * share
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
