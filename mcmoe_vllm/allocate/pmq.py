"""Choose a bit width for every expert: factors + bit budget -> bits[layer][expert].

    factors.json -> expert_costs [L, E, B] -> allocate_bits -> Allocation.bits [L][E]

The problem is the integer program of PMQ (arXiv 2410.06270, Eq. 4): one width per expert, least
total cost, sum of the widths within a budget, at least one 3-bit and one 2-bit expert per layer.
Shapes: L mixture layers, E experts per layer, B candidate widths, n experts of one problem.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mcmoe_vllm.allocate.budget import (
    Scope,
    parse_pins,
    require_candidates,
    require_scope,
)
from mcmoe_vllm.allocate.factors import expert_costs, read_factors
from mcmoe_vllm.allocate.knapsack import choose_by_price
from mcmoe_vllm.disk import explain_os_errors, replacing
from mcmoe_vllm.errors import UserError, some
from mcmoe_vllm.places import require_result

FLOOR_WIDTHS = (3, 2)  # one expert of each per layer; the first is kept if only one can be
OBJECTIVE_RANGE = 1e6  # of the costs that HiGHS sees; it ignores gains below 1e-6
RESCALE = 100  # largest cost over the answer's, above which the answer is not sharp enough
ROUNDING = 1e-9  # of a sum of costs, generously


@dataclass(frozen=True)
class Allocation:
    """Chosen widths bits[layer row][expert], their total cost, and how they were found."""

    bits: tuple[tuple[int, ...], ...]
    objective: float
    solver: str
    seconds: float


def allocate_bits(
    costs: np.ndarray,
    candidate_bits: Sequence[int],
    *,
    scope: Scope,
    layer_budget: int | None = None,
    total_budget: int | None = None,
    pins: Mapping[tuple[int, int], int] | None = None,
    floors: bool = True,
) -> Allocation:
    """Choose the widths of least total cost within the budget (PMQ Eq. 4), exactly.

    costs           [L, E, B], finite; column k is the cost at candidate_bits[k] (ascending)
    scope "layer"   every layer is its own problem: summed bits <= layer_budget; with `floors`, at
                    least one 3-bit and one 2-bit expert per layer, as far as these are candidates.
                    A pinned expert counts; a floor that no free expert is left for is waived.
    scope "global"  one problem: bits summed over all layers <= total_budget; no floors
    pins            {(row, expert): bits} fixed in advance

    The answer is deterministic; of experts with equal costs the lower index gets more bits, and no
    expert gets bits that gain nothing. Costs that calibration measures solve in seconds even for 16
    thousand experts; as many experts whose costs are nearly but not exactly equal, with an error
    that is not convex in the bits, can take minutes in scope "global".
    Raises UserError for malformed arguments and for a budget below the smallest possible one.
    """
    start = time.perf_counter()
    costs = np.asarray(costs, dtype=np.float64)
    pins = dict(pins or {})
    candidates = require_candidates(candidate_bits)
    budget = _require_budget(scope, layer_budget, total_budget)
    _require_costs_and_pins(costs, candidates, pins)
    num_layers, num_experts, num_bits = costs.shape

    masked = costs.copy()
    for place, width in pins.items():
        masked[place][[candidate != width for candidate in candidates]] = np.inf
    if scope == "layer":
        problems = [_make_problem(layer, candidates, budget, floors) for layer in masked]
    else:
        flat = masked.reshape(num_layers * num_experts, num_bits)
        problems = [_make_problem(flat, candidates, budget, False)]
    _require_feasible(problems, scope, floors and scope == "layer")

    choice = np.stack([_solve(problem) for problem in problems]).reshape(num_layers, num_experts)
    return _allocation(costs, candidates, choice, _solver_name(), time.perf_counter() - start)


def uniform_allocation(costs: np.ndarray, candidate_bits: Sequence[int], bits: float) -> Allocation:
    """Give every expert the same width; costs [L, E, B] only serve to state the objective.

    For a uniform width with pins, call `allocate_bits(floors=False)`: it keeps to the budget.
    Raises UserError when `bits` is no candidate.
    """
    candidates = require_candidates(candidate_bits)
    costs = np.asarray(costs, dtype=np.float64)
    _require_costs_and_pins(costs, candidates, {})
    if bits not in candidates:
        raise UserError(
            f"bits={bits} cannot be uniform: choose one of the candidates {list(candidates)}."
        )
    choice = np.full(costs.shape[:2], candidates.index(int(bits)))
    return _allocation(costs, candidates, choice, "uniform", 0.0)


def allocate_file(
    factors_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    *,
    scope: Scope = "layer",
    layer_budget: int | None = None,
    total_budget: int | None = None,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
    pins: Sequence[str] = (),
) -> Allocation:
    """Allocate from a factors file and write {"bits", "objective", "solver"} as JSON.

    `pins` are specs as in `parse_pins`, budgets as in `allocate_bits`. The file appears whole or
    not at all. Raises UserError for wrong input and where out_path cannot be written.
    """
    require_result(out_path, factors_path)
    factors = read_factors(factors_path)
    costs = expert_costs(factors, alpha=alpha, beta=beta, gamma=gamma)
    allocation = allocate_bits(
        costs,
        factors.candidate_bits,
        scope=scope,
        layer_budget=layer_budget,
        total_budget=total_budget,
        pins=parse_pins(pins, factors.layers, costs.shape[1], factors.candidate_bits),
    )
    result = {
        "bits": allocation.bits,
        "objective": allocation.objective,
        "solver": allocation.solver,
    }
    with explain_os_errors(f"writing {out_path}"), replacing(out_path) as temporary:
        temporary.write_text(json.dumps(result, allow_nan=False) + "\n", encoding="utf-8")
    return allocation


@dataclass(frozen=True, eq=False)
class _Problem:
    costs: np.ndarray  # [n, B], inf where a pin forbids the column
    widths: np.ndarray  # [B]
    budget: int
    floors: tuple[int, ...]  # columns that at least one expert must take

    @property
    def possible_budgets(self) -> tuple[int, int]:
        """Fewest and most bits that satisfy pins and floors."""
        allowed = np.isfinite(self.costs)
        low = np.where(allowed, self.widths, self.widths[-1]).min(axis=1).sum()
        high = np.where(allowed, self.widths, self.widths[0]).max(axis=1).sum()
        low += sum(self.widths[column] - self.widths[0] for column in self.floors)
        high -= sum(self.widths[-1] - self.widths[column] for column in self.floors)
        return int(low), int(high)


def _make_problem(
    costs: np.ndarray, candidates: tuple[int, ...], budget: int, floors: bool
) -> _Problem:
    taken = [np.flatnonzero(row) for row in np.isfinite(costs)]
    pinned = {int(columns[0]) for columns in taken if len(columns) == 1}
    free = sum(len(columns) > 1 for columns in taken)
    wanted = [candidates.index(w) for w in FLOOR_WIDTHS if floors and w in candidates]
    unmet = [column for column in wanted if column not in pinned]
    return _Problem(costs, np.array(candidates), budget, tuple(unmet[:free]))


def _solve(problem: _Problem) -> np.ndarray:
    """Return the optimal column of each expert, [n].

    Costs count above each expert's cheapest. HiGHS ignores gains below 1e-6; where the answer is
    far below the largest cost, columns that cost more than all of it are left out, as no better
    answer can hold them, and the rest is solved again at its own scale.
    """
    # One integer variable counts the equal experts that take a column: as separate binaries they
    # would be interchangeable, and branching on them endless.
    rows, group, sizes = np.unique(problem.costs, axis=0, return_inverse=True, return_counts=True)
    excess = rows - rows.min(axis=1, keepdims=True)
    limit = excess[np.isfinite(excess)].max()
    if not problem.floors:  # a quick answer's cost is nearer, and spares a second solution
        quick = choose_by_price(problem.costs, problem.widths, problem.budget)
        above = problem.costs - problem.costs.min(axis=1, keepdims=True)
        limit = above[np.arange(len(quick)), quick].sum() * (1 + ROUNDING)
    while True:
        scaled = np.where(excess <= limit, excess * (OBJECTIVE_RANGE / (limit or 1.0)), np.inf)
        counts = _count_takers(scaled, sizes, problem)
        found = float(excess[counts > 0] @ counts[counts > 0])
        if found >= limit / RESCALE or not found:
            break
        limit = found * (1 + ROUNDING)

    choice = np.empty(len(problem.costs), dtype=int)
    columns = np.tile(np.arange(len(problem.widths)), len(rows))
    choice[np.argsort(group.reshape(-1), kind="stable")] = np.repeat(columns, counts.reshape(-1))
    return _widest_first(problem.costs, _narrowest(problem, choice))


def _count_takers(costs: np.ndarray, sizes: np.ndarray, problem: _Problem) -> np.ndarray:
    """Return how many of sizes[g] experts of equal costs[g] take each column, [G, B].

    The integer program: least total cost within the budget, every floor taken. A column of cost
    inf is not allowed.
    """
    mathopt = _import_mathopt()
    model = mathopt.Model()
    takers = {
        (int(index), int(column)): model.add_integer_variable(lb=0, ub=int(sizes[index]))
        for index, column in np.argwhere(np.isfinite(costs))
    }
    of_row: list[list[Any]] = [[] for _ in sizes]
    of_column: list[list[Any]] = [[] for _ in problem.widths]
    for (index, column), count in takers.items():
        of_row[index].append(count)
        of_column[column].append(count)
    for counts, size in zip(of_row, sizes, strict=True):
        model.add_linear_constraint(mathopt.fast_sum(counts) == int(size))
    for column in problem.floors:
        model.add_linear_constraint(mathopt.fast_sum(of_column[column]) >= 1)
    used = [int(problem.widths[column]) * count for (_, column), count in takers.items()]
    model.add_linear_constraint(mathopt.fast_sum(used) <= _reachable_budget(problem))
    model.minimize(mathopt.fast_sum([float(costs[i]) * count for i, count in takers.items()]))

    # A fixed seed and no parallel search: the same answer in every run. HiGHS refuses `threads`.
    parameters = mathopt.SolveParameters(
        random_seed=0, absolute_gap_tolerance=0.0, relative_gap_tolerance=0.0
    )
    parameters.highs.string_options["parallel"] = "off"
    result = mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters)
    if result.termination.reason != mathopt.TerminationReason.OPTIMAL:
        raise RuntimeError(f"HiGHS stopped without an optimum: {result.termination}")
    found = np.zeros(costs.shape, dtype=int)
    for place, count in takers.items():
        found[place] = round(result.variable_values(count))
    return found


def _reachable_budget(problem: _Problem) -> int:
    """Round the budget down to a sum that widths can have: with 0, 2, 4 bits not to an odd one.

    The solver would otherwise count on a last bit that nobody can use, and search without end.
    """
    narrowest, *wider = problem.widths.tolist()
    allowed = np.isfinite(problem.costs)
    least = int(np.where(allowed, problem.widths, problem.widths[-1]).min(axis=1).sum())
    step = math.gcd(*(width - narrowest for width in wider)) or 1
    return least + (problem.budget - least) // step * step


def _narrowest(problem: _Problem, choice: np.ndarray) -> np.ndarray:
    """Take bits back that an expert gains nothing from, unless it alone meets a floor."""
    narrower = choice.copy()
    for expert, (row, column) in enumerate(zip(problem.costs, choice, strict=True)):
        if column not in problem.floors or (narrower == column).sum() > 1:
            narrower[expert] = np.flatnonzero(row == row[column])[0]
    # One that gave a floor's width up may have taken another's, which frees a third.
    return choice if (narrower == choice).all() else _narrowest(problem, narrower)


def _widest_first(costs: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Among experts with equal cost rows, give the lower index the larger column."""
    _, group = np.unique(costs, axis=0, return_inverse=True)
    group = group.reshape(-1)
    ordered = np.empty_like(choice)
    ordered[np.argsort(group, kind="stable")] = choice[np.lexsort((-choice, group))]
    return ordered


