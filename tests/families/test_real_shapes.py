"""Models of real size, by their headers alone."""

import pytest

from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.compress.group_sizes import choose_group_sizes, quantized_columns
from mcmoe_vllm.compress.publish import count_sizes
from mcmoe_vllm.model.moe_model import open_model
from mcmoe_vllm.plan import Plan
from tests.families.real_shapes import REAL, make_config, write_real

FAST = ("gpt_oss", "lfm2_moe")
EACH = [pytest.param(name, marks=[] if name in FAST else pytest.mark.nightly) for name in REAL]
WIDTHS = (2, 3)


@pytest.mark.parametrize("name", EACH)
def test_the_whole_model_is_found(name, tmp_path):
    """Its layers, its parameters, the group sizes that fit, and what it will weigh."""
    row = REAL[name]
    checkpoint = open_checkpoint(write_real(name, tmp_path / name))
    model = open_model(checkpoint, "cpu").outline
    config = make_config(row, None).get_text_config()
    assert model.moe_layers == list(range(row.dense, config.num_hidden_layers))
    assert checkpoint.num_parameters == pytest.approx(row.billions * 1e9, rel=0.02)
    groups = choose_group_sizes({}, list(quantized_columns(model, 4, 1)))
    assert groups == {"w13": 128, "w2": 128, "dense": 128, **row.groups}
    half = tuple(WIDTHS[e % 2] for e in range(model.num_experts))
    plan = Plan("m", row.cls, tuple(model.moe_layers), (half,) * len(model.moe_layers), WIDTHS,
                groups, 4, sum(WIDTHS) / 2)  # fmt: skip
    sizes = count_sizes(model, plan)
    scales = 16 * (2 / groups["w13"] + 1 / groups["w2"]) / 3  # bits, of gate, up and down
    assert sizes.expert_bits == pytest.approx(2.5 + scales)
    others = checkpoint.num_parameters - sizes.expert_parameters
    assert others / 2 <= sizes.other_bytes <= 2.02 * others  # from all int4 to all in 16 bits
    print(f"{row.name}: {sizes.original_bytes / 2**30:.1f} -> {sizes.total_bytes / 2**30:.1f} GiB,"
          f" {groups}, {len(model.moe_layers)} x {model.num_experts}")  # fmt: skip
