"""The choice of the GPU's path."""

import pytest
import torch

pytest.importorskip("vllm")

from mcmoe_vllm.plugin.gpu import logger, prepare_on_gpu
from tests.helpers.expert_layers import (
    experts_float64,
    random_input,
    random_layer,
    random_routing,
    relative_error,
)

pytestmark = pytest.mark.vllm

MIXED13, MIXED2 = (1, 2, 3, 4, 0, 2), (2, 3, 1, 2, 0, 4)


def test_where_triton_cannot_run_plain_torch_does_and_says_why(monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warning_once", lambda text, *values: said.append(values))
    layer = random_layer(MIXED13, MIXED2)
    prepared = prepare_on_gpu(layer, torch.float32, 2, None)  # held by a CPU
    assert "torch" in prepared.path and prepared.keeps_packed
    assert "no CUDA device" in str(said) and "float32" in str(said)
    x, (weights, ids) = random_input(5, 256, torch.float32), random_routing(5, 6, 2)
    out = prepared.compute(x, weights, ids)
    assert relative_error(out, experts_float64(x, layer, weights, ids)) < 1e-6