def _allocation(
    costs: np.ndarray, candidates: tuple[int, ...], choice: np.ndarray, solver: str, seconds: float
) -> Allocation:
    chosen = np.take_along_axis(costs, choice[..., None], axis=-1)
    bits = np.array(candidates)[choice].tolist()
    # fsum: the objective does not depend on numpy's order of summation.
    objective = math.fsum(chosen.ravel().tolist())
    return Allocation(tuple(map(tuple, bits)), objective, solver, seconds)


def _import_mathopt() -> Any:
    try:
        from ortools.math_opt.python import mathopt
    except ModuleNotFoundError as error:
        raise UserError(
            'Allocating bits needs OR-Tools. Run: pip install "mcmoe-vllm[quantize]"'
        ) from error
    return mathopt


def _solver_name() -> str:
    _import_mathopt()
    import ortools

    return f"ortools-mathopt/highs {ortools.__version__}"


def _require_budget(scope: Scope, layer_budget: int | None, total_budget: int | None) -> int:
    require_scope(scope)
    needed, other = ("layer_budget", "total_budget")[:: 1 if scope == "layer" else -1]
    given = {"layer_budget": layer_budget, "total_budget": total_budget}
    problems = []
    budget = given[needed]
    if not isinstance(budget, int | np.integer) or isinstance(budget, bool):
        problems.append(f"{needed}={budget}: give a whole number of bits")
    if given[other] is not None:
        problems.append(f"{other}={given[other]}: leave it out")
    if budget is None or problems:
        raise UserError(f"The budget does not suit scope={scope!r}: {some(problems)}")
    return int(budget)


