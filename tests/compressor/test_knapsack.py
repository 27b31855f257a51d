"""The knapsack against enumeration."""

import itertools

import numpy as np
import pytest

from mcmoe_vllm.allocate import knapsack
from mcmoe_vllm.allocate.knapsack import choose


def enumerate_choices(costs, sizes, budget, required):
    fitting = [
        picks
        for picks in itertools.product(range(costs.shape[1]), repeat=len(costs))
        if sum(sizes[p] for p in picks) <= budget and set(required) <= set(picks)
    ]
    return min(sum(costs[i, p] for i, p in enumerate(picks)) for picks in fitting)


@pytest.mark.parametrize(
    "sizes, budget, required",
    [
        ((1, 2, 3), 10, ()),
        ((1, 2, 3), 10, (2, 1)),  # both floors, and the budget binds
        ((1, 2, 3), 8, (2, 1)),  # the least budget that has room for both
        ((3, 4, 6, 9), 23, ()),  # sizes that leave budgets unreachable
        ((0, 5), 7, ()),
    ],
)
def test_is_optimal(sizes, budget, required):
    rng = np.random.default_rng(budget)
    for _ in range(5):
        costs = rng.exponential(size=(5, len(sizes)))
        choice = choose(costs, sizes, budget, required)
        assert sum(sizes[c] for c in choice) <= budget and set(required) <= set(choice)
        total = costs[np.arange(5), choice].sum()
        assert total == pytest.approx(enumerate_choices(costs, sizes, budget, required))


def test_equal_costs_leave_nothing_of_the_budget():
    assert sorted(choose(np.zeros((3, 2)), (1, 2), 5).tolist()) == [0, 1, 1]


def test_of_equal_columns_the_first_is_taken():
    assert choose(np.zeros((2, 3)), (2, 2, 1), 4).tolist() == [0, 0]


def test_a_budget_that_is_too_small():
    with pytest.raises(ValueError, match="budget of 4"):
        choose(np.zeros((5, 2)), (1, 2), 4)


def test_many_items_are_within_one_step_of_the_optimum(monkeypatch):
    rng = np.random.default_rng(0)
    sizes = (9, 14, 18, 27)
    costs = rng.exponential(size=(60, 1)) * 4.0 ** -np.arange(4) * rng.uniform(0.5, 1, (60, 4))
    costs[3, :3] = np.inf  # pinned
    exact = choose(costs, sizes, 1000)
    monkeypatch.setattr(knapsack, "EXACT_STEPS", 0)
    quick = choose(costs, sizes, 1000)
    rows = np.arange(60)
    assert sum(sizes[c] for c in quick) <= 1000 and quick[3] == 3
    step = np.ptp(costs[np.isfinite(costs).all(axis=1)], axis=1).max()
    assert costs[rows, quick].sum() <= costs[rows, exact].sum() + step
    assert choose(costs, sizes, 10_000).tolist() == costs.argmin(axis=1).tolist()
    with pytest.raises(ValueError, match="budget of 500"):
        choose(costs, sizes, 500)
