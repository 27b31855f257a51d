"""The quantizer's kernels against its definition in plain torch."""

import pytest
import torch

from mcmoe_kernels.formats import FORMATS
from mcmoe_kernels.quantize.columns import (
    compensate_torch,
    descend_torch,
    encode,
    fit_group_torch,
)

columns = pytest.importorskip("mcmoe_kernels.quantize.columns_triton")

BITS = (1, 2, 3, 4)


def batch(device, rows=40, k=128, seed=0):
    """A matrix of each width, [B, K, N], and Hessians of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(len(BITS), k, rows, generator=generator)
    x = torch.randn(len(BITS), 300, 24, generator=generator)
    x = x @ torch.randn(len(BITS), 24, k, generator=generator)
    x += 0.3 * torch.randn(len(BITS), 300, k, generator=generator)
    return w.to(device), (x.transpose(1, 2) @ x).to(device)


def nearly_all_equal(found, expected, share=0.998):
    """Both round alike, but for ties that a last bit of difference breaks."""
    return float((found == expected).float().mean()) >= share


def codes_of(device):
    """The largest code of each width, and its steps of zeros."""
    chosen = [FORMATS[b] for b in BITS]
    max_code = torch.tensor([f.levels - 1.0 for f in chosen], device=device)
    return max_code, torch.tensor([float(f.zero_steps) for f in chosen], device=device)


def fitted(w, hessian, max_code, steps):
    """Scale and zero of matrices of one group, [B, N]."""
    shrink = torch.linspace(0.4, 1, 8, device=w.device)[:, None].expand(-1, len(BITS))
    return fit_group_torch(
        w, hessian.diagonal(dim1=1, dim2=2), shrink, max_code, steps, power=2.0, weighted=True,
        symmetric=False, weighted_binary=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "smallest"),
    [
        ({"power": 2.0, "weighted": True, "weighted_binary": True}, 0.4),
        ({"power": 2.4, "weighted": False, "weighted_binary": False}, 0.9),  # `paper`
        ({"power": 2.0, "weighted": False, "weighted_binary": True}, 1.0),  # the whole range
    ],
    ids=["best", "paper", "full"],
)
def test_fit_group(device, options, smallest):
    w, hessian = batch(device)
    group = w[:, 32:96]  # a view whose matrices do not lie side by side
    importance = hessian.diagonal(dim1=1, dim2=2)[:, 32:96].contiguous()
    shrink = torch.linspace(smallest, 1, 24, device=device)[:, None].expand(-1, len(BITS))
    given = (group, importance, shrink, *codes_of(device))
    found = columns.fit_group(*given, symmetric=False, **options)
    expected = fit_group_torch(*given, symmetric=False, **options)
    for value, wanted in zip(found, expected, strict=True):
        # Two ranges can be within the last bits of each other.
        close = (value - wanted).abs() <= 1e-5 * wanted.abs()
        assert float(close.float().mean()) >= 0.98


def test_no_zero_is_more_than_a_word_holds(device):
    """5 bits: a zero may be 31 of their steps, of which a word holds 15."""
    w, hessian = batch(device)
    given = (
        w, hessian.diagonal(dim1=1, dim2=2).contiguous(), torch.ones(1, len(BITS), device=device),
        torch.full((len(BITS),), 31.0, device=device), torch.ones(len(BITS), device=device),
    )  # fmt: skip
    options = {"power": 2.0, "weighted": True, "symmetric": False, "weighted_binary": True}
    for fit in (columns.fit_group, fit_group_torch):
        assert float(fit(*given, **options)[1].max()) == 15


def test_fit_group_symmetric(device):
    w, hessian = batch(device)
    shrink = torch.linspace(0.7, 1, 24, device=device)[:, None].expand(-1, len(BITS))
    given = (
        w, hessian.diagonal(dim1=1, dim2=2).contiguous(), shrink,
        torch.full((4,), 15.0, device=device), torch.ones(4, device=device),
    )  # fmt: skip
    options = {"power": 2.0, "weighted": True, "symmetric": True, "weighted_binary": True}
    scale, zero = columns.fit_group(*given, **options)
    expected, middle = fit_group_torch(*given, **options)
    assert torch.equal(zero, middle) and bool((zero == 8).all())
    assert float((scale == expected).float().mean()) >= 0.98


# 96 columns: three times what a program holds, so that errors of all before move onto the third.
@pytest.mark.sampled(2)
@pytest.mark.parametrize("count", [32, 96])
@pytest.mark.parametrize("moved", [1.0, 0.0])
def test_compensate(device, moved, count):
    w, hessian = batch(device)
    max_code, steps = codes_of(device)
    scale, zero = fitted(w, hessian, max_code, steps)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian)).mT.contiguous()
    given = (scale, zero, inverse, max_code,
             torch.full((len(BITS),), moved, device=device), 32, count, 24)  # fmt: skip
    before = w.clone()
    results = []
    for compensate in (columns.compensate, compensate_torch):
        codes = torch.full_like(w, -1)
        errors = torch.full_like(w, float("nan"))
        compensate(w, codes, errors, *given)
        results.append((codes, errors))
    (codes, errors), (expected, expected_errors) = results
    assert torch.equal(w, before)
    end = 32 + count
    assert bool((codes[:, :32] == -1).all()) and bool((codes[:, end:] == -1).all())
    assert nearly_all_equal(codes, expected)
    same = (codes == expected)[:, 32:end].all(1, keepdim=True).expand(-1, count, -1)
    found, wanted = (e[:, 24 : 24 + count][same] for e in (errors, expected_errors))
    # `count` updates, each off by a rounding of the largest error or so.
    assert float((found - wanted).abs().max()) <= 2 * count * 2**-23 * float(wanted.abs().max())
    assert bool(errors[:, 24 + count :].isnan().all())


@pytest.mark.parametrize("count", [32, 96])
def test_descend(device, count):
    w, hessian = batch(device)
    max_code, steps = codes_of(device)
    scale, zero = fitted(w, hessian, max_code, steps)
    rows = (part.unsqueeze(1) for part in (scale, zero, max_code.unsqueeze(1)))
    codes = encode(w, *rows)
    deq = (codes - zero.unsqueeze(1)) * scale.unsqueeze(1)
    slope = hessian @ (w - deq)
    results = []
    for descend in (columns.descend, descend_torch):
        q = codes.clone()
        moves = descend(slope, deq, q, scale, zero, hessian, max_code, 32, count)
        results.append((q, moves))
    (found, moves), (expected, expected_moves) = results
    assert not torch.equal(expected, codes)
    end = 32 + count
    assert torch.equal(found[:, :32], codes[:, :32]) and torch.equal(found[:, end:], codes[:, end:])
    assert nearly_all_equal(found, expected) and nearly_all_equal(moves, expected_moves)