def _require_costs_and_pins(
    costs: np.ndarray, candidates: tuple[int, ...], pins: Mapping[tuple[int, int], int]
) -> None:
    if costs.ndim != 3 or costs.shape[-1] != len(candidates) or 0 in costs.shape:
        raise UserError(
            f"costs has shape {costs.shape}: it must be [layers, experts, "
            f"{len(candidates)}] with one column for each candidate of {list(candidates)}."
        )
    num_layers, num_experts, _ = costs.shape
    problems = [
        f"costs[{row}, {expert}]: {costs[row, expert].tolist()} is not finite"
        for row, expert in np.argwhere(~np.isfinite(costs).all(axis=-1))
    ]
    for (row, expert), width in pins.items():
        if not (0 <= row < num_layers and 0 <= expert < num_experts):
            problems.append(
                f"pin ({row}, {expert}): rows are 0..{num_layers - 1}, experts 0..{num_experts - 1}"
            )
        if width not in candidates:
            problems.append(f"pin ({row}, {expert}): {width} is not one of {list(candidates)}")
    if problems:
        raise UserError(f"Cannot allocate bits: {some(problems)}\nCorrect these entries.")


def _require_feasible(problems: Sequence[_Problem], scope: Scope, floors: bool) -> None:
    ranges = [problem.possible_budgets for problem in problems]
    budget = problems[0].budget
    wrong = [
        f"{f'MoE layer {row} (counted from 0)' if scope == 'layer' else 'all layers'}: "
        f"smallest {low}, largest {high}"
        for row, (low, high) in enumerate(ranges)
        if budget < low
    ]
    if wrong:
        name = "layer_budget" if scope == "layer" else "total_budget"
        first = problems[0]
        raise UserError(
            f"{name}={budget} is too small for candidate bits {first.widths.tolist()}"
            f"{', floors' if floors else ''} and pins; possible are {some(wrong)}\n"
            f"Raise {name} to at least {max(low for low, _ in ranges)}, "
            "add a narrower candidate, or remove pins."
        )
