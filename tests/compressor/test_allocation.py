"""Allocation: exact against dynamic programming, equal to the published bits, clear errors."""

import errno
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from mcmoe_vllm.allocate import pmq
from mcmoe_vllm.allocate.budget import budget_for_bits, parse_pins
from mcmoe_vllm.allocate.factors import Factors, expert_costs, read_factors
from mcmoe_vllm.allocate.pmq import allocate_bits, allocate_file, uniform_allocation
from mcmoe_vllm.allocate.projections import allocate_projections, projection_costs
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plan import same_group_size

pytest.importorskip("ortools")

REFERENCE = Path(__file__).parents[2].parent / "shared" / "reference" / "mixtral-8x7b"
needs_reference = pytest.mark.skipif(
    not (REFERENCE / "factors.json").exists(), reason="published Mixtral-8x7B factors not present"
)


def optimum(costs, bits, budget, floors=(), pins=None):
    """Least cost of one problem [n, B] by dynamic programming over (bits used, floors met)."""
    pins = pins or {}
    floors = [w for w in floors if w in bits and w not in pins.values()]
    floors = floors[: len(costs) - len(pins)]
    states = {(0, frozenset()): 0.0}
    for expert, row in enumerate(costs):
        following = {}
        for (used, met), total in states.items():
            for width, cost in zip(bits, row, strict=True):
                if pins.get(expert, width) != width or used + width > budget:
                    continue
                key = (used + width, met | ({width} & set(floors)))
                following[key] = min(following.get(key, math.inf), total + cost)
        states = following
    return min((v for (_, met), v in states.items() if met == set(floors)), default=math.inf)


def optimum_by_enumeration(costs, bits, budget, floors=()):
    totals = [
        sum(costs[expert][bits.index(width)] for expert, width in enumerate(widths))
        for widths in itertools.product(bits, repeat=len(costs))
        if sum(widths) <= budget and all(w in widths for w in floors)
    ]
    return min(totals, default=math.inf)


def optimum_by_convolution(costs, bits, budget):
    """Dynamic programming over bits used, vectorised for many experts."""
    best = np.zeros(budget + 1)
    for row in costs:
        options = np.full((len(bits), budget + 1), np.inf)
        for option, width, cost in zip(options, bits, row, strict=True):
            option[width:] = best[: budget + 1 - width] + cost
        best = options.min(axis=0)
    return best[budget]


COST_KINDS = {
    "lognormal": lambda rng, shape: rng.lognormal(0, 2, shape),  # not monotone in the bits
    "falling": lambda rng, shape: -np.sort(-rng.lognormal(0, 2, shape), axis=-1),
    "ties": lambda rng, shape: rng.integers(0, 3, shape).astype(float),
    "tiny": lambda rng, shape: rng.uniform(0, 1e-14, shape),  # far below solver tolerances
    "wide": lambda rng, shape: 10.0 ** rng.uniform(-6, 6, shape),
    "zero": lambda rng, shape: np.zeros(shape),
}
CANDIDATES = [(1, 2, 3), (0, 1, 2, 3), (1, 2, 3, 4), (0, 2, 4), (2, 3), (0, 3), (2,)]


@pytest.mark.parametrize("kind", COST_KINDS)
@pytest.mark.parametrize("bits", CANDIDATES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_layer_scope_is_optimal(kind, bits, seed):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(1, 9))
    costs = COST_KINDS[kind](rng, (3, experts, len(bits)))
    pins = {(1, e): int(rng.choice(bits)) for e in range(experts) if rng.random() < 0.4}
    floors = bool(rng.integers(2))
    budget = int(rng.integers(experts * bits[0], experts * bits[-1] + 2)) + 3

    def best(row):
        row_pins = {e: w for (r, e), w in pins.items() if r == row}
        return optimum(costs[row], bits, budget, (3, 2) if floors else (), row_pins)

    expected = [best(row) for row in range(3)]
    arguments = {"scope": "layer", "layer_budget": budget, "pins": pins, "floors": floors}
    if math.inf in expected:
        with pytest.raises(UserError, match="too small"):
            allocate_bits(costs, bits, **arguments)
        return
    result = allocate_bits(costs, bits, **arguments)
    assert result.objective == pytest.approx(sum(expected), rel=1e-9, abs=0)
    assert all(sum(row) <= budget for row in result.bits)
    assert all(result.bits[row][expert] == width for (row, expert), width in pins.items())
    assert result.bits == allocate_bits(costs, bits, **arguments).bits


