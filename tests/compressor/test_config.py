"""What travels into config.json and plan.json: round trips, and every refusal in words."""

import json

import pytest

from mcmoe_vllm.checkpoint.format import FORMAT_VERSION, NEWEST_VERSION, QuantizationConfig
from mcmoe_vllm.compress.options import recipe_of
from mcmoe_vllm.disk import read_json, write_json
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plan import Plan, check_candidate_bits


def make_config(**changes):
    return QuantizationConfig(
        **{
            "group_size": {"w13": 64, "w2": 32, "dense": 128},
            "expert_bits": {0: ("0123", "0234"), 7: ("4321", "4321")},
            "dense_bits": 4,
            "dense_modules": ("self_attn",),
            "average_bits": {"nominal": 2.5},
            "recipe": {"seed": 0},
            **changes,
        }
    )


def raw(**changes):
    return {**make_config().to_dict(), **changes}


def make_plan(**changes):
    return Plan(
        **{
            "model": "m",
            "architecture": "MixtralForCausalLM",
            "layers": (1, 3),
            "bits": ((1, 2, 3), (3, 3, 2)),
            "candidate_bits": (1, 2, 3),
            "group_size": {"w13": 128, "w2": 64, "dense": 32},
            "dense_bits": 4,
            "nominal_bits": 2.5,
            "options": {"seed": 1},
            **changes,
        }
    )


def test_a_plan_of_version_1_has_one_group_size_for_all():
    new = make_plan().to_dict()
    old = {**new, "group_size": 64, "format_version": 1}
    sizes = {"w13": 64, "w2": 64, "dense": 64}
    assert Plan.from_dict(old).to_dict() == {**new, "group_size": sizes}


def test_config_round_trip_through_json():
    config = make_config()
    text = json.dumps(config.to_dict())
    assert json.loads(text)["quant_method"] == "mcmoe"
    assert json.loads(text)["format_version"] == FORMAT_VERSION == 2
    assert QuantizationConfig.from_dict(json.loads(text)) == config


def test_config_needs_only_two_fields_and_the_version():
    least = {k: raw()[k] for k in ("quant_method", "format_version", "group_size", "expert_bits")}
    found = QuantizationConfig.from_dict(least)
    assert found.dense_bits == 16 and found.dense_modules == () and found.pruning is None


def test_widths_of_a_layer():
    config = make_config()
    assert config.num_experts == 4
    assert config.bits(0, "w13") == (0, 1, 2, 3) and config.bits(0, "w2") == (0, 2, 3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": {"w13": 64, "w2": 64}}, "group_size has"),
        ({"group_size": {"w13": 48, "w2": 64, "dense": 64}}, "48, allowed are"),
        ({"dense_bits": 8}, "dense_bits is 8, allowed are"),
        ({"dense_modules": ()}, "dense_modules is empty"),
        ({"expert_bits": {}}, "expert_bits is empty"),
        ({"expert_bits": {0: ("15", "11")}}, "'15', allowed digits are 0 to 4"),
        ({"expert_bits": {0: ("", "")}}, "allowed digits are 0 to 4"),
        ({"expert_bits": {0: ("1x", "11")}}, "'1x', allowed digits"),
        ({"expert_bits": {0: ("11", "11", "11")}}, "3 strings of widths, needs 2"),
        ({"expert_bits": {0: ("10", "11")}}, "layer 0 drops an expert in w13 or w2 alone"),
        ({"expert_bits": {0: ("11", "11"), 1: ("1", "1")}}, "different numbers of experts"),
        ({"expert_bits": {0: ("11", "111")}}, "different numbers of experts"),
    ],
)
def test_config_out_of_range_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_config(**changes)


def test_config_lists_all_offenders():
    with pytest.raises(UserError) as e:
        make_config(dense_bits=5, expert_bits={0: ("9", "1"), 1: ("10", "12")})
    for part in ("dense_bits is 5", "'9'", "layer 1 drops", "numbers of experts"):
        assert part in str(e.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("mcmoe", "is str, needs an object"),
        (None, "needs an object"),
        (raw(quant_method="gptq"), "quant_method is 'gptq'"),
        ({}, "quant_method is None"),
        (raw(format_version=NEWEST_VERSION + 1), "format_version 4, .* up to 3: upgrade"),
        (raw(format_version=0), "format_version is 0"),
        (raw(format_version="1"), "format_version is '1'"),
        (raw(format_version=True), "format_version is True"),
        ({k: v for k, v in raw().items() if k != "format_version"}, "format_version is None"),
        ({k: v for k, v in raw().items() if k != "expert_bits"}, "lacks expert_bits"),
        (raw(colour="red", size=1), "unknown fields colour, size"),
        (raw(group_size=128), "group_size is 128, needs an object of integers"),
        (raw(group_size={"w13": "64", "w2": 64, "dense": 64}), "needs an object of integers"),
        (raw(group_size={"w13": 64.5, "w2": 64, "dense": 64}), "needs an object of integers"),
        (raw(dense_bits="4"), "dense_bits is '4', needs an integer"),
        (raw(dense_modules="self_attn"), "dense_modules is 'self_attn', needs a list"),
        (raw(pruning=3), "pruning is 3, needs null or an object"),
        (raw(average_bits={"nominal": "2"}), "average_bits .* numbers"),
        (raw(average_bits={"nominal": float("nan")}), "average_bits .* numbers"),
        (raw(recipe=[]), "recipe is .*, needs an object"),
        (raw(expert_bits=["11", "11"]), "expert_bits is .*, needs an object"),
        (raw(expert_bits={"x": ["1", "1"]}), "layer 'x', needs the number of a layer"),
        (raw(expert_bits={"-1": ["1", "1"]}), "layer '-1'"),
        (raw(expert_bits={"0": ["1", "1"], "00": ["2", "2"]}), "layer '00'"),
        (raw(expert_bits={"0": "11"}), "needs a list of 2 strings"),
        (raw(expert_bits={"0": ["11", "11", "11"]}), "needs a list of 2 strings"),
        (raw(expert_bits={"0": [11, 11]}), "needs a list of 2 strings"),
    ],
)
def test_mistyped_configs_are_refused(value, message):
    with pytest.raises(UserError, match=message):
        QuantizationConfig.from_dict(value)


