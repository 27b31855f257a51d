"""GPTQ against a textbook version, and everything that must never come out of a quantizer."""

from dataclasses import replace

import pytest
import torch

from mcmoe_kernels.formats import packing
from mcmoe_kernels.quantize.columns import encode, round_scale
from mcmoe_vllm.quantize import quantizer
from mcmoe_vllm.quantize.codes import relative_error, row_errors
from mcmoe_vllm.quantize.gptq import DAMPING
from mcmoe_vllm.quantize.ranges import GroupFit, round_to_nearest
from mcmoe_vllm.quantize.refine import _descend, _refit_scales, damp, refine
from mcmoe_vllm.recipes import BEST, PAPER

GPTQ_ALONE = replace(BEST, refinements=0)


def correlated(batch=2, rows=24, columns=256, samples=400, seed=0):
    """Weights and the Hessian of inputs whose columns are strongly correlated."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(batch, rows, columns, generator=generator)
    mix = torch.randn(batch, 32, columns, generator=generator)
    x = torch.randn(batch, samples, 32, generator=generator) @ mix
    x += 0.1 * torch.randn(batch, samples, columns, generator=generator)
    return weight, x.transpose(1, 2) @ x


def textbook_gptq(weight, hessian, bits, group_size):
    """One matrix, one column at a time, every update at once, float64; scales as found by the
    quantizer's own search on the weights of that moment."""
    w = weight.double().clone()
    k = w.shape[1]
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(k)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    fit = GroupFit(torch.tensor([bits]), False, zeros=GPTQ_ALONE.zeros)
    result = torch.empty_like(w)
    for j in range(k):
        if j % group_size == 0:
            columns = slice(j, j + group_size)
            scale, zero = fit(
                w[:, columns].t().unsqueeze(0).float(), hessian.diagonal()[columns].unsqueeze(0)
            )
        q = encode(w[:, j].unsqueeze(0).float(), scale, zero, fit.max_code).double()
        result[:, j] = ((q - zero) * scale)[0]
        error = (w[:, j] - result[:, j]) / upper[j, j]
        w[:, j + 1 :] -= torch.outer(error, upper[j, j + 1 :])
    return result


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 128])
def test_gptq_equals_the_textbook(bits, group_size):
    weight, hessian = correlated(batch=1)
    q = quantizer.quantize(weight, hessian, bits, group_size, recipe=GPTQ_ALONE)
    assert q.gptq_kept.all()
    expected = textbook_gptq(weight[0], hessian[0], bits, group_size).float()
    # float32 against float64 can move a near tie, and with it what follows in that row alone; a
    # wrong update would move every row.
    moved_rows = (q.dequantize()[0] != expected).any(1).sum()
    assert moved_rows <= 3


@pytest.mark.parametrize("bits, gain", [(1, 1.2), (2, 1.5), (3, 1.5), (4, 1.5)])
def test_gptq_wins_clearly_where_inputs_are_correlated(bits, gain):
    weight, hessian = correlated()
    gptq = quantizer.quantize(weight, hessian, bits, 128)
    rounded = quantizer.quantize(weight, hessian, bits, 128, method="rtn")
    assert gptq.gptq_kept.all() and not rounded.gptq_kept.any()
    assert gptq.error.sum() * gain**2 < rounded.error.sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gptq_is_rounding_where_inputs_are_independent(bits):
    weight, _ = correlated()
    hessian = torch.eye(256).expand(2, 256, 256)
    gptq = quantizer.quantize(weight, hessian, bits, 128, recipe=GPTQ_ALONE)
    rounded = quantizer.quantize(weight, hessian, bits, 128, method="rtn")
    assert torch.equal(gptq.dequantize(), rounded.dequantize())


@pytest.mark.parametrize("bits, gain", [(1, 1.2), (2, 1.1), (3, 1.1), (4, 1.1)])
def test_refinement_wins_clearly_where_inputs_are_correlated(bits, gain):
    weight, hessian = correlated()
    refined = quantizer.quantize(weight, hessian, bits, 32)
    gptq = quantizer.quantize(weight, hessian, bits, 32, recipe=GPTQ_ALONE)
    assert refined.error.sum() * gain < gptq.error.sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_refinement_never_worsens_a_row(bits):
    weight, hessian = correlated(columns=128)
    hessian = damp(hessian, 0.05)  # what refinement minimises
    w = weight.transpose(1, 2)
    fit = GroupFit(torch.tensor([bits, bits]), False)
    before = round_to_nearest(w, hessian, fit, 32)
    after = refine(w, hessian, before, fit, 2)
    errors = [row_errors(w, codes, hessian) for codes in (before, after)]
    assert (errors[1] <= errors[0]).all() and (errors[1] < errors[0]).any()