@pytest.mark.parametrize("kind", COST_KINDS)
@pytest.mark.parametrize("bits", CANDIDATES, ids=str)
def test_global_scope_is_optimal(kind, bits):
    rng = np.random.default_rng(len(bits))
    costs = COST_KINDS[kind](rng, (3, 4, len(bits)))
    pins = {(2, 1): bits[-1], (0, 3): bits[0]}
    flat_pins = {4 * row + expert: width for (row, expert), width in pins.items()}
    smallest = 11 * bits[0] + bits[-1]
    for budget in range(smallest, 12 * bits[-1] + 2, 3):
        result = allocate_bits(costs, bits, scope="global", total_budget=budget, pins=pins)
        expected = optimum(costs.reshape(12, -1), bits, budget, pins=flat_pins)
        assert result.objective == pytest.approx(expected, rel=1e-9, abs=0)
        assert sum(map(sum, result.bits)) <= budget
        assert result.bits[2][1] == bits[-1] and result.bits[0][3] == bits[0]


@pytest.mark.parametrize("kind", ["lognormal", "tiny", "wide"])
def test_single_problems_are_optimal(kind):
    # Rare cases: an optimum that wastes bits, gains of a millionth of the total.
    rng = np.random.default_rng(11)
    for _ in range(600):
        bits = CANDIDATES[rng.integers(len(CANDIDATES))]
        experts = int(rng.integers(1, 13))
        costs = COST_KINDS[kind](rng, (1, experts, len(bits)))
        budget = int(rng.integers(experts * bits[0], experts * bits[-1] + 1))
        expected = optimum(costs[0], bits, budget)
        result = allocate_bits(costs, bits, scope="layer", layer_budget=budget, floors=False)
        assert result.objective == pytest.approx(expected, rel=1e-10, abs=0), (bits, costs, budget)


def test_reference_optimum_agrees_with_enumeration():
    rng = np.random.default_rng(0)
    for budget in range(5, 16):
        costs = rng.lognormal(0, 1, (5, 3))
        expected = optimum_by_enumeration(costs, (1, 2, 3), budget, (3, 2))
        assert optimum(costs, (1, 2, 3), budget, (3, 2)) == pytest.approx(expected)
        assert optimum_by_convolution(costs, (1, 2, 3), budget) == pytest.approx(
            optimum_by_enumeration(costs, (1, 2, 3), budget)
        )


def measured_like_costs(rng, layers, experts, bits):
    """Costs as calibration gives them: skewed use, error falling by about 2.5x a bit."""
    use = rng.gamma(0.5, size=(layers, experts))
    error = rng.lognormal(0, 1, (layers, experts, 1)) * 0.4 ** np.array(bits)
    error = error * rng.lognormal(0, 0.3, (layers, experts, len(bits)))
    every_layer = tuple(range(layers))
    return expert_costs(Factors(use, use + 0.01, error, tuple(bits), every_layer))


@pytest.mark.parametrize("budget", [700, 1001, 1500])
def test_global_scope_is_optimal_for_hundreds_of_experts(budget):
    bits = (0, 1, 2, 3, 4)
    costs = measured_like_costs(np.random.default_rng(budget), 18, 32, bits)
    result = allocate_bits(costs, bits, scope="global", total_budget=budget)
    expected = optimum_by_convolution(costs.reshape(-1, 5), bits, budget)
    assert result.objective == pytest.approx(expected, rel=1e-12, abs=0)


