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
from mcmoe_vllm.disk import explain_os_errors, replacing, require_file
from mcmoe_vllm.errors import UserError, some

FLOOR_WIDTHS = (3, 2)  # one expert of each per layer; the first is kept if only one can be


ROUNDING = 1e-14  # noise of a reduced cost, for costs scaled to a largest value of 1


OBJECTIVE_RANGE = 1e4  # HiGHS ignores gains below 1e-6: this makes them 1e-10 of the open gap


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

    The answer is deterministic; of experts with equal costs the lower index gets more bits. Costs
    that calibration measures solve in seconds even for 16 thousand experts; as many experts whose
    costs are nearly but not exactly equal, with an error that is not convex in the bits, can take
    minutes in scope "global".
    Raises UserError for malformed arguments and for a budget below the smallest possible one.
    """
    start = time.perf_counter()
    costs = np.asarray(costs, dtype=np.float64)
    pins = dict(pins or {})
    candidates = require_candidates(candidate_bits)
    budget = _require_budget(scope, layer_budget, total_budget)
    _require_costs_and_pins(costs, candidates, pins)
    num_layers, num_experts, num_bits = costs.shape

    pinned = np.full((num_layers, num_experts), -1)  # column of the pinned width, -1 = free
    for place, width in pins.items():
        pinned[place] = candidates.index(width)
    if scope == "layer":
        problems = [
            _Problem(c, candidates, p, budget, floors) for c, p in zip(costs, pinned, strict=True)
        ]
    else:
        flat = costs.reshape(num_layers * num_experts, num_bits)
        problems = [_Problem(flat, candidates, pinned.reshape(-1), budget, False)]
    _require_feasible(problems, scope)

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
    require_file(out_path)
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
        temporary.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return allocation


@dataclass(frozen=True, eq=False)
class _Problem:
    costs: np.ndarray  # [n, B]
    candidates: tuple[int, ...]
    pinned: np.ndarray  # [n] column of the pinned width, -1 = free
    budget: int
    floors: bool

    @property
    def open_floors(self) -> list[int]:
        """Columns that at least one free expert must take."""
        if not self.floors:
            return []
        columns = [self.candidates.index(w) for w in FLOOR_WIDTHS if w in self.candidates]
        unmet = [column for column in columns if column not in self.pinned]
        return unmet[: int((self.pinned < 0).sum())]

    @property
    def possible_budgets(self) -> tuple[int, int]:
        """Fewest and most bits that satisfy pins and floors."""
        free = int((self.pinned < 0).sum()) - len(self.open_floors)
        fixed = sum(self.candidates[column] for column in self.pinned if column >= 0)
        fixed += sum(self.candidates[column] for column in self.open_floors)
        return fixed + free * self.candidates[0], fixed + free * self.candidates[-1]


def _solve(problem: _Problem) -> np.ndarray:
    """Return the optimal column of each expert, [n].

    A price per bit p (Lagrange multiplier of the budget) turns any feasible x into
        cost(x) = bound + sum of reduced costs of its choices + p * unused bits
    with reduced costs >= 0. So the excess of a known feasible answer over the bound is a limit:
    a choice whose reduced cost alone is above it is in no optimal answer. Dropping those is exact
    and leaves a handful of experts to the integer program, whose objective is that excess, so the
    solver's absolute tolerances are relative to the gap and not to the total cost. Where the limit
    is zero the known answer is proven optimal without a search.
    """
    free = problem.pinned < 0
    bits = np.array(problem.candidates)
    budget = _reachable_budget(problem)
    costs = problem.costs - problem.costs.min()
    costs = costs / (costs.max() or 1.0)
    allowed = free[:, None] | (np.arange(len(bits)) == problem.pinned[:, None])  # [n, B]

    price, choice = _relax(costs, allowed, bits, budget)
    reduced = _reduced_costs(costs, allowed, bits, price)
    if not set(problem.open_floors) <= set(choice[free].tolist()):
        taken = _take_floors(reduced, allowed, problem.open_floors, free)
        _, choice = _relax(costs, taken, bits, budget)

    gap = reduced[np.arange(len(choice)), choice].sum() + price * (budget - bits[choice].sum())
    if gap > ROUNDING:
        choice = _search(reduced, bits, price, budget, gap + ROUNDING, free, problem.open_floors)
    choice[free] = _widest_first(problem.costs[free], choice[free])
    return choice


def _reachable_budget(problem: _Problem) -> int:
    """Round the budget down to a sum that widths can have: with 0, 2, 4 bits not to an odd one.

    The bound would otherwise price a last bit that nobody can use, and the search could not close
    that gap.
    """
    pinned = problem.pinned[problem.pinned >= 0].tolist()
    free = len(problem.pinned) - len(pinned)
    narrowest, *wider = problem.candidates
    least = sum(problem.candidates[column] for column in pinned) + free * narrowest
    step = math.gcd(*(width - narrowest for width in wider)) or 1
    most = least + free * (problem.candidates[-1] - narrowest)
    return min(most, least + (problem.budget - least) // step * step)


def _relax(
    costs: np.ndarray, allowed: np.ndarray, bits: np.ndarray, budget: int
) -> tuple[float, np.ndarray]:
    """Return the price per bit of the best Lagrangian bound and a good feasible choice [n]."""

    def cheapest(price: float) -> np.ndarray:
        # Candidates ascend and argmin takes the first: fewest bits of equal cost.
        return np.where(allowed, costs + price * bits, np.inf).argmin(axis=1)

    def bound(price: float) -> float:
        return np.where(allowed, costs + price * bits, np.inf).min(axis=1).sum() - price * budget

    # The choice changes only at prices where two widths of an expert cost the same.
    low, high = np.triu_indices(len(bits), k=1)
    slopes = (costs[:, low] - costs[:, high]) / (bits[high] - bits[low])
    slopes = slopes[allowed[:, low] & allowed[:, high] & (slopes > 0)]
    prices = np.unique(np.concatenate([[0.0], slopes, [2 * slopes.max(initial=1.0)]]))
    dear, cheap = len(prices) - 1, -1  # the dearest price is feasible; search the least such
    while dear - cheap > 1:
        middle = (dear + cheap) // 2
        if bits[cheapest(prices[middle])].sum() <= budget:
            dear = middle
        else:
            cheap = middle
    choice = cheapest(prices[dear])
    if cheap < 0:
        return prices[dear], choice

    # Between the two prices some experts step up; take the first ones that the budget allows.
    upper = cheapest(prices[cheap])
    steps = np.cumsum(bits[upper] - bits[choice])
    fits = steps <= budget - bits[choice].sum()
    choice = np.where(np.logical_and.accumulate(fits), upper, choice)
    choice = _fill(costs, allowed, bits, budget, choice)
    # Rounding can blur which of the two is the breakpoint.
    return max(prices[dear], prices[cheap], key=bound), choice


def _fill(
    costs: np.ndarray, allowed: np.ndarray, bits: np.ndarray, budget: int, choice: np.ndarray
) -> np.ndarray:
    """Spend what is left of the budget on the largest single gains."""
    choice = choice.copy()
    rows = np.arange(len(choice))
    while True:
        fits = bits - bits[choice][:, None] <= budget - bits[choice].sum()
        gains = np.where(allowed & fits, costs[rows, choice][:, None] - costs, 0.0)
        row, column = np.unravel_index(gains.argmax(), gains.shape)
        if gains[row, column] <= 0:
            return choice
        choice[row] = column


def _reduced_costs(
    costs: np.ndarray, allowed: np.ndarray, bits: np.ndarray, price: float
) -> np.ndarray:
    priced = np.where(allowed, costs + price * bits, np.inf)
    return priced - priced.min(axis=1, keepdims=True)


def _take_floors(
    reduced: np.ndarray, allowed: np.ndarray, open_floors: list[int], free: np.ndarray
) -> np.ndarray:
    """Return `allowed` with one cheap free expert bound to each open floor."""
    taken = allowed.copy()
    free = free.copy()
    for column in open_floors:
        row = np.where(free, reduced[:, column], np.inf).argmin()
        taken[row] = np.arange(allowed.shape[1]) == column
        free[row] = False
    return taken


def _search(
    reduced: np.ndarray,
    bits: np.ndarray,
    price: float,
    budget: int,
    limit: float,
    free: np.ndarray,
    open_floors: list[int],
) -> np.ndarray:
    """Minimise reduced costs + price * unused bits over the choices within `limit`; return [n]."""
    mathopt = _import_mathopt()
    choice = reduced.argmin(axis=1)
    is_open = (reduced <= limit).sum(axis=1) > 1
    remaining = budget - int(bits[choice[~is_open]].sum())
    scale = OBJECTIVE_RANGE / limit

    # One integer variable counts the equal experts that take a column: as separate binaries they
    # would be interchangeable, and branching on them endless.
    rows, group = np.unique(reduced[is_open], axis=0, return_inverse=True)
    group = group.reshape(-1)
    model = mathopt.Model()
    used, excess = [], []
    counts: dict[tuple[int, int], Any] = {}
    takers: dict[int, list[Any]] = {column: [] for column in open_floors}
    for index, (row, size) in enumerate(zip(rows, np.bincount(group), strict=True)):
        columns = np.flatnonzero(row <= limit).tolist()
        for column in columns:
            count = model.add_integer_variable(lb=0, ub=int(size))
            counts[index, column] = count
            used.append(int(bits[column]) * count)
            excess.append(float(row[column] * scale) * count)
            takers.get(column, []).append(count)
        model.add_linear_constraint(
            mathopt.fast_sum([counts[index, column] for column in columns]) == int(size)
        )
    most_unused = remaining if price * remaining <= limit else math.floor(limit / price)
    if most_unused > 0:
        unused = model.add_variable(lb=0.0, ub=most_unused)
        used.append(unused)
        excess.append(float(price * scale) * unused)
    model.add_linear_constraint(mathopt.fast_sum(used) == remaining)
    for column, options in takers.items():
        if not (free & ~is_open & (choice == column)).any():
            model.add_linear_constraint(mathopt.fast_sum(options) >= 1)
    model.minimize(mathopt.fast_sum(excess))

    # A fixed seed and no parallel search: the same answer in every run. HiGHS refuses `threads`.
    parameters = mathopt.SolveParameters(
        random_seed=0, absolute_gap_tolerance=0.0, relative_gap_tolerance=0.0
    )
    parameters.highs.string_options["parallel"] = "off"
    result = mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters)
    if result.termination.reason != mathopt.TerminationReason.OPTIMAL:
        raise RuntimeError(f"HiGHS stopped without an optimum: {result.termination}")
    members = np.flatnonzero(is_open)[np.argsort(group, kind="stable")]
    repeats = [round(result.variable_values(count)) for count in counts.values()]
    choice[members] = np.repeat([column for _, column in counts], repeats)
    return choice


def _widest_first(costs: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Among experts with equal cost rows, give the lower index the larger column."""
    if not len(choice):
        return choice
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


def _require_feasible(problems: Sequence[_Problem], scope: Scope) -> None:
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
            f"{name}={budget} is too small for candidate bits {list(first.candidates)}"
            f"{', floors' if first.floors else ''} and pins; possible are {some(wrong)}\n"
            f"Raise {name} to at least {max(low for low, _ in ranges)}, "
            "add a narrower candidate, or remove pins."
        )
