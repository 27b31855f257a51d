"""Columns that share a scale: what is asked for, what fits, and what comes of it."""

from dataclasses import replace

import numpy as np
import pytest

from mcmoe_kernels.formats import packing
from mcmoe_vllm import cli
from mcmoe_vllm.allocate.projections import allocate_projections, projection_costs
from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.compress.group_sizes import Columns, choose_group_sizes, quantized_columns
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.compress.pipeline import quantize
from mcmoe_vllm.disk import read_json
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.inspection import inspect_checkpoint
from mcmoe_vllm.model.moe_model import open_model
from tests.conftest import make_tiny_model


def columns(hidden=2048, width=1024, dense=(4096,), ranks=1):
    return [
        Columns("w13", "hidden size", hidden),
        Columns("w2", "expert width", width, ranks),
        *(Columns("dense", f"layers.0.o_proj {count}", count, ranks) for count in dense),
    ]


@pytest.mark.parametrize(
    ("given", "asked", "sizes"),
    [
        ({}, {}, (128, 128, 128)),
        ({"width": 704, "hidden": 2816}, {}, (128, 64, 128)),  # Gemma-4
        ({"width": 1856, "hidden": 2688}, {}, (128, 64, 128)),  # Nemotron-3 Nano
        ({"width": 2880, "hidden": 2880, "dense": (2880, 4096)}, {}, (64, 64, 64)),  # gpt-oss
        ({"width": 1408}, {}, (128, 128, 128)),  # DeepSeek-V2-Lite
        ({"width": 1408, "ranks": 2}, {}, (128, 64, 128)),  # 704 on each rank
        ({"width": 1408, "ranks": 4}, {}, (128, 32, 128)),  # 352
        ({"dense": ()}, {}, (128, 128, 128)),  # nothing in int4
        ({"width": 1408, "ranks": 2}, {"w2": 32, "w13": 64}, (64, 32, 128)),
    ],
)
def test_the_largest_that_fits_every_rank_is_taken(given, asked, sizes):
    found = choose_group_sizes(asked, columns(**given))
    assert found == dict(zip(("w13", "w2", "dense"), sizes, strict=True))