def test_288_layer_problems_are_optimal():
    bits = (1, 2, 3)
    costs = measured_like_costs(np.random.default_rng(5), 288, 8, bits)
    result = allocate_bits(costs, bits, scope="layer", layer_budget=17)
    expected = [optimum(layer, bits, 17, (3, 2)) for layer in costs]
    chosen = [
        sum(costs[row, expert, width - 1] for expert, width in enumerate(widths))
        for row, widths in enumerate(result.bits)
    ]
    np.testing.assert_allclose(chosen, expected, rtol=1e-12)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("bits", [(1, 2, 3, 4), (0, 2, 4)], ids=str)
def test_16_thousand_experts_are_solved(bits):
    costs = measured_like_costs(np.random.default_rng(7), 61, 256, bits)
    result = allocate_bits(costs, bits, scope="global", total_budget=int(2.3 * 61 * 256) + 1)
    # A Lagrangian bound proves the answer without the code under test: no price exceeds it.
    used = sum(map(sum, result.bits))
    flat = costs.reshape(-1, len(bits))
    bounds = [
        (flat + price * np.array(bits)).min(axis=1).sum() - price * used
        for price in np.geomspace(flat.max() * 1e-9, flat.max(), 2000)
    ]
    assert max(bounds) <= result.objective * (1 + 1e-12)
    assert result.objective <= max(bounds) * (1 + 1e-3)


def test_floors_at_the_smallest_budget_of_many_experts():
    # All but two experts are forced to 1 bit: the bound without floors is at its weakest.
    costs = measured_like_costs(np.random.default_rng(3), 2, 64, (1, 2, 3))
    result = allocate_bits(costs, (1, 2, 3), scope="layer", layer_budget=67)
    expected = sum(optimum(layer, (1, 2, 3), 67, (3, 2)) for layer in costs)
    assert result.objective == pytest.approx(expected, rel=1e-12)


def test_pinned_experts_count_for_floors_and_floors_without_free_experts_are_waived():
    costs = np.ones((1, 3, 3)) * np.array([3.0, 2.0, 1.0])

    def widths(pins, budget):
        pins = {(0, expert): width for expert, width in pins.items()}
        return allocate_bits(costs, (1, 2, 3), scope="layer", layer_budget=budget, pins=pins).bits[
            0
        ]

    assert widths({2: 3}, 6) == (2, 1, 3)
    assert widths({0: 1, 1: 1, 2: 1}, 3) == (1, 1, 1)
    assert widths({0: 1, 1: 1}, 9) == (1, 1, 3)  # room for one floor: 3 bits comes first


def test_equal_experts_give_more_bits_to_the_lower_index():
    costs = np.ones((2, 8, 3)) * np.array([1.0, 0.9, 0.1])
    result = allocate_bits(costs, (1, 2, 3), scope="layer", layer_budget=15)
    assert result.bits == ((3, 3, 3, 2, 1, 1, 1, 1),) * 2


def test_equal_costs_keep_the_fewest_bits():
    result = allocate_bits(np.zeros((2, 4, 3)), (1, 2, 3), scope="global", total_budget=24)
    assert result.bits == ((1, 1, 1, 1),) * 2


def test_bits_that_gain_nothing_are_not_spent():
    # The second expert is never used; the first has the 3 bits that the floor asks for.
    costs = np.array([[[3.0, 2, 1], [0, 0, 0], [2, 1, 1]]])
    result = allocate_bits(costs, (1, 2, 3), scope="layer", layer_budget=9)
    assert result.bits == ((3, 1, 2),)
    without = allocate_bits(costs, (1, 2, 3), scope="global", total_budget=9)
    assert without.bits == ((3, 1, 2),)


def test_only_an_unused_expert_may_meet_a_floor_for_nothing():
    costs = np.array([[[1.0, 2, 3], [1, 2, 3], [0, 0, 0], [0, 0, 0]]])
    result = allocate_bits(costs, (1, 2, 3), scope="layer", layer_budget=12)
    assert result.bits == ((1, 1, 3, 2),)


