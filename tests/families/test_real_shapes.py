"""Models of real size, by their headers alone."""

import pytest
import torch

from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.model.agreement import open_layout
from tests.families.real_shapes import REAL, make_config, write_real

FAST = ("gpt_oss", "lfm2_moe")
EACH = [pytest.param(name, marks=[] if name in FAST else pytest.mark.nightly) for name in REAL]


@pytest.mark.parametrize("name", EACH)
def test_the_whole_model_is_found(name, tmp_path):
    row = REAL[name]
    checkpoint = open_checkpoint(write_real(name, tmp_path / name))
    skeleton = open_layout(checkpoint, None, torch.bfloat16).skeleton
    config = make_config(row, None).get_text_config()
    assert skeleton.moe_layers == list(range(row.dense, config.num_hidden_layers))
    assert checkpoint.num_parameters == pytest.approx(row.billions * 1e9, rel=0.02)