def test_refitted_scales_are_the_least_squares_ones():
    weight, hessian = correlated(batch=1, rows=3, columns=64)
    w = weight.transpose(1, 2)
    fit = GroupFit(torch.tensor([3]), False)
    q, scale, zero = round_to_nearest(w, hessian, fit, 32)
    fitted = _refit_scales(q, scale, zero, hessian, hessian @ w)[0, :, 0]
    # Row 0 as one least-squares problem in its two scales.
    levels = torch.zeros(64, 2, dtype=torch.float64)
    for g in range(2):
        part = slice(32 * g, 32 * g + 32)
        levels[part, g] = (q[0, part, 0] - zero[0, g, 0]).double()
    h = hessian[0].double()
    expected = torch.linalg.solve(levels.T @ h @ levels, levels.T @ h @ weight[0, 0].double())
    torch.testing.assert_close(fitted.double(), expected, rtol=2**-8, atol=0)  # bf16 rounding


def test_descent_sets_each_code_to_its_best_given_the_others():
    weight, hessian = correlated(batch=1, rows=4, columns=64)
    w = weight.transpose(1, 2)
    fit = GroupFit(torch.tensor([2]), False)
    q, scale, zero = round_to_nearest(w, hessian, fit, 64)
    for _ in range(20):
        q = _descend(w, hessian, (q, scale, zero), fit, 64)
    least = row_errors(w, (q, scale, zero), hessian)
    for column in range(64):  # no single change of a code is better
        for code in range(4):
            changed = q.clone()
            changed[:, column] = code
            error = row_errors(w, (changed, scale, zero), hessian)
            assert (error >= least * (1 - 1e-4)).all()


def paper_reference(weight, hessian, bits):
    """Independent reading of the published code on one matrix: scales per group of 128 from the
    plain norm, and error that leaves a block of 128 columns only (except at 4 bits)."""
    w, k = weight.clone(), weight.shape[1]
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(k)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True).float()
    result = torch.empty_like(w)
    for start in range(0, k, 128):
        block = w[:, start : start + 128].clone()
        if bits == 1:
            scale, zero = 2 * block.abs().mean(1), torch.full((len(w),), 0.5)
        else:
            low, high = block.amin(1).clamp(max=0), block.amax(1).clamp(min=0)
            least = torch.full((len(w),), torch.inf)
            scale, zero = torch.ones(len(w)), torch.zeros(len(w))
            for step in range(101):
                tried = round_scale((high - low) * (0.9 + 0.002 * step) / (2**bits - 1))
                share = torch.tensor(0.9 + 0.2 * step / 100)
                z = torch.round(-low * share / tried)
                q = torch.round(block / tried[:, None] + z[:, None]).clamp(0, 2**bits - 1)
                error = ((q - z[:, None]) * tried[:, None] - block).abs().pow(2.4).sum(1)
                better = error < least
                least = torch.where(better, error, least)
                scale, zero = torch.where(better, tried, scale), torch.where(better, z, zero)
        scale = round_scale(scale)
        errors = torch.empty_like(block)
        for j in range(128):
            q = torch.round(block[:, j] / scale + zero).clamp(0, 2**bits - 1)
            result[:, start + j] = (q - zero) * scale
            column = start + j
            errors[:, j] = (block[:, j] - result[:, column]) / upper[column, column]
            if bits > 3:
                block[:, j + 1 :] -= torch.outer(
                    errors[:, j], upper[column, column + 1 : start + 128]
                )
        w[:, start + 128 :] -= errors @ upper[start : start + 128, start + 128 :]
    return result


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_papers_quantizer_equals_an_independent_reading(bits):
    weight, hessian = correlated(batch=1)
    q = quantizer.quantize(weight, hessian, bits, 128, recipe=PAPER)
    moved_rows = (q.dequantize()[0] != paper_reference(weight[0], hessian[0], bits)).any(1).sum()
    assert moved_rows <= 3  # near ties, as in the textbook test