@pytest.fixture
def programs(monkeypatch):
    """The costs of every integer program that is solved."""
    seen = []

    def count_takers(costs, *rest):
        seen.append(costs)
        return solve(costs, *rest)

    solve = pmq._count_takers
    monkeypatch.setattr(pmq, "_count_takers", count_takers)
    return seen


def test_equal_experts_share_a_variable(programs):
    # With one each, an even split of 4000 would be searched without end.
    costs = np.ones((20, 200, 4)) * np.array([1.0, 0.9, 0.2, 0.1])
    result = allocate_bits(costs, (1, 2, 3, 4), scope="global", total_budget=10_001)
    assert sum(map(sum, result.bits)) == 10_001
    assert [costs.shape for costs in programs] == [(1, 4)]


def test_costs_far_above_the_answer_are_left_out(programs):
    # Beside 1e9, the solver would not tell 1e-6 from 2e-6. The answer costs 1e-6 more than the
    # least of all: neither 1e9 nor the 3e-6 can be in a better one.
    costs = np.array([[[1e9, 2e-6, 1e-6], [1e9, 3e-6, 0], [1e9, 1e-6, 1e-6]]])
    result = allocate_bits(costs, (1, 2, 3), scope="global", total_budget=7)
    assert result.bits == ((2, 3, 2),)
    assert [np.isinf(costs).sum() for costs in programs] == [4]
    # With floors no quick answer says so, the first of the solver does.
    programs.clear()
    result = allocate_bits(costs, (1, 2, 3), scope="layer", layer_budget=7)
    assert result.bits == ((2, 3, 2),)
    coarse, fine = programs
    assert not np.isinf(coarse).any() and np.isinf(fine[:, 0]).all()


def test_a_budget_that_no_sum_of_widths_reaches_is_rounded_down():
    costs = measured_like_costs(np.random.default_rng(7), 4, 16, (0, 2, 4))
    odd, even = (
        allocate_bits(costs, (0, 2, 4), scope="global", total_budget=budget) for budget in (99, 98)
    )
    assert odd.bits == even.bits
    problem = pmq._make_problem(np.array([[np.inf, 1.0], [1, 1]]), (1, 3), 7, False)
    assert pmq._reachable_budget(problem) == 6


@needs_reference
@pytest.mark.parametrize("budget", ["12", "14", "16", "18", "20"])
def test_published_allocations(budget):
    published = json.loads((REFERENCE / "allocations.json").read_text())["allocations"][budget]
    factors = read_factors(REFERENCE / "factors.json")
    result = allocate_bits(
        expert_costs(factors, alpha=1, beta=1.5, gamma=1),
        factors.candidate_bits,
        scope="layer",
        layer_budget=int(budget),
    )
    assert [list(row) for row in result.bits] == published
    assert result.solver.startswith("ortools-mathopt/highs ")


# Budgets


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scope": "layer", "layer_budget": 10}, "smallest 11, largest 23"),
        ({"scope": "layer", "layer_budget": 7, "floors": False}, "smallest 8, largest 24"),
        ({"scope": "layer", "layer_budget": 10}, "at least 11"),
        ({"scope": "layer", "layer_budget": 11, "pins": {(0, 1): 3, (0, 2): 3}}, "smallest 13"),
        ({"scope": "global", "total_budget": 15}, "all layers: smallest 16, largest 48"),
        ({"scope": "global", "layer_budget": 16}, "total_budget=None"),
        (
            {"scope": "layer", "layer_budget": 16, "total_budget": 32},
            "total_budget=32: leave it out",
        ),
        ({"scope": "layer", "layer_budget": 16.5}, "whole number"),
        ({"scope": "model", "layer_budget": 16}, "scope='model'"),
    ],
)
def test_impossible_budgets(arguments, message):
    with pytest.raises(UserError, match=message):
        allocate_bits(np.ones((2, 8, 3)), (1, 2, 3), **arguments)


def test_infeasible_layers_are_all_named():
    pins = {(row, expert): 3 for row in (1, 3) for expert in range(8)}
    with pytest.raises(UserError) as caught:
        allocate_bits(np.ones((4, 8, 3)), (1, 2, 3), scope="layer", layer_budget=16, pins=pins)
    text = str(caught.value)
    assert "MoE layer 1 " in text and "MoE layer 3 " in text and "MoE layer 0 " not in text


