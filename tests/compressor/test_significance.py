"""Factors against their definition, and experts that calibration hardly reaches."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from mcmoe_vllm.compress.significance import Probe, measure_layer
from mcmoe_vllm.model.experts import Expert, Routing, experts_output, gated
from mcmoe_vllm.plan import same_group_size
from mcmoe_vllm.quantize import quantizer
from mcmoe_vllm.quantize.hessians import (
    MIN_TOKENS,
    ROWS,
    calibration_rows,
    calibration_weights,
    expert_chunks,
    gram,
    inner_hessians,
    input_hessians,
    shared_gram,
)
from mcmoe_vllm.quantize.refine import answer_inputs
from mcmoe_vllm.recipes import BEST, PAPER

HIDDEN, WIDTH, EXPERTS, TOKENS = 64, 32, 4, 600
GROUPS = same_group_size(32)
SWIGLU = gated(silu)


@pytest.fixture
def layer():
    """Weights of 4 experts and a routing in which expert 3 is never chosen and 2 hardly."""
    generator = torch.Generator().manual_seed(0)
    experts = [
        (
            torch.randn(2 * WIDTH, HIDDEN, generator=generator) / 8,
            torch.randn(HIDDEN, WIDTH, generator=generator) / 6,
        )
        for _ in range(EXPERTS)
    ]
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids = torch.tensor([[0, 1]]).repeat(TOKENS, 1)
    ids[:5] = torch.tensor([2, 0])
    weights = torch.rand(TOKENS, 2, generator=generator)
    return experts, Routing(hidden, ids, weights)


ALONE = replace(BEST, shared_tokens=0)  # no expert is calibrated on what others are given
PMQ = replace(ALONE, allocation="pmq")
MEASURED = replace(ALONE, refinements=BEST.error_refinements)


def expert_hessians(routing, experts, w13, activation, weighting="equal", shared_tokens=0):
    """Of both projections, with what an exact w13 gives w2."""
    shared = shared_gram(routing, shared_tokens, w13.device)
    first = input_hessians(routing, experts, weighting, shared)
    return first, inner_hessians(routing, experts, w13, w13, activation, weighting)[0]


def reader(experts):
    return lambda expert: Expert(*experts[expert])


def measure(layer, candidates=(1, 2, 3), recipe=PMQ, **more):
    experts, routing = layer
    return measure_layer(
        7, routing, reader(experts), EXPERTS, candidates, GROUPS, SWIGLU, recipe, Probe(**more)
    )[:2]


def block_output(experts, routing):
    """The MoE block by its definition, token by token."""
    output = torch.zeros_like(routing.hidden)
    for token in range(routing.hidden.shape[0]):
        for expert, weight in zip(routing.ids[token], routing.weights[token], strict=True):
            w13, w2 = experts[int(expert)]
            gate, up = (w13 @ routing.hidden[token]).chunk(2)
            output[token] += weight * (w2 @ (silu(gate) * up))
    return output


def test_refining_candidates_lessens_what_w2_costs(layer):
    """Widths are chosen by what they cost in the end. Of w2, whose inputs are the same before."""
    plain, refined = (
        torch.tensor(
            measure(layer, recipe=replace(ALONE, error_refinements=rounds))[0].projection_errors
        )
        for rounds in (0, 1)
    )
    assert BEST.error_refinements == 1
    assert bool((refined[..., 1] <= plain[..., 1]).all())
    assert bool((refined[:3, 0, 1] < plain[:3, 0, 1]).all())  # at 1 bit; no token reaches expert 3


def test_output_and_counts_follow_the_definition(layer):
    measured, output = measure(layer)
    experts, routing = layer
    torch.testing.assert_close(output, block_output(experts, routing), rtol=1e-4, atol=1e-5)
    assert measured.tokens == [600, 595, 5, 0]
    assert measured.frequency == [1.0, 595 / 600, 5 / 600, 0.0]
    by_hand = [float(routing.weights[routing.ids == e].sum()) / TOKENS for e in range(EXPERTS)]
    assert measured.routing_weight == pytest.approx(by_hand, rel=1e-5)
    streamed = experts_output(routing, reader(experts), EXPERTS, SWIGLU)
    torch.testing.assert_close(streamed, output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_error_is_the_change_of_the_block_output(layer, method):
    measured, exact = measure(layer, (2,), replace(PMQ, error_method=method))
    experts, routing = layer
    for expert in (0, 2):
        h13, h2 = expert_hessians(
            routing, [expert], experts[expert][0].unsqueeze(0), SWIGLU, "routing"
        )
        how = {"method": method, "recipe": MEASURED}
        w13, w2 = (w.unsqueeze(0) for w in experts[expert])
        q13 = quantizer.quantize(w13, h13, 2, 32, splits=2, **how)
        q2 = quantizer.quantize(w2, h2, 2, 32, **how)
        changed = list(experts)
        changed[expert] = (q13.dequantize()[0], q2.dequantize()[0])
        error = float((block_output(changed, routing) - exact).norm())
        assert measured.reconstruction_error[expert][0] == pytest.approx(error, rel=1e-3)


def test_errors_fall_with_width_and_a_dropped_expert_costs_its_whole_output(layer):
    measured, _ = measure(layer, (0, 1, 2, 3, 4))
    for expert in (0, 1, 2):
        errors = measured.reconstruction_error[expert]
        assert errors == sorted(errors, reverse=True) and errors[-1] > 0
    assert measured.reconstruction_error[3] == [0.0] * 5  # never chosen: nothing to lose


def test_starved_experts_are_reported_and_calibrated_on_other_tokens(layer):
    measured, _ = measure(layer)
    experts, routing = layer
    assert measured.starved == [2, 3]
    rows = calibration_rows(routing, 2)
    assert rows[:5].tolist() == [0, 1, 2, 3, 4] and len(rows) == MIN_TOKENS
    rows = calibration_rows(routing, 3)
    assert len(set(rows.tolist())) == MIN_TOKENS and rows.max() > 590
    hessian, inner = expert_hessians(routing, [3], experts[3][0].unsqueeze(0), SWIGLU)
    assert (hessian.diagonal(dim1=1, dim2=2) > 0).all() and inner.isfinite().all()
    assert torch.equal(calibration_rows(routing, 0), torch.arange(TOKENS))


def test_fewer_tokens_than_the_minimum_still_calibrate():
    routing = Routing(torch.randn(10, 8), torch.zeros(10, 1, dtype=torch.long), torch.ones(10, 1))
    assert len(calibration_rows(routing, 0)) == 10
    assert len(calibration_rows(routing, 5)) == 10


def test_chunks_cover_all_experts_and_keep_to_the_memory():
    chunks = expert_chunks(128, 2048, 768)
    assert [e for chunk in chunks for e in chunk] == list(range(128))
    assert len(chunks) > 1
    assert expert_chunks(8, 4096, 14336) == [range(i, i + 1) for i in range(8)]
    assert expert_chunks(0, 128, 128) == []


def test_gram_is_a_sum_over_rows():
    rows = torch.randn(ROWS + 3, 8)
    expected = rows.double().t() @ rows.double()
    torch.testing.assert_close(gram(rows).double(), expected, rtol=1e-4, atol=1e-2)


def test_the_papers_traits_of_significance(layer):
    """Summed norms of windows, rounding over the whole range, shares of the whole softmax."""
    experts, routing = layer
    scores = torch.rand(TOKENS, 2)
    measured, exact = measure(layer, (2,), PAPER, scores=scores, window=100)
    by_hand = [float(scores[routing.ids == e].sum()) / TOKENS for e in range(EXPERTS)]
    assert measured.routing_weight == pytest.approx(by_hand, rel=1e-5)
    hessians = expert_hessians(routing, [0], experts[0][0].unsqueeze(0), SWIGLU)
    changed = list(experts)
    changed[0] = tuple(
        quantizer.quantize(w.unsqueeze(0), h, 2, 32, method="minmax", recipe=PAPER).dequantize()[0]
        for w, h in zip(experts[0], hessians, strict=True)
    )
    difference = block_output(changed, routing) - exact
    summed = float(difference.unflatten(0, (6, 100)).flatten(1).norm(dim=1).sum())
    assert measured.reconstruction_error[0][0] == pytest.approx(summed, rel=1e-3)


def test_trace_error_by_hand(layer):
    measured, _ = measure(layer, (2,), replace(PMQ, error_method="rtn"))
    experts, routing = layer
    hessians = expert_hessians(routing, [0], experts[0][0].unsqueeze(0), SWIGLU, "routing")
    expected = 0.0
    for w, h in zip(experts[0], hessians, strict=True):
        q = quantizer.quantize(w.unsqueeze(0), h, 2, 32, method="rtn", splits=1)
        change = w - q.dequantize()[0]
        expected += float(h[0].trace() / len(h[0]) * change.square().sum())
    assert measured.trace_error[0][0] == pytest.approx(expected, rel=1e-4)


def test_projections_are_measured_alone_and_the_probe_is_their_sum(layer):
    experts, routing = layer
    measured, exact, change = measure_layer(
        7, routing, reader(experts), EXPERTS, (1, 2), GROUPS, SWIGLU, ALONE, Probe(candidate=1)
    )
    h13, h2 = expert_hessians(routing, [0], experts[0][0].unsqueeze(0), SWIGLU, "routing")
    q13 = quantizer.quantize(
        experts[0][0].unsqueeze(0), h13, 2, 32, splits=2, recipe=MEASURED
    ).dequantize()[0]
    q2 = quantizer.quantize(experts[0][1].unsqueeze(0), h2, 2, 32, recipe=MEASURED).dequantize()[0]
    alone = []
    for pair in ((q13, experts[0][1]), (experts[0][0], q2)):
        alone.append(block_output([pair, *experts[1:]], routing) - exact)
    norms = [float(difference.norm()) for difference in alone]
    assert measured.projection_errors[0][1] == pytest.approx(norms, rel=1e-3)
    rows = (routing.ids == 0).any(1) & ~(routing.ids == 1).any(1)  # no other expert's change
    others = routing.ids[rows]
    assert set(others.flatten().tolist()) == {0, 2}
    third = measure_layer(
        7, Routing(routing.hidden[rows], others, routing.weights[rows]), reader(experts),
        EXPERTS, (1, 2), GROUPS, SWIGLU, BEST,
    )[2]  # fmt: skip
    assert not third.any() and change.any()
    total = sum(float(torch.tensor(e[1]).square().sum()) for e in measured.projection_errors)
    # Changes of different experts and projections hardly correlate: their squares add.
    assert float(change.square().sum()) == pytest.approx(total, rel=0.2)


def test_errors_can_be_of_the_first_tokens_alone(layer):
    experts, routing = layer
    first = Routing(routing.hidden[:200], routing.ids[:200], routing.weights[:200])
    recipe = replace(BEST, error_method="minmax")  # needs no Hessian, which all tokens make
    arguments = (reader(experts), EXPERTS, (2,), GROUPS, SWIGLU, recipe)
    alone = measure_layer(7, first, *arguments, Probe(candidate=0))
    among = measure_layer(7, routing, *arguments, Probe(candidate=0, tokens=200))
    for a, b in zip(alone[0].projection_errors, among[0].projection_errors, strict=True):
        assert a[0] == pytest.approx(b[0], rel=1e-4)
    torch.testing.assert_close(among[2][:200], alone[2], rtol=1e-4, atol=1e-5)
    assert not among[2][200:].any() and among[0].tokens == [600, 595, 5, 0]


def test_hessians_weighted_by_routing_are_those_of_the_weighted_inputs(layer):
    experts, routing = layer
    rows, weights = routing.tokens_of(1)
    x = routing.hidden[rows] * weights.unsqueeze(1)
    h13, h2 = expert_hessians(routing, [1], experts[1][0].unsqueeze(0), SWIGLU, "routing")
    torch.testing.assert_close(h13[0], x.t() @ x, rtol=1e-4, atol=1e-3)
    gate, up = (routing.hidden[rows] @ experts[1][0].t()).chunk(2, dim=1)
    inner = silu(gate) * up * weights.unsqueeze(1)
    torch.testing.assert_close(h2[0], inner.t() @ inner, rtol=1e-4, atol=1e-3)


def test_w2_answers_for_what_w13_lost(layer):
    """Fitted to what the quantized w13 gives it, the expert's output comes nearer; with an exact
    w13 nothing changes."""
    experts, routing = layer
    w13, w2 = (w.unsqueeze(0) for w in experts[0])
    how = (SWIGLU, "routing")
    shared = shared_gram(routing, 0, w13.device)
    hessian13 = input_hessians(routing, [0], "routing", shared)
    q13 = quantizer.quantize(w13, hessian13, 2, 32, splits=2).dequantize()
    same, cross = inner_hessians(routing, [0], w13, w13, *how)
    assert cross is same
    untouched = answer_inputs(w2, same, cross)
    torch.testing.assert_close(untouched, w2, rtol=1e-4, atol=1e-5)
    hessian, cross = inner_hessians(routing, [0], q13, w13, *how)
    answering = answer_inputs(w2, hessian, cross)
    exact = block_output(experts, routing)
    lost = [
        float((block_output([(q13[0], w[0]), *experts[1:]], routing) - exact).square().sum())
        for w in (w2, answering)
    ]
    assert lost[1] < 0.95 * lost[0]


def test_products_with_what_the_16_bit_model_is_given(layer):
    """Weighted, completed and shared as the Hessians are; with the same states they are these."""
    experts, routing = layer
    w13 = experts[0][0].unsqueeze(0)
    exact = routing.hidden + 0.1 * torch.randn_like(routing.hidden)
    shared = [shared_gram(routing, 50, w13.device, e) for e in (None, exact)]
    first = input_hessians(routing, [0], "routing", shared[1], exact)
    rows, weights = routing.tokens_of(0)
    x, y = (h[rows] * weights.unsqueeze(1) for h in (routing.hidden, exact))
    mean = exact.t() @ routing.hidden * (50 / len(exact)) * weights.square().mean()
    torch.testing.assert_close(first[0], y.t() @ x + mean, rtol=1e-4, atol=1e-3)
    _, cross = inner_hessians(routing, [0], w13, w13, SWIGLU, "routing", exact)
    z, y = (
        silu(gate) * up * weights.unsqueeze(1)
        for gate, up in ((h[rows] @ w13[0].t()).chunk(2, dim=1) for h in (routing.hidden, exact))
    )
    torch.testing.assert_close(cross[0], y.t() @ z, rtol=1e-4, atol=1e-3)
    same = routing.hidden
    for tensor, others in zip(
        (
            input_hessians(routing, [0], "routing", shared[0], same),
            *inner_hessians(routing, [0], w13, w13, SWIGLU, "routing", same),
        ),
        (
            input_hessians(routing, [0], "routing", shared[0]),
            *inner_hessians(routing, [0], w13, w13, SWIGLU, "routing"),
        ),
        strict=True,
    ):
        torch.testing.assert_close(tensor, others)


def test_few_tokens_are_outvoted_by_what_all_experts_see(layer):
    """An expert's Hessian is its own plus so many tokens' worth of the mean, at the mean of its
    squared weights; none of it without sharing."""
    experts, routing = layer
    w13 = experts[2][0].unsqueeze(0)
    alone, _ = expert_hessians(routing, [2], w13, SWIGLU, "routing")
    shared, _ = expert_hessians(routing, [2], w13, SWIGLU, "routing", shared_tokens=300)
    _, scale = calibration_weights(routing, 2, "routing")
    mean = routing.hidden.t() @ routing.hidden / TOKENS
    expected = alone[0] + 300 * scale.square().mean() * mean
    torch.testing.assert_close(shared[0], expected, rtol=1e-4, atol=1e-3)


def test_sharing_wins_where_an_expert_sees_few_tokens():
    """Fewer tokens than columns: the error on new tokens falls."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator)
    hidden = torch.randn(4000, 64, generator=generator) @ mix
    ids = torch.zeros(4000, 1, dtype=torch.long)
    ids[:40] = 1
    routing = Routing(hidden, ids, torch.ones(4000, 1))
    weight = torch.randn(1, 64, 64, generator=generator)
    fresh = torch.randn(2000, 64, generator=generator) @ mix
    errors = []
    for tokens in (0, 300):
        shared = shared_gram(routing, tokens, weight.device)
        own = gram(hidden[:40]).unsqueeze(0)
        q = quantizer.quantize(weight, own + shared, 2, 32).dequantize()
        errors.append(float((fresh @ (q[0] - weight[0]).t()).square().sum()))
    assert errors[1] < 0.9 * errors[0]