def test_plan_round_trip_through_json():
    plan = make_plan()
    assert plan.num_experts == 3 and plan.average_bits() == pytest.approx(14 / 6)
    assert json.loads(json.dumps(plan.to_dict()))["bits"] == ["123", "332"]
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (1,)}, "1 layers but 2 rows"),
        ({"layers": (), "bits": ()}, "it has no layers"),
        ({"layers": (1, 1)}, "repeat a layer"),
        ({"bits": ((1, 2, 3), (1, 2))}, "different lengths"),
        ({"bits": ((1, 2, 3), (1, 2, 4))}, r"layer 3 has widths \[4\], allowed are \[1, 2, 3\]"),
        ({"candidate_bits": ()}, "hold no width above 0"),
        ({"candidate_bits": (0,)}, "hold no width above 0"),
        ({"candidate_bits": (1, 2, 3, 3)}, "repeat a width"),
        ({"candidate_bits": (1, 2, 3, 8)}, r"\[8\] are not among"),
        ({"group_size": {"w13": 64, "w2": 100, "dense": 64}}, "group_size of w2 is 100, allowed"),
        ({"group_size": {"w13": 64}}, r"group_size has \[.w13.\], needs"),
        ({"dense_bits": 8}, "dense_bits is 8"),
        ({"nominal_bits": float("nan")}, "nominal_bits is nan"),
        ({"nominal_bits": "2"}, "nominal_bits is '2'"),
        ({"model": None}, "model is None, needs a string"),
        ({"options": []}, "options is .*, needs an object"),
    ],
)
def test_plan_out_of_range_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_plan(**changes)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "mine.json is no plan: it holds a list"),
        ({}, "missing .*'bits'"),
        ({**make_plan().to_dict(), "extra": 1}, r"unknown \['extra'\]"),
        ({**make_plan().to_dict(), "format_version": 3}, "format_version 3, .* up to 2: upgrade"),
        ({**make_plan().to_dict(), "format_version": "new"}, "format_version is 'new', needs"),
        ({**make_plan().to_dict(), "format_version": None}, "format_version is None, needs"),
        ({**make_plan().to_dict(), "bits": ["12x", "123"]}, "mine.json is no valid plan"),
        ({**make_plan().to_dict(), "bits": 3}, "mine.json is no valid plan"),
        (
            {**make_plan().to_dict(), "bits": ["12\uff13", "123"]},
            "needs a list of rows of digits",
        ),
        ({**make_plan().to_dict(), "bits": [[1, 2, 3.0], [1, 2, 3]]}, "needs a list of rows"),
        (
            {**make_plan().to_dict(), "layers": ["1", 3]},
            "layers is .*, needs a list of the numbers",
        ),
        ({**make_plan().to_dict(), "layers": [True, 3]}, "layers is"),
        ({**make_plan().to_dict(), "candidate_bits": [[], 1]}, "candidate_bits is"),
        ({**make_plan().to_dict(), "group_size": [64]}, "group_size is .64., needs a whole"),
        ({**make_plan().to_dict(), "group_size": {"w2": 64.0}}, "group_size is .*64.0}, needs a"),
        (
            {**make_plan().to_dict(), "nominal_bits": 10**400},
            "nominal_bits is 1.*, needs a number",
        ),
        ({**make_plan().to_dict(), "nominal_bits": float("nan")}, "nominal_bits is nan"),
        ({**make_plan().to_dict(), "options": []}, "options is .., needs an object"),
        ({**make_plan().to_dict(), "layers": [1, 1]}, "mine.json: the plan is not valid"),
    ],
)
def test_unreadable_plans_are_refused_by_name(value, message):
    with pytest.raises(UserError, match=message):
        Plan.from_dict(value, "mine.json")


def test_rows_of_a_plan_may_be_lists():
    value = {**make_plan().to_dict(), "bits": [[1, 2, 3], "332"]}
    assert Plan.from_dict(value) == make_plan()


def test_a_recipe_of_a_plan_is_one_by_name_or_none():
    for name, found in (("paper", "paper"), ([], None), ({"a": 1}, None), ("mine", None)):
        assert recipe_of(make_plan(options={"recipe": name})) == found


def test_candidate_bits_say_every_fault():
    for wrong in ((1, 2.0), ["1"], 3, "12", [True]):
        assert "needs a list of whole numbers" in check_candidate_bits(wrong)[0]
    assert check_candidate_bits((1, 2, 3)) == []
    assert len(check_candidate_bits((2, 2, 9))) == 2


def test_json_files(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": [1, 2]})
    assert read_json(file) == {"a": [1, 2]}
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]
    file.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(file)
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match="JSON"):
        read_json(file)
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8"):
        read_json(file)
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "b.json")
    with pytest.raises(UserError, match="is a folder"):
        read_json(tmp_path)