def test_malformed_arguments_are_all_named():
    costs = np.ones((1, 2, 3))
    costs[0, 1, 2] = np.nan
    with pytest.raises(UserError) as caught:
        allocate_bits(costs, (1, 2, 3), scope="layer", layer_budget=6, pins={(0, 0): 4, (1, 0): 2})
    text = str(caught.value)
    assert "costs[0, 1]" in text and "4 is not one of" in text and "pin (1, 0)" in text
    with pytest.raises(UserError, match="shape"):
        allocate_bits(np.ones((2, 3)), (1, 2, 3), scope="layer", layer_budget=6)
    with pytest.raises(UserError, match="not ascending"):
        allocate_bits(np.ones((1, 2, 2)), (2, 1), scope="layer", layer_budget=6)


@pytest.mark.parametrize(
    ("bits", "scope", "expected"),
    [
        (2.5, "layer", (20, True)),
        (2.54, "layer", (20, True)),
        (2.3, "global", (588, True)),
        (2, "layer", (16, False)),
        (3.0, "global", (768, False)),
    ],
)
def test_budget_for_bits(bits, scope, expected):
    assert budget_for_bits(bits, 8, 32, (1, 2, 3), scope) == expected


def test_budget_for_bits_forgives_binary_fractions():
    assert 2.3 * 100 < 230
    assert budget_for_bits(2.3, 100, 1, (1, 2, 3), "layer")[0] == 230


@pytest.mark.parametrize("bits", [0.99, 3.01, math.nan, -1])
def test_budget_for_bits_out_of_range(bits):
    with pytest.raises(UserError, match="1 to 3"):
        budget_for_bits(bits, 8, 32, (1, 2, 3), "layer")


def test_uniform_allocation():
    costs = np.arange(12.0).reshape(2, 2, 3)
    result = uniform_allocation(costs, (1, 2, 3), 2.0)
    assert result.bits == ((2, 2), (2, 2))
    assert result.objective == costs[:, :, 1].sum()
    assert result.solver == "uniform"
    with pytest.raises(UserError, match="2.5"):
        uniform_allocation(costs, (1, 2, 3), 2.5)


# Pins


def test_parse_pins_matches_decoder_layers_and_later_specs_win():
    specs = ["layers.*.experts.0=3", "layers.2.*=1", "layers.2.experts.1 = 2"]
    assert parse_pins(specs, layers=(1, 2), num_experts=2, candidate_bits=(1, 2, 3)) == {
        (0, 0): 3,
        (1, 0): 1,
        (1, 1): 2,
    }
    assert parse_pins([], (0,), 2, (1, 2)) == {}


def test_parse_pins_does_not_take_layer_1_for_layer_11():
    assert set(parse_pins(["layers.1.*=1"], (1, 11), 2, (1, 2))) == {(0, 0), (0, 1)}


def test_parse_pins_lists_every_wrong_spec():
    wrong = ["layers.0.*", "layers.9.*=2", "layers.0.*=4", "layers.0.*=two", "=2", "a=b=2"]
    with pytest.raises(UserError) as caught:
        parse_pins([*wrong, "layers.0.experts.1=3"], (0, 1), 2, (1, 2, 3))
    text = str(caught.value)
    assert all(repr(spec) in text for spec in wrong)
    assert "'layers.0.experts.1=3'" not in text


# Factors


