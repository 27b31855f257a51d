"""Activations as two 8-bit digits: exact where they promise it, honest where they cannot be."""

import pytest
import torch

from mcmoe_kernels.formats.records import column_permutation
from mcmoe_kernels.gpu.digits import HEADROOM, MAX_FIXED, split_digits_torch


def join_digits(digits, meta):
    fixed = digits[:, 0].int() * 256 + digits[:, 1].int()
    values = torch.empty_like(fixed)
    values[:, column_permutation(fixed.shape[1])] = fixed
    blocks = values.unflatten(1, (meta.shape[1], -1))
    return blocks, (blocks.double() * meta[..., :1].double()).flatten(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_rounding_is_bounded_by_the_largest_of_a_block(dtype, block):
    x = (torch.randn(5, 256) * torch.logspace(-3, 3, 256)).to(dtype)
    digits, meta = split_digits_torch(x, block)
    fixed, back = join_digits(digits, meta)
    assert int(fixed.abs().max()) <= MAX_FIXED
    assert torch.equal(meta[..., 1], fixed.sum(-1).float())
    error = (back - x.double()).abs().unflatten(1, (-1, block))
    largest = x.double().abs().unflatten(1, (-1, block)).amax(-1, keepdim=True)
    assert bool((error <= largest * HEADROOM * 2.0**-15).all())
    if dtype == torch.bfloat16:  # eight bits of significand, fourteen of fixed point
        near = x.double().abs().unflatten(1, (-1, block)) >= largest * 2.0**-6
        assert bool((error[near] == 0).all())


def test_integers_are_exact():
    x = torch.randint(-127, 128, (3, 128)).float().bfloat16()
    assert torch.equal(join_digits(*split_digits_torch(x, 128))[1], x.double())


@pytest.mark.parametrize("value", [0.0, 1e-38, 3e38])
def test_extreme_blocks(value):
    x = torch.full((1, 32), value).bfloat16()
    back = join_digits(*split_digits_torch(x, 32))[1]
    torch.testing.assert_close(back, x.double(), rtol=2.0**-15, atol=1e-30)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_spoils_its_block_alone(value):
    x = torch.ones(2, 64).bfloat16()
    x[0, 3] = value
    _, meta = split_digits_torch(x, 32)
    assert meta[..., 0].isnan().tolist() == [[True, False], [False, False]]
