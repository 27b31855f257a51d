"""The quantizer's kernels against its definition in plain torch."""

import pytest
import torch

from mcmoe_kernels.quantize.columns import compensate_torch, descend_torch
from mcmoe_vllm.quantize import quantizer
from mcmoe_vllm.quantize.gptq import factor_hessian
from mcmoe_vllm.quantize.ranges import GroupFit, round_to_nearest

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


def fit_of(device, **options):
    return GroupFit(torch.tensor(BITS, device=device), False, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"zeros": "half"},
        {"search": "norm", "binary_scale": "mean"},
        {"search": "full"},
    ],
    ids=["best", "paper", "full"],
)
def test_fit_group(device, options):
    w, hessian = batch(device)
    group = w[:, 32:96]  # a view whose matrices do not lie side by side
    importance = hessian.diagonal(dim1=1, dim2=2)[:, 32:96].contiguous()
    fit = fit_of(device, **options)
    found = columns.fit_group(
        group, importance, fit.shrink.expand(-1, len(BITS), 1)[..., 0], fit.max_code[:, 0],
        fit.steps[:, 0], power=fit.power, weighted=fit.weighted, symmetric=False,
        weighted_binary=fit.weighted_binary,
    )  # fmt: skip
    for value, expected in zip(found, fit.search(group, importance), strict=True):
        # Two ranges can be within the last bits of each other.
        close = (value - expected).abs() <= 1e-5 * expected.abs()
        assert float(close.float().mean()) >= 0.98


def test_fit_group_symmetric(device):
    w, hessian = batch(device)
    importance = hessian.diagonal(dim1=1, dim2=2).contiguous()
    fit = GroupFit(torch.full((4,), 4, device=device), True)
    scale, zero = columns.fit_group(
        w, importance, fit.shrink[..., 0], fit.max_code[:, 0], fit.steps[:, 0], power=2.0,
        weighted=True, symmetric=True, weighted_binary=True,
    )  # fmt: skip
    expected, middle = fit.search(w, importance)
    assert torch.equal(zero, middle) and bool((zero == 8).all())
    assert float((scale == expected).float().mean()) >= 0.98


# 96 columns: three times what a program holds, so that errors of all before move onto the third.
@pytest.mark.parametrize("count", [32, 96])
@pytest.mark.parametrize("moved", [1.0, 0.0])
def test_compensate(device, moved, count):
    w, hessian = batch(device)
    fit, factored = fit_of(device), factor_hessian(hessian)
    scale, zero = fit.search(w, hessian.diagonal(dim1=1, dim2=2))
    given = (scale, zero, factored.inverse, fit.max_code[:, 0],
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
    fit = fit_of(device)
    codes, scale, zero = round_to_nearest(w, hessian, fit, 128)
    deq = (codes - zero) * scale
    slope = hessian @ (w - deq)
    results = []
    for descend in (columns.descend, descend_torch):
        q = codes.clone()
        moves = descend(slope, deq, q, scale[:, 0].contiguous(), zero[:, 0].contiguous(), hessian,
                        fit.max_code[:, 0], 32, count)  # fmt: skip
        results.append((q, moves))
    (found, moves), (expected, expected_moves) = results
    assert not torch.equal(expected, codes)
    end = 32 + count
    assert torch.equal(found[:, :32], codes[:, :32]) and torch.equal(found[:, end:], codes[:, end:])
    assert nearly_all_equal(found, expected) and nearly_all_equal(moves, expected_moves)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", BITS)
def test_a_gpu_quantizes_as_well_as_a_cpu(bits):
    w, hessian = batch("cpu", rows=96, k=256)
    weight = w.transpose(1, 2).contiguous()
    on_cpu = quantizer.quantize(weight, hessian, bits, 64)
    on_gpu = quantizer.quantize(weight.cuda(), hessian.cuda(), bits, 64)
    # A tie that falls otherwise moves all that follows in its row, to an equally good end.
    assert float(on_gpu.error.sum()) == pytest.approx(float(on_cpu.error.sum()), rel=0.02)
