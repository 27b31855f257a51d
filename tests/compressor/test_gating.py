"""What experts do with gate and up is measured: order of rows, limits, and what is neither."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import gelu, silu

from mcmoe_kernels.activations import Activation, activate
from mcmoe_vllm.model.experts import deinterleave, interleave, stack_parts
from mcmoe_vllm.model.gating import Gating, activation_of, measure_gating

GPT_OSS = Activation(limit=7.0, alpha=1.702, up_offset=1.0)
DEEPSEEK_V4 = Activation(limit=10.0)


def module(function):
    return SimpleNamespace(_apply_gate=function)


def halves(function):
    return module(lambda rows: function(*rows.chunk(2, -1)))


def pairs(function):
    return module(lambda rows: function(rows[..., ::2], rows[..., 1::2]))


def clamped(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        (SimpleNamespace(act_fn=silu), Gating()),  # a class without a function of its own
        (SimpleNamespace(act_fn=torch.relu), Gating()),
        (halves(lambda g, u: gelu(g) * u), Gating()),
        (pairs(lambda g, u: silu(g) * u), Gating(True)),
        (pairs(clamped), Gating(True, GPT_OSS)),
        (halves(clamped), Gating(False, GPT_OSS)),
        (halves(lambda g, u: silu(g.clamp(max=10)) * u.clamp(-10, 10)), Gating(False, DEEPSEEK_V4)),
        (halves(lambda g, u: silu(g) * (u + 1)), Gating(False, Activation(up_offset=1.0))),
    ],
)
def test_what_families_do_is_measured(experts, expected):
    assert measure_gating(experts) == expected


@pytest.mark.parametrize(
    "experts",
    [
        halves(lambda g, u: g * silu(u)),  # up first
        pairs(lambda g, u: g * silu(u)),
        halves(lambda g, u: silu(g)),
        halves(lambda g, u: silu(g) * u.flip(-1)),  # other pairs
        halves(lambda g, u: silu(g) * u.clamp(-2, 7)),  # the limit of one side
        halves(lambda g, u: silu(g) * u.clamp(-7, 7)),  # gates go beyond it
        halves(lambda g, u: gelu(g.clamp(max=7)) * u.clamp(-7, 7)),
        halves(lambda g, u: silu(g).clamp(max=7) * u.clamp(-7, 7)),  # a limit after the function
        halves(lambda g, u: silu(g) + u),
        module(lambda rows: silu(rows)),
    ],
)
def test_what_no_formula_describes_is_not_taken_for_one(experts):
    assert measure_gating(experts) is None


def test_gates_above_ups_whatever_the_order_of_the_module():
    rows = 8 * torch.randn(5, 2 * 6, generator=torch.Generator().manual_seed(0))
    expected = activate(rows, GPT_OSS)
    for experts, gating in ((pairs(clamped), Gating(True)), (halves(clamped), Gating())):
        torch.testing.assert_close(activation_of(experts, gating)(rows), expected)


def test_pairs_of_rows():
    rows = torch.arange(6).view(6, 1)
    assert interleave(rows).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(deinterleave(interleave(rows)), rows)
    assert torch.equal(interleave(rows.t(), -1), interleave(rows).t())
    assert torch.equal(deinterleave(interleave(rows.t(), -1), -1), rows.t())
    gate, up, down = rows[:3], rows[3:], rows + 10
    for parts in ((gate, up, down), (interleave(rows), down)):
        w13, w2 = stack_parts(parts)
        assert torch.equal(w13, rows) and torch.equal(w2, down)
