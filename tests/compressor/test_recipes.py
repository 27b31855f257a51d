"""`paper` is frozen: its traits are what was published."""

from dataclasses import replace

import pytest

from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.recipes import ALLOWED, BEST, PAPER, RECIPES


def test_the_papers_traits():
    assert PAPER.to_dict() == {
        "name": "paper",
        "allocation": "pmq",
        "candidate_bits": [1, 2, 3],
        "alpha": 1.0,
        "beta": 1.5,
        "gamma": 1.0,  # the published widths, not the 2 of the text
        "scope": "layer",
        "error_method": "minmax",
        "error_refinements": 0,
        "error_norm": "windows",
        "routing_score": "softmax",
        "method": "gptq",
        "hessian_weighting": "equal",
        "shared_tokens": 0,
        "compensated_bits": 4,
        "range_search": "norm",
        "binary_scale": "mean",
        "refinements": 0,
        "zeros": "integer",
        "answers": False,
        "exact_targets": False,
        "sequential": True,
        "tuning_passes": 0,
        "tuning_rate": 2e-3,  # of no effect
        "keep_rounding": False,
        "router_bits": 4,
    }


def test_both_recipes_are_valid_and_every_wrong_trait_is_named():
    assert set(RECIPES) == {"paper", "best"}
    assert not PAPER.problems() and not BEST.problems()
    wrong = replace(BEST, scope="expert", router_bits=3, refinements=-1)
    problems = "; ".join(wrong.problems())
    for words in (
        "scope is 'expert'",
        "router_bits is 3",
        "refinements is -1, allowed are 0 to 99",
    ):
        assert words in problems
    assert set(ALLOWED) <= set(BEST.to_dict())


def test_options_change_single_traits_of_a_recipe():
    assert QuantizeOptions("m", "o").traits == BEST
    assert QuantizeOptions("m", "o", recipe="paper").traits == PAPER
    changed = QuantizeOptions("m", "o", recipe="paper", gamma=2.0, scope="global").traits
    assert changed == replace(PAPER, gamma=2.0, scope="global")


def test_unknown_recipes_and_traits_are_refused():
    with pytest.raises(UserError, match="recipe is 'papre', allowed are"):
        QuantizeOptions("m", "o", recipe="papre")
    with pytest.raises(UserError, match="method is 'awq'"):
        QuantizeOptions("m", "o", method="awq")
