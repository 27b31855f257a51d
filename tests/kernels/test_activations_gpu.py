"""What the experts of newer families compute, in every schedule: clamped, scaled and shifted gates,
biases, and no gate at all."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from mcmoe_kernels.gpu.choice import LayerShape, WarpConfig, fit
from mcmoe_kernels.gpu.experts import fused_experts, warm_up
from mcmoe_kernels.gpu.pruning import prune_ids
from mcmoe_kernels.gpu.tiled import tile_layer
from tests.helpers.expert_layers import (
    DEEPSEEK_V4,
    GPT_OSS,
    RELU2,
    STEP,
    experts_float64,
    experts_rounded,
    random_input,
    random_layer,
    random_routing,
    relative_error,
    to_device,
)
from tests.kernels.test_experts_gpu import (
    CONFIGS,
    DTYPES,
    EACH,
    MIXED2,
    MIXED13,
    PLAIN,
    SINGLE,
    run,
    with_tokens,
)

# Activation, biases, hidden size, intermediate size, group size: odd numbers of groups of 64.
FAMILIES = {
    "GPT-OSS": (GPT_OSS, True, 192, 64, 64),
    "DeepSeek-V4": (DEEPSEEK_V4, False, 192, 64, 64),
    "Step-3.5": (STEP, False, 192, 64, 64),
    "relu2": (RELU2, True, 128, 64, 32),
}
LARGER = {
    "GPT-OSS, larger": (GPT_OSS, True, 320, 192, 64),
    "relu2, larger": (RELU2, False, 320, 192, 64),
}
# Of eight experts one is elsewhere, and one was dropped: 6.
EXPERT_MAP = torch.tensor([5, 0, -1, 1, 2, 3, 4, 6], dtype=torch.int32)
ONE = [pytest.param(config, 1, id=f"{name}-1") for name, config in SINGLE.items()]
# As many rows a warp as there are, whose results take two scales where there is no gate.
TALL = WarpConfig(4, 256, 64, 4, 4, 1, 1)


def layer_of(family):
    activation, biases, *sizes = (FAMILIES | LARGER)[family]
    layer = random_layer(MIXED13, MIXED2, *sizes, activation=activation, biases=biases)
    return replace(layer, expert_map=EXPERT_MAP)


def fitted(config, layer):
    sizes = layer.hidden_size, layer.intermediate_size
    return fit(config, LayerShape(len(EXPERT_MAP), 3, *sizes, layer.activation.rows))


def routes(tokens):
    """Three experts a token; a repeated one, the dropped one, and padding and pruned ones."""
    weights, ids = random_routing(tokens, len(EXPERT_MAP), 3)
    ids[tokens // 2] = torch.tensor([7, 6, 7])
    if tokens > 1:
        ids[0], weights[0] = -1, float("nan")
        ids[-1, 0], weights[-1, 0] = -1, float("nan")
    return weights, ids


def check(family, config, tokens, device):
    layer = layer_of(family)
    tiled, (weights, ids) = tile_layer(to_device(layer, device)), routes(tokens)
    limited = layer.activation.limit is not None
    for dtype in DTYPES[device]:
        x = random_input(tokens, layer.hidden_size, dtype) * (8 if limited else 2)
        rest = layer, weights.nan_to_num(), ids
        reference = experts_float64(x, *rest)
        granted = relative_error(experts_rounded(x, *rest), reference)
        out = run(x, tiled, weights, ids, fitted(config, layer), device)
        assert relative_error(out, reference) <= 1.1 * granted, dtype
        assert tokens == 1 or torch.equal(out[0], torch.zeros_like(out[0]))
        if limited:  # limits that never bite would prove nothing
            without = replace(layer, activation=replace(layer.activation, limit=None))
            assert relative_error(experts_float64(x, without, *rest[1:]), reference) > 0.1


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("config", "tokens"), [*with_tokens(EACH, 3), *ONE])
def test_every_schedule(config, tokens, family, device):
    check(family, config, tokens, device)


@pytest.mark.sampled(0)
@pytest.mark.parametrize("family", LARGER)
@pytest.mark.parametrize(("config", "tokens"), [*with_tokens(PLAIN, 1, 37), ONE[2]])
def test_steps_that_are_not_full(config, tokens, family, device):
    check(family, config, tokens, device)


@pytest.mark.sampled(0)
@pytest.mark.parametrize("biases", [False, True])
def test_a_warp_whose_results_take_two_scales(biases, device):
    layer = random_layer((1, 2, 3, 4), (4, 1, 2, 3), 128, 256, 32, activation=RELU2, biases=biases)
    x, (weights, ids) = random_input(5, 128, torch.float16), random_routing(5, 4, 2)
    out = run(x, tile_layer(to_device(layer, device)), weights, ids, TALL, device)
    assert relative_error(out, experts_float64(x, layer, weights, ids)) < 1e-3


@pytest.mark.sampled(1)  # that in the middle, the shortest
@pytest.mark.parametrize("family", ["GPT-OSS", "relu2"])
@pytest.mark.parametrize(
    ("config", "tokens"), [*with_tokens(PLAIN[:2], 3), ONE[0], *with_tokens(PLAIN[2:], 3)]
)
def test_pruned_pairs_add_no_bias(config, tokens, family, device):
    """The same bits as with ids that were pruned before."""
    layer = layer_of(family)
    tiled, config = tile_layer(to_device(layer, device)), fitted(config, layer)
    x = random_input(tokens, layer.hidden_size, torch.float16).to(device)
    weights, ids = (t.to(device) for t in random_routing(tokens, len(EXPERT_MAP), 3))
    pruned = prune_ids(weights, ids, 0.9)
    assert bool((pruned != ids).any())
    expected = fused_experts(x, tiled, weights, pruned, config)
    assert torch.equal(fused_experts(x, tiled, weights, ids, config, 0.9), expected)
    assert not torch.equal(fused_experts(x, tiled, weights, ids, config), expected)


@pytest.mark.sampled(0)
@pytest.mark.parametrize("family", ["GPT-OSS", "Step-3.5", "relu2"])
@pytest.mark.parametrize(("config", "tokens"), [*with_tokens(PLAIN, 3), ONE[0]])
def test_nan_is_not_clamped(config, tokens, family, device):
    layer = layer_of(family)
    x, (weights, ids) = random_input(tokens, layer.hidden_size, torch.float16), routes(tokens)
    spoiled = torch.arange(tokens) == tokens // 2
    x[spoiled, 5] = float("nan")
    tiled = tile_layer(to_device(layer, device))
    out = run(x, tiled, weights, ids, fitted(config, layer), device)
    assert bool(out[~spoiled].isfinite().all() and out[spoiled].isnan().all())


@pytest.mark.sampled(0)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_alone_gives_the_same_bits(family, device):
    layer = layer_of(family)
    tiled = tile_layer(to_device(layer, device))
    together, alone = (fitted(c, layer) for c in (CONFIGS["warp"], SINGLE["single"]))
    x, (weights, ids) = random_input(3, layer.hidden_size, torch.float16), routes(3)
    expected = run(x, tiled, weights, ids, together, device)
    for row in (slice(i, i + 1) for i in range(3)):
        out = run(x[row], tiled, weights[row], ids[row], alone, device)
        assert torch.equal(out, expected[row])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    @pytest.mark.parametrize("family", ["GPT-OSS", "relu2"])
    def test_nothing_is_compiled_once_warm(self, family, monkeypatch):
        layer = layer_of(family)
        tiled, compiled = tile_layer(to_device(layer, "cuda")), []
        warm_up(tiled, 3, torch.bfloat16)
        from triton import knobs

        monkeypatch.setattr(
            knobs.runtime, "jit_post_compile_hook", lambda **of: compiled.append(of["fn"].name)
        )
        x, (weights, ids) = random_input(2048, layer.hidden_size).cuda(), routes(2048)
        weights, ids = weights.cuda(), ids.cuda()
        for tokens in (1, 2, 8, 40, 64, 200, 342, 2048):
            fused_experts(x[:tokens], tiled, weights[:tokens], ids[:tokens])
        assert not compiled

    @pytest.mark.parametrize(
        ("activation", "biases", "intermediate"), [(GPT_OSS, True, 2880), (RELU2, False, 1856)]
    )
    @pytest.mark.parametrize("tokens", [1, 2, 8, 40, 300])
    def test_shapes_of_real_models(self, tokens, activation, biases, intermediate):
        widths13, widths2 = (1, 2, 3, 4, 0, 2, 3, 3), (3, 3, 2, 1, 0, 2, 1, 4)
        sizes = (2880, intermediate, 64)
        layer = random_layer(widths13, widths2, *sizes, activation=activation, biases=biases)
        tiled = tile_layer(to_device(layer, "cuda"))
        x, (weights, ids) = random_input(tokens, 2880), random_routing(tokens, 8, 4)
        reference = experts_float64(x, layer, weights, ids)
        granted = relative_error(experts_rounded(x, layer, weights, ids), reference)
        out = run(x, tiled, weights, ids, None, "cuda")
        assert relative_error(out, reference) <= 1.1 * granted