@pytest.mark.parametrize(
    "trait, bits",
    [
        ({"compensated_bits": 1}, 2),
        ({"range_search": "hessian"}, 2),
        ({"binary_scale": "hessian"}, 1),
        ({"refinements": 1}, 2),
        ({"zeros": "half"}, 2),
    ],
)
def test_every_trait_of_the_papers_quantizer_matters(trait, bits):
    weight, hessian = correlated(batch=1)
    weight += 0.1
    published = quantizer.quantize(weight, hessian, bits, 128, recipe=PAPER).dequantize()
    other = quantizer.quantize(weight, hessian, bits, 128, recipe=replace(PAPER, **trait))
    assert not torch.equal(published, other.dequantize())


def test_the_paper_never_rounds_what_gptq_made_worse(monkeypatch):
    weight, _ = correlated(batch=1)
    hessian = torch.eye(256).unsqueeze(0)
    right = quantizer.gptq

    def failing(*arguments):
        codes, scale, zero = right(*arguments)
        return codes * 0, scale, zero

    monkeypatch.setattr(quantizer, "gptq", failing)
    kept = quantizer.quantize(weight, hessian, 2, 128, recipe=PAPER)
    rounded = quantizer.quantize(weight, hessian, 2, 128, recipe=GPTQ_ALONE)
    assert kept.gptq_kept.all() and not kept.codes.any()
    assert not rounded.gptq_kept.any() and rounded.codes.any()


def test_error_is_the_undamped_objective_and_the_better_is_kept():
    weight, hessian = correlated()
    gptq = quantizer.quantize(weight, hessian, 2, 128, splits=2)
    rounded = quantizer.quantize(weight, hessian, 2, 128, method="rtn", splits=2)
    difference = (weight - gptq.dequantize()).double()
    direct = ((difference @ hessian.double()) * difference).sum(-1).unflatten(1, (2, -1)).sum(-1)
    torch.testing.assert_close(gptq.error.double(), direct, rtol=1e-3, atol=0)
    assert gptq.error.shape == (2, 2) and (gptq.error <= rounded.error).all()


def test_rounding_is_kept_where_it_is_better():
    # One bit and inputs that are nearly independent: compensation gains little, in rows of their
    # own now and then nothing.
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 32, 128, generator=generator)
    x = torch.randn(4, 200, 128, generator=generator)
    given = (weight, x.transpose(1, 2) @ x, 1, 128)
    chosen = quantizer.quantize(*given, splits=32, recipe=GPTQ_ALONE)
    always = replace(GPTQ_ALONE, keep_rounding=False)
    compensated = quantizer.quantize(*given, splits=32, recipe=always)
    rounded = quantizer.quantize(*given, splits=32, method="rtn")
    kept = chosen.gptq_kept
    assert torch.equal(kept, compensated.error <= rounded.error)
    assert 0 < int((~kept).sum()) < int(kept.sum())
    expected = torch.where(kept[..., None], compensated.dequantize(), rounded.dequantize())
    assert torch.equal(chosen.dequantize(), expected)
    assert torch.equal(chosen.error, torch.minimum(compensated.error, rounded.error))


def test_widths_of_a_batch_do_not_touch_each_other():
    weight, hessian = correlated(batch=4)
    together = quantizer.quantize(weight, hessian, torch.tensor([3, 1, 4, 2]), 64)
    for position, bits in enumerate((3, 1, 4, 2)):
        one = slice(position, position + 1)
        alone = quantizer.quantize(weight[one], hessian[one], bits, 64)
        assert torch.equal(together.codes[one], alone.codes)
        assert torch.equal(together.scale[one], alone.scale)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_scales_are_exact_in_both_16_bit_types_and_zeros_are_codes(bits):
    weight, hessian = correlated()
    q = quantizer.quantize(weight * 0.01, hessian, bits, 32)
    assert torch.equal(q.scale, q.scale.half().float())
    assert torch.equal(q.scale, q.scale.bfloat16().float())
    if bits == 1:
        assert (q.zero == 0.5).all()
    else:
        steps = 2 if bits == 2 else 1
        assert torch.equal(steps * q.zero, (steps * q.zero).round())
        assert q.zero.min() >= 0 and q.zero.max() < 2**bits
    assert q.codes.max() < 2**bits
    packed = packing.pack(q.codes, bits)
    stored = packing.pack_scale(q.scale, q.zero, bits)
    assert torch.equal(packing.dequantize(packed, stored, bits), q.dequantize())


