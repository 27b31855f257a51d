"""The definition of activations against the formulas of the models that have them."""

import pytest
import torch
import torch.nn.functional as F

from mcmoe_kernels.activations import Activation, activate
from tests.helpers.expert_layers import DEEPSEEK_V4, GPT_OSS, RELU2, SILU, STEP


def gpt_oss(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)


FORMULAS = {
    SILU: lambda gate, up: gate / (1 + torch.exp(-gate)) * up,
    Activation("gelu"): lambda gate, up: gate * torch.special.ndtr(gate) * up,
    Activation("gelu_tanh"): lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    GPT_OSS: gpt_oss,
    DEEPSEEK_V4: lambda gate, up: F.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0),
    STEP: lambda gate, up: F.silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0),
}


@pytest.mark.parametrize("activation", FORMULAS, ids=str)
def test_gated(activation):
    h = torch.linspace(-20, 20, 41, dtype=torch.float64)
    gate, up = torch.meshgrid(h, h.flip(0), indexing="ij")
    value = activate(torch.cat([gate, up], dim=-1), activation)
    torch.testing.assert_close(value, FORMULAS[activation](gate, up))
    assert value.shape == up.shape


def test_without_a_gate():
    h = torch.tensor([[-3.0, -0.0, 2.0, 300.0, float("nan")]]).bfloat16()
    expected = torch.tensor([[0.0, 0.0, 4.0, 90000.0, float("nan")]]).bfloat16()
    assert torch.equal(activate(h, RELU2).nan_to_num(), expected.nan_to_num())
    assert (RELU2.rows, SILU.rows) == (1, 2)


@pytest.mark.parametrize("activation", FORMULAS, ids=str)
def test_nan_stays_nan(activation):
    h = torch.tensor([[float("nan"), 20.0, 20.0, float("nan")]])
    assert bool(activate(h, activation).isnan().all())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"function": "swigluoai"}, "'swigluoai' is not supported, use one of gelu, gelu_tanh"),
        ({"limit": 0.0}, "limit must be above 0, or None for none, got 0.0"),
        ({"function": "gelu", "alpha": 2.0}, "alpha 2.0 is for silu alone, gelu takes 1"),
        ({"gated": False, "up_offset": 1.0}, "limit None and up_offset 1.0 are for gated"),
    ],
)
def test_what_is_not_computed_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Activation(**given)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ValueError, match="'tanh' is not .*; limit must be .*; alpha 2.0 is for"):
        Activation("tanh", limit=-1.0, alpha=2.0)