@pytest.mark.parametrize(
    ("given", "asked", "message"),
    [
        ({"width": 704, "dense": (96, 160)}, {"w2": 128, "dense": 64},
            "columns are no multiple of their group size in 3 places:\n"
            "  - expert width: 704 columns, group size 128\n"
            "  - layers.0.o_proj 96: 96 columns, group size 64\n"
            "  - layers.0.o_proj 160: 160 columns, group size 64\n"
            "Remedy: use --group-size w2=64,dense=32, or leave it out"),
        ({"width": 1408, "ranks": 8}, {},  # 176
            "columns are no multiple of their group size in 1 place:\n"
            "  - expert width: 1408 columns over 8 ranks, group size 32\n"
            "Remedy: use a smaller --tensor-parallel"),
        ({"width": 1408, "ranks": 3}, {}, "1408 columns over 3 ranks"),
        ({"width": 80, "ranks": 2}, {}, "Remedy: no group size fits this model"),
        ({"dense": (80,)}, {}, "Remedy: no group size fits this model, or --dense-bits 16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_listed(given, asked, message):
    with pytest.raises(UserError) as refused:
        choose_group_sizes(asked, columns(**given))
    assert message in str(refused.value)


def test_ranks_split_what_stands_behind_attention(tiny_models):
    model = open_model(open_checkpoint(tiny_models("qwen2_moe")), "cpu").outline
    found = list(quantized_columns(model, 4, 2))
    assert [(c.kind, c.count, c.ranks) for c in found[:2]] == [("w13", 128, 1), ("w2", 128, 2)]
    split = {c.what.rpartition(".")[2] for c in found if c.kind == "dense" and c.ranks == 2}
    whole = {c.what.rpartition(".")[2] for c in found if c.kind == "dense" and c.ranks == 1}
    assert split == {"o_proj", "down_proj"}
    assert whole == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert {c.kind for c in quantized_columns(model, 16, 2)} == {"w13", "w2"}


# What is asked for


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("w13=100,foo=64,w2=0", ["group_size of w13 is 100, allowed are [32, 64, 128]",
            "group_size of w2 is 0, allowed", "group_size has 'foo', allowed are w13, w2, dense"]),
        ("96", ["group_size is 96, allowed are [32, 64, 128]"]),
        ("w13=64,w2", ["'w13=64,w2' has w2; give"]),
        ("w13=x,=3,w2=64,w2=32", ["has w13=x, =3, w2 twice; give a number such as 64, or"]),
        ("", ["give a number such as 64"]),
    ],
)  # fmt: skip
def test_every_wrong_part_is_named(text, messages, capsys):
    try:
        code = cli.main(["quantize", "m", "-o", "o", "--group-size", text])
    except SystemExit as stopped:  # of what cannot be read at all
        code = stopped.code
    err = capsys.readouterr().err
    assert code == 2 and all(message in err for message in messages), err


def test_a_number_stands_for_every_kind():
    every = {"w13": 64, "w2": 64, "dense": 64}
    assert QuantizeOptions("m", "o", group_size=64) == QuantizeOptions("m", "o", group_size=every)
    assert QuantizeOptions("m", "o", group_size={"w2": 32}).group_sizes == {"w2": 32}
    assert QuantizeOptions("m", "o").group_sizes == {}
    for wrong in ({"w2": 64.0}, {"w2": True}, [64], "64", 64.0):
        with pytest.raises(UserError, match="group_size"):
            QuantizeOptions("m", "o", group_size=wrong)
    with pytest.raises(UserError, match="tensor_parallel is 0, needs at least 1"):
        QuantizeOptions("m", "o", tensor_parallel=0)


def test_the_budget_counts_the_groups_of_both():
    """Two experts, of which the second is not worth a bit."""
    errors = np.array([[[[4.0, 4], [2, 2], [1, 1]], [[0.1, 0.1]] * 3]])
    costs, widths = projection_costs(errors, np.ones(1), (1, 2, 3))
    for sizes in ({"w13": 128, "w2": 32}, {"w13": 32, "w2": 128}, {"w13": 128, "w2": 128}):
        chosen, _ = allocate_projections(costs, widths, 2.0, sizes, scope="layer")
        assert chosen == (((3, 3), (1, 1)),)  # an average of 2, whatever scales take


# The whole way


def test_groups_of_their_own_for_down_projections(tmp_path, calibration_text):
    """Width 96: 32 for down projections, 128 for the rest. A second rank would have 48."""
    source = make_tiny_model(tmp_path / "source", "mixtral", layers=1, intermediate_size=96)
    options = QuantizeOptions(
        model=str(source), output=str(tmp_path / "out"), calibration=str(calibration_text),
        samples=2, sequence_length=32, bits=2, recipe="paper", method="rtn",
    )  # fmt: skip
    report = quantize(options)
    sizes = {"w13": 128, "w2": 32, "dense": 128}
    found = inspect_checkpoint(tmp_path / "out", check=True)
    assert found.config.group_size == report["plan"]["group_size"] == sizes
    assert read_json(tmp_path / "out" / "plan.json")["group_size"] == sizes
    assert (
        "Columns that share a scale: w13 128, w2 32, dense 128."
        in (tmp_path / "out" / "README.md").read_text()
    )
    each = 2 * packing.packed_bytes(96, 128, 2, 128) + packing.packed_bytes(128, 96, 2, 32)
    assert found.expert_bytes == report["bytes"]["experts"] == 4 * each
    split = replace(options, tensor_parallel=2, output=str(tmp_path / "split"))
    with pytest.raises(UserError, match="96 columns over 2 ranks, group size 32\nRemedy: use a"):
        quantize(split)
