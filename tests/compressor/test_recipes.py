"""`paper` is frozen: its traits are what was published."""

import json
from dataclasses import fields, replace

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
        "finetune_passes": 0,
        "finetune_rate": 2e-3,  # of no effect
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
    nothing = QuantizeOptions("m", "o", alpha=0.0, finetune_passes=0).traits
    assert nothing == replace(BEST, alpha=0.0, finetune_passes=0)


def test_unknown_recipes_and_traits_are_refused():
    with pytest.raises(UserError, match="recipe is 'papre', allowed are"):
        QuantizeOptions("m", "o", recipe="papre")
    with pytest.raises(UserError, match="method is 'awq'"):
        QuantizeOptions("m", "o", method="awq")


def test_every_option_out_of_range_is_named():
    with pytest.raises(UserError) as caught:
        QuantizeOptions(
            "m", "o", bits=float("nan"), recipe="papre", group_size=100, candidate_bits=(2, 2, 5),
            dense_bits=8, samples=0, sequence_length=1, target_drop=0.75, alpha=-1.0,
            beta=float("nan"), gamma=float("inf"),
        )  # fmt: skip
    assert str(caught.value).splitlines() == [
        "group_size is 100, allowed are [32, 64, 128]",
        "dense_bits is 8, allowed are [4, 16]",
        "recipe is 'papre', allowed are ['paper', 'best']",
        "candidate bits [2, 2, 5] repeat a width",
        "candidate bits [5] are not among (0, 1, 2, 3, 4)",
        "target_drop is 0.75, allowed are shares up to 0.5",
        "samples is 0, needs at least 1",
        "sequence_length is 1, needs at least 2",
        "alpha is -1.0, needs at least 0",
        "beta is nan, needs at least 0",
        "gamma is inf, needs at least 0",
        "bits is nan, needs a finite number",
    ]


def test_options_at_their_limits_are_allowed():
    QuantizeOptions("m", "o", samples=1, sequence_length=2, target_drop=0.5, alpha=0.0, bits=4)
    QuantizeOptions("m", "o", bits=9, plan="plan.json")  # the plan's are taken
    with pytest.raises(UserError, match=r"bits is 4.5, the candidates \[1, 2, 3, 4\] allow 1 to 4"):
        QuantizeOptions("m", "o", bits=4.5)
    with pytest.raises(UserError, match="target_drop is 0, allowed"):
        QuantizeOptions("m", "o", target_drop=0)


def test_the_schema_of_the_options_says_what_is_allowed():
    schema = QuantizeOptions.json_schema()
    json.dumps(schema, allow_nan=False)
    found = schema["properties"]
    assert list(found) == [f.name for f in fields(QuantizeOptions)]
    assert schema["required"] == ["model", "output"] and not schema["additionalProperties"]
    assert found["bits"]["type"] == "number" and found["bits"]["default"] == 2.5
    assert found["group_size"] == {
        "description": "32, 64 or 128 (default)",
        "default": 128,
        "type": "integer",
        "enum": [32, 64, 128],
    }
    assert found["samples"]["minimum"] == 1
    assert found["recipe"]["anyOf"][0] == {"type": "string", "enum": ["paper", "best"]}
    assert found["finetune_passes"]["anyOf"] == [
        {"type": "integer", "minimum": 0, "maximum": 99},
        {"type": "null"},
    ]
    assert found["candidate_bits"]["anyOf"][0] == {
        "type": "array",
        "items": {"type": "integer", "enum": [0, 1, 2, 3, 4]},
    }
    assert found["pins"]["items"] == {"type": "string"} and found["pins"]["default"] == []
    assert found["resume"]["type"] == "boolean"
    assert all("description" in found[name] for name in found if name not in schema["required"])


def test_one_width_for_all_needs_no_measuring():
    assert QuantizeOptions("m", "o", recipe="paper", bits=2).is_uniform
    assert QuantizeOptions("m", "o", candidate_bits=(2,), bits=2).is_uniform
    assert not QuantizeOptions("m", "o", recipe="paper", bits=2.5).is_uniform
    assert not QuantizeOptions("m", "o", recipe="paper", bits=2, pins=("layers.0.*=3",)).is_uniform
    assert not QuantizeOptions("m", "o", bits=2).is_uniform  # two widths an expert, from one budget