def factors_document(**changes):
    document = {
        "frequency": [[1.0, 3.0], [0, 0]],
        "routing_weight": [[1.0, 1.0], [0, 0]],
        "reconstruction_error": [[[4.0, 1.0], [9.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]],
        "candidate_bits": [1, 2],
    }
    document.update(changes)
    return {key: value for key, value in document.items() if value is not None}


def write(tmp_path, document):
    path = tmp_path / "factors.json"
    path.write_text(json.dumps(document))
    return path


def test_read_factors_reorders_candidates(tmp_path):
    factors = read_factors(write(tmp_path, factors_document(candidate_bits=[2, 1], layers=[3, 5])))
    assert factors.candidate_bits == (1, 2)
    assert factors.layers == (3, 5)
    assert factors.reconstruction_error[0].tolist() == [[1.0, 4.0], [2.0, 9.0]]
    assert read_factors(write(tmp_path, factors_document())).layers == (0, 1)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"frequency": None, "candidate_bits": None},
            ["frequency: missing", "candidate_bits: missing"],
        ),
        ({"frequency": [[1, 2], [3]]}, ["frequency[1]: has 1 entries, expected 2"]),
        ({"routing_weight": [[1, 2]]}, ["routing_weight: has 1 entries, expected 2"]),
        (
            {"frequency": [[-1, float("nan")], [float("inf"), "x"]]},
            ["frequency[0][0]", "frequency[0][1]", "frequency[1][0]", "frequency[1][1]"],
        ),
        ({"frequency": [[10**400, True], [1, None]]}, ["[0][0]", "[0][1]", "[1][1]"]),
        ({"frequency": 3}, ["frequency: 3 is not a list"]),
        ({"frequency": [], "routing_weight": [], "reconstruction_error": []}, ["at least 1"]),
        ({"reconstruction_error": [[[1], [1]], [[1], [1]]]}, ["[0][0]: has 1 entries"]),
        ({"candidate_bits": [1, 5]}, ["candidate_bits[1]: 5"]),
        ({"candidate_bits": [1, 1]}, ["1 is given more than once"]),
        ({"candidate_bits": []}, ["candidate_bits: []"]),
        ({"candidate_bits": ["1", 2.0]}, ["candidate_bits[0]", "candidate_bits[1]"]),
        ({"layers": [0]}, ["layers: has 1 entries, expected 2"]),
        ({"layers": [4, 4]}, ["layers: 4 is given more than once"]),
        ({"layers": [-1, "a"]}, ["layers[0]", "layers[1]"]),
    ],
)
def test_read_factors_names_every_offender(tmp_path, changes, messages):
    path = write(tmp_path, factors_document(**changes))
    with pytest.raises(UserError) as caught:
        read_factors(path)
    assert [m for m in messages if m not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", "not UTF-8"),
        (b"{", "not valid JSON"),
        (b"[1]", "JSON list"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_read_factors_of_no_json_object(tmp_path, content, message):
    path = tmp_path / "factors.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_factors(path)
    with pytest.raises(UserError, match="does not exist"):
        read_factors(tmp_path / "absent.json")


def test_long_lists_of_offenders_are_counted(tmp_path):
    document = factors_document(frequency=[[-1.0] * 200] * 2)
    with pytest.raises(UserError, match=r"frequency\[0\]\[10\].*(\n.*)+and 38\d more"):
        read_factors(write(tmp_path, document))


def test_expert_costs_by_hand(tmp_path):
    factors = read_factors(write(tmp_path, factors_document()))
    costs = expert_costs(factors, alpha=1, beta=2, gamma=0.5)
    assert costs.dtype == np.float64
    assert costs[0].tolist() == [
        [0.25 * 0.25 * 2, 0.25 * 0.25],
        [0.75 * 0.25 * 3, 0.75 * 0.25 * 2**0.5],
    ]
    assert not costs[1].any()  # a layer that was never used


def test_expert_costs_refuses_bad_exponents_and_overflow(tmp_path):
    factors = read_factors(write(tmp_path, factors_document()))
    with pytest.raises(UserError, match="alpha=-1, gamma=nan"):
        expert_costs(factors, alpha=-1, gamma=math.nan)
    with pytest.raises(UserError, match=r"layers\.0\.experts\.1"):
        expert_costs(factors, gamma=1e4)


# Files


def test_allocate_file(tmp_path):
    source, target = write(tmp_path, factors_document(layers=[1, 2])), tmp_path / "bits.json"
    result = allocate_file(
        source, target, scope="global", total_budget=6, pins=["layers.2.experts.0=2"]
    )
    assert result.bits == ((1, 2), (2, 1))
    assert json.loads(target.read_text()) == {
        "bits": [[1, 2], [2, 1]],
        "objective": result.objective,
        "solver": result.solver,
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bits.json", "factors.json"]


def test_allocate_file_leaves_nothing_behind_when_it_cannot_write(tmp_path, monkeypatch):
    source = write(tmp_path, factors_document())
    folder = tmp_path / "folder"
    folder.mkdir()
    for target, message in ((folder, "is a folder"), (tmp_path / "absent" / "x", "does not exist")):
        with pytest.raises(UserError, match=message):
            allocate_file(tmp_path / "no factors", target, layer_budget=4)  # before any work

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"writing .*bits\.json failed: No space left"):
        allocate_file(source, tmp_path / "bits.json", layer_budget=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["factors.json", "folder"]


def test_missing_solver_is_explained(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ortools.math_opt.python", None)
    with pytest.raises(UserError, match="pip install"):
        allocate_bits(np.ones((1, 2, 2)), (1, 2), scope="layer", layer_budget=4)


def test_projection_costs_by_hand():
    errors = np.array([[[[3.0, 1.0], [2.0, 0.5]]]])  # one expert, 2 widths, (w13, w2)
    costs, pairs = projection_costs(errors, np.array([0.5]), (1, 2))
    assert dict(zip(pairs, costs[0, 0].tolist(), strict=True)) == {
        (1, 1): 5.0, (1, 2): 4.625, (2, 1): 2.5, (2, 2): 2.125,
    }  # fmt: skip
    dropped = projection_costs(errors, np.array([1.0]), (0, 2))[1]
    assert dropped == [(0, 0), (2, 2)]  # never one of the two


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_projections_are_allocated_within_true_bits(scope, group_size):
    rng = np.random.default_rng(3)
    slope = rng.exponential(size=(3, 4, 1, 2))
    errors = slope * 2.0 ** -np.arange(4)[:, None]  # widths 0 to 3
    sensitivities = np.array([1.0, 4.0, 0.1])
    costs, pairs = projection_costs(errors, sensitivities, (0, 1, 2, 3))
    chosen, objective = allocate_projections(
        costs, pairs, 2.0, same_group_size(group_size), scope=scope, pins={(0, 1): 3}
    )
    overhead = 16 / group_size

    def true_bits(rows):
        used = [w for row in rows for w13, w2 in row for w in (w13, w13, w2)]
        return sum(w + overhead * (w > 0) for w in used)

    for rows in [chosen] if scope == "global" else [[row] for row in chosen]:
        most = 3 * 4 * len(rows) * (2.0 + overhead)
        assert most - 3 * (1 + overhead) < true_bits(rows) <= most  # and little is left
    assert chosen[0][1] == (3, 3)
    assert objective == pytest.approx(
        sum(costs[i, e, pairs.index(p)] for i, row in enumerate(chosen) for e, p in enumerate(row))
    )
    if scope == "global":  # the layer that matters most gets the most
        widths = [sum(2 * a + b for a, b in row) for row in chosen]
        assert widths[1] > widths[2]


def test_a_dropped_expert_saves_its_scales_too():
    # In groups of 32, scale and zero take half a bit: 2.5 for one expert are 1.25 for two.
    costs, pairs = projection_costs(np.array([[[[9.0, 9], [1, 1]], [[5, 5], [1, 1]]]]), [1], (0, 2))
    chosen, _ = allocate_projections(costs, pairs, 0.75, same_group_size(32), scope="layer")
    assert chosen == (((2, 2), (0, 0)),)


def test_pins_beyond_the_budget_of_projections_are_refused():
    costs, pairs = projection_costs(np.ones((1, 2, 3, 2)), np.ones(1), (1, 2, 3))
    pins = {(0, 0): 3, (0, 1): 3}
    with pytest.raises(UserError, match="2 bits are below the smallest"):
        allocate_projections(costs, pairs, 2, same_group_size(128), scope="global", pins=pins)
