"""A width for gate and up and one for down of every expert, at equal true bits."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mcmoe_vllm.allocate.budget import BUDGET_SLACK, Scope
from mcmoe_vllm.allocate.knapsack import choose
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.widths import group_words, matrix_widths


def projection_costs(
    projection_errors: np.ndarray, sensitivities: np.ndarray, candidate_bits: Sequence[int]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Costs in nats [L, E, C] of every pair of widths (w13, w2), and the pairs.

    projection_errors [L, E, B, 2]: change of the block's output with w13, with w2 quantized alone;
    sensitivities [L]: KL that a unit of squared change causes. The two errors add as squares. An
    expert is dropped in both or in neither.
    """
    columns = range(len(candidate_bits))
    pairs = [
        (a, b) for a in columns for b in columns
        if (candidate_bits[a] == 0) == (candidate_bits[b] == 0)
    ]  # fmt: skip
    squares = np.square(projection_errors)
    costs = np.stack([squares[..., a, 0] + squares[..., b, 1] for a, b in pairs], axis=-1)
    widths = [(candidate_bits[a], candidate_bits[b]) for a, b in pairs]
    return costs * np.asarray(sensitivities)[:, None, None], widths


def allocate_projections(
    costs: np.ndarray,
    widths: Sequence[tuple[int, int]],
    bits: float,
    group_size: Mapping[str, int],
    *,
    scope: Scope,
    pins: Mapping[tuple[int, int], int] | None = None,
) -> tuple[tuple[tuple[tuple[int, int], ...], ...], float]:
    """Choose (w13, w2) of every expert, least total cost at equal true bits; and that cost.

    costs [L, E, C] as from `projection_costs`, for the C pairs `widths`; bits: average of the
    codes that a uniform width would have, whose scales and zeros are in the budget too: a dropped
    expert saves both. group_size: of w13 and of w2. scope: one budget per layer or for all; pins:
    as in `allocate_bits`.
    Raises UserError if pins leave too little.
    """
    costs = np.array(costs, dtype=np.float64)
    for (row, expert), width in (pins or {}).items():
        costs[row, expert, [pair != (width, width) for pair in widths]] = np.inf
    # In words of 16 bits a group: scale and zero take one.
    groups = (group_size["w13"], group_size["w2"])
    columns = max(groups)
    overhead = sum(columns // size for size in matrix_widths(groups)) / 3
    sizes = [group_words(pair, *groups) for pair in widths]
    problems = costs.reshape(1, -1, len(widths)) if scope == "global" else costs
    budget = math.floor(3 * (bits * (columns // 16) + overhead) * problems.shape[1] + BUDGET_SLACK)
    try:
        choice = np.concatenate([choose(problem, sizes, budget) for problem in problems])
    except ValueError:
        raise UserError(
            f"{bits} bits are below the smallest budget that the pins leave. Pin fewer experts, "
            "or ask for more bits."
        ) from None
    shaped = choice.reshape(costs.shape[:2])
    objective = float(np.take_along_axis(costs, shaped[..., None], axis=-1).sum())
    return tuple(tuple(widths[c] for c in row) for row in shaped), objective