def test_one_bit_is_sign_times_the_weighted_mean():
    weight, hessian = correlated(batch=1)
    q = quantizer.quantize(weight, hessian, 1, 128, method="rtn")
    assert torch.equal(q.codes[0] == 1, weight[0] > 0)
    importance = hessian[0].diagonal()[:128]
    mean = (weight[0, :, :128].abs() * importance).sum(1) / importance.sum()
    torch.testing.assert_close(q.scale[0, :, 0], 2 * mean, rtol=2**-8, atol=0)  # bf16 rounding


def test_symmetric_int4_has_its_zero_at_8():
    weight, hessian = correlated()
    q = quantizer.quantize(weight, hessian, 4, 128, symmetric=True)
    assert (q.zero == 8).all() and q.codes.max() <= 15
    assert relative_error(weight, hessian, q.error) < 0.1


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "case", ["zero weights", "constant", "tiny", "one outlier", "zero Hessian", "rank one"]
)
def test_degenerate_input_is_finite_and_never_has_a_zero_scale(bits, case):
    weight, hessian = correlated(batch=1, columns=128)
    if case == "zero weights":
        weight.zero_()
    elif case == "constant":
        weight.fill_(0.03)
    elif case == "tiny":
        weight *= 1e-9
    elif case == "one outlier":
        weight[0, 0, 0] = 1e4
    elif case == "zero Hessian":
        hessian.zero_()
    elif case == "rank one":
        row = torch.randn(1, 1, 128) * 1e6
        hessian = row.transpose(1, 2) @ row
    q = quantizer.quantize(weight, hessian, bits, 128)
    assert q.dequantize().isfinite().all() and q.error.isfinite().all()
    assert (q.scale > 0).all()
    if case == "zero weights" and bits > 1:
        assert not q.dequantize().any()
    if case == "constant" and bits > 1:
        torch.testing.assert_close(q.dequantize(), weight, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 5}, r"allowed are \(1, 2, 3, 4\)"),
        ({"bits": 0}, r"allowed are \(1, 2, 3, 4\)"),
        ({"group_size": 96}, "groups of 96"),
        ({"method": "awq"}, "allowed are"),
        ({"splits": 7}, "7 matrices"),
    ],
)
def test_quantize_refuses(change, message):
    weight, hessian = correlated()
    arguments = {"bits": 2, "group_size": 128, **change}
    with pytest.raises(ValueError, match=message):
        quantizer.quantize(weight, hessian, **arguments)


def test_round_scale_covers_the_range_that_both_types_share():
    values = torch.logspace(-9, 6, 4001)
    exact = round_scale(values)
    assert torch.equal(exact, exact.half().float()) and torch.equal(exact, exact.bfloat16().float())
    assert (exact > 0).all() and exact.isfinite().all()
    inside = (values > 2**-14) & (values < packing.MAX_SCALE)
    torch.testing.assert_close(exact[inside], values[inside], rtol=2**-8, atol=0)


def test_half_zeros_lose_less_at_2_bits_and_nothing_elsewhere():
    weight, hessian = correlated(rows=64)
    losses = {}
    for zeros in ("integer", "half"):
        recipe = replace(BEST, zeros=zeros)
        q = [quantizer.quantize(weight, hessian, b, 64, recipe=recipe) for b in (2, 3, 4)]
        losses[zeros] = [float(each.error.sum()) for each in q]
    assert losses["half"][0] < 0.97 * losses["integer"][0]
    assert losses["half"][1:] == losses["integer"][1:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_gpu_quantizes_as_well_as_a_cpu(bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 96, 256, generator=generator)
    inputs = torch.randn(4, 300, 24, generator=generator)
    inputs = inputs @ torch.randn(4, 24, 256, generator=generator)  # correlated
    inputs += 0.3 * torch.randn(4, 300, 256, generator=generator)
    hessian = inputs.transpose(1, 2) @ inputs
    on_cpu = quantizer.quantize(weight, hessian, bits, 64)
    on_gpu = quantizer.quantize(weight.cuda(), hessian.cuda(), bits, 64)
    # A tie that falls otherwise moves all that follows in its row, to an equally good end.
    assert float(on_gpu.error.sum()) == pytest.approx(float(on_cpu.error.sum()), rel=0.02)
