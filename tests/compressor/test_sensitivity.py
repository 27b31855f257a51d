"""Where a plan's loss is expected to lie."""

import pytest

from mcmoe_vllm.compress.expected_loss import describe_costs, matrix_costs, summarize_costs
from mcmoe_vllm.plan import Plan, same_group_size


def plan_of(bits, w2_bits, significance):
    return Plan(
        model="m", architecture="MixtralForCausalLM", layers=(1, 3), bits=bits, w2_bits=w2_bits,
        candidate_bits=(1, 2, 4), group_size=same_group_size(128), dense_bits=4, nominal_bits=2.0,
        options={"significance": significance},
    )  # fmt: skip


def layer(index, sensitivity, *experts):
    """Errors of experts, for candidates 1, 2 and 4 bits: (w13, w2) each."""
    return {"layer": index, "sensitivity": sensitivity, "projection_errors": experts}


FIRST = layer(1, 2.0, [[9, 8], [3, 4], [1, 1]], [[6, 7], [2, 5], [1, 2]])
SECOND = layer(3, 0.5, [[4, 4], [2, 2], [1, 1]], [[8, 6], [4, 2], [2, 1]])


def test_each_matrix_costs_its_squared_change_times_its_layers_sensitivity():
    costs = matrix_costs(plan_of(((2, 4), (1, 2)), ((4, 1), (1, 2)), [FIRST, SECOND]))
    found = [(c.layer, c.expert, c.projection, c.bits, c.nats) for c in costs]
    assert found == [
        (1, 0, "w13", 2, 18.0), (1, 0, "w2", 4, 2.0), (1, 1, "w13", 4, 2.0), (1, 1, "w2", 1, 98.0),
        (3, 0, "w13", 1, 8.0), (3, 0, "w2", 1, 8.0), (3, 1, "w13", 2, 8.0), (3, 1, "w2", 2, 2.0),
    ]  # fmt: skip


def test_the_summary_puts_the_costliest_first():
    summary = summarize_costs(
        matrix_costs(plan_of(((2, 4), (1, 2)), ((4, 1), (1, 2)), [FIRST, SECOND]))
    )
    assert summary["nats"] == 146.0
    assert [entry["layer"] for entry in summary["layers"]] == [1, 3]
    assert sum(entry["share"] for entry in summary["layers"]) == pytest.approx(1)
    assert list(summary["projections"]) == ["w2", "w13"]
    assert summary["matrices"][0] == {
        "layer": 1, "expert": 1, "projection": "w2", "bits": 1, "nats": 98.0
    }  # fmt: skip
    line = describe_costs(summary)
    assert "layers 1 (82%), 3 (18%)" in line and "w2 of expert 1 in layer 1 (1-bit, 67%)" in line


@pytest.mark.parametrize(
    "significance", [[], [layer(1, None, [], []), layer(3, None, [], [])]], ids=["none", "paper"]
)
def test_without_a_measured_kl_nothing_is_said(significance):
    plan = plan_of(((2, 4), (1, 2)), (), significance)
    assert matrix_costs(plan) == [] and summarize_costs([]) is None


def test_experts_that_cost_nothing_have_no_shares():
    free = [layer(index, 0.0, [[1, 1]] * 3, [[1, 1]] * 3) for index in (1, 3)]
    assert summarize_costs(matrix_costs(plan_of(((2, 4), (1, 2)), (), free))) is None
