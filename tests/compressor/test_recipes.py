"""`paper` is frozen: its traits are what was published."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from mcmoe_vllm.compress.options import QuantizeOptions, require_undecided
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plan import Plan, same_group_size
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
    nothing = QuantizeOptions("m", "o", recipe="paper", alpha=0.0, finetune_passes=0).traits
    assert nothing == replace(PAPER, alpha=0.0, finetune_passes=0)


def test_unknown_recipes_and_traits_are_refused():
    with pytest.raises(UserError, match="recipe is 'papre', allowed are"):
        QuantizeOptions("m", "o", recipe="papre")
    with pytest.raises(UserError, match="method is 'awq'"):
        QuantizeOptions("m", "o", method="awq")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -1.0}, "alpha is -1.0, allowed are 0 to 10"),
        ({"gamma": 1e308}, "gamma is 1e\\+308, allowed"),
        ({"beta": "1"}, "beta is '1', allowed"),
        ({"finetune_rate": float("nan")}, "finetune_rate is nan"),
        ({"answers": 1}, "answers is 1, allowed are"),
        ({"refinements": 2.0}, "refinements is 2.0, allowed are 0 to 99"),
        ({"candidate_bits": (1, 9)}, r"candidate bits \[9\] are not among"),
    ],
)
def test_recipes_of_ones_own_are_checked_too(changes, message):
    with pytest.raises(UserError, match=message):
        QuantizeOptions("m", "o", recipe=replace(PAPER, name="mine", **changes))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": "3"}, "samples is '3', needs a whole number"),
        ({"samples": True}, "samples is True, needs a whole number"),
        ({"seed": 2**64}, "seed is 18446744073709551616, needs at most 18446744073709551615"),
        ({"seed": -1}, "seed is -1, needs at least 0"),
        ({"bits": 10**400}, "bits is 1000"),
        ({"resume": "yes"}, "resume is 'yes', needs True or False"),
        ({"device": 0}, "device is 0, needs a text"),
        ({"model": 5}, "model is 5, needs a text"),
        ({"recipe": ["best"]}, "recipe is .*, allowed are"),
        ({"candidate_bits": (2, 3.0)}, "needs a list of whole numbers"),
        ({"gamma": 11, "recipe": "paper"}, "gamma is 11, needs at most 10"),
        ({"alpha": 2.0, "beta": 1.0}, "alpha, beta weigh the costs of --recipe paper"),
        ({"pins": "layers.*=2"}, "pins is 'layers"),
    ],
)
def test_options_are_of_their_types_and_agree(given, message):
    with pytest.raises(UserError, match=message):
        QuantizeOptions(**{"model": "m", "output": "o", **given})


def test_paths_and_lists_become_what_json_holds():
    options = QuantizeOptions(Path("m"), Path("o"), calibration=Path("c.txt"), plan=Path("p.json"))
    assert (options.model, options.output) == ("m", "o")
    assert (options.calibration, options.plan) == ("c.txt", "p.json")
    assert QuantizeOptions("m", "o", pins=["a=1"], candidate_bits=[2, 3]) == QuantizeOptions(
        "m", "o", pins=("a=1",), candidate_bits=(2, 3)
    )


PLAN = Plan(
    "m",
    "a",
    (0,),
    ((3, 2),),
    (2, 3),
    same_group_size(64),
    16,
    2.25,
    options={"pins": ["*.0=3"], "scope": "global"},
)


def test_a_plan_is_not_contradicted():
    require_undecided(QuantizeOptions("m", "o", plan="p.json"), PLAN)
    agreeing = QuantizeOptions(
        "m", "o", bits=2.25, candidate_bits=(2, 3), group_size=64, pins=("*.0=3",), scope="global",
        plan="p.json", samples=3, dense_bits=16,
    )  # fmt: skip
    require_undecided(agreeing, PLAN)
    require_undecided(replace(agreeing, group_size={"w2": 64}), PLAN)
    with pytest.raises(UserError, match="^--group-size cannot be given with --plan"):
        require_undecided(replace(agreeing, group_size={"w2": 32}), PLAN)
    other = replace(
        agreeing, bits=3, pins=("*.1=3",), group_size=32, scope="layer", recipe="paper", beta=2.0
    )
    with pytest.raises(UserError) as refusal:
        require_undecided(other, PLAN)
    assert str(refusal.value).startswith(
        "--bits, --group-size, --pin, --scope, --beta cannot be given with --plan"
    )


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
        "bits is nan, needs a finite number",
        "samples is 0, needs at least 1",
        "sequence_length is 1, needs at least 2",
        "alpha is -1.0, needs at least 0",
        "beta is nan, needs a finite number",
        "gamma is inf, needs a finite number",
    ]


def test_options_at_their_limits_are_allowed():
    QuantizeOptions("m", "o", samples=1, sequence_length=2, target_drop=0.5, bits=4)
    QuantizeOptions("m", "o", recipe="paper", alpha=0.0, beta=10, seed=2**64 - 1)
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
    one = {"type": "integer", "enum": [32, 64, 128]}
    each = {"type": "object", "properties": dict.fromkeys(("w13", "w2", "dense"), one)}
    assert found["group_size"]["anyOf"] == [
        {"anyOf": [one, {**each, "additionalProperties": False}]},
        {"type": "null"},
    ]
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
