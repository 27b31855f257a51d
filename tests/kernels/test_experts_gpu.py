"""The Triton kernels of whole layers against float64 and against plain bfloat16."""

import pytest
import torch

pytest.importorskip("triton")

from mcmoe_kernels.activations import Activation
from mcmoe_kernels.formats.packing import pack, pack_scale, unpack_scale
from mcmoe_kernels.gpu import warpgroup
from mcmoe_kernels.gpu.choice import (
    DecodeConfig,
    LayerShape,
    PrefillConfig,
    SingleConfig,
    WarpConfig,
    WarpgroupConfig,
    fit,
)
from mcmoe_kernels.gpu.common import is_ragged
from mcmoe_kernels.gpu.experts import fused_experts, warm_up, why_not_gpu
from mcmoe_kernels.gpu.pruning import prune_ids
from mcmoe_kernels.gpu.tiled import tile_layer
from mcmoe_kernels.layer import fused_experts_torch
from mcmoe_kernels.pruning import pair_counts
from tests.helpers.expert_layers import (
    experts_float64,
    experts_rounded,
    random_input,
    random_layer,
    random_routing,
    relative_error,
    to_device,
)

# An odd number, one dropped. All four widths in each matrix, as in most layers here: a kernel is
# compiled for a set of widths, and few kernels make a test on a GPU short.
MIXED13, MIXED2 = (1, 2, 3, 4, 0, 2, 3), (2, 3, 1, 2, 0, 4, 1)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
# Every step of a program takes the interpreter about as long for 64 threads as for 512: few large
# programs make a test without a GPU short.
CONFIGS = {
    "decode": DecodeConfig(4, 64, 64, 2, 2, 3, 3, 2),
    "warp": WarpConfig(4, 256, 128, 16, 8, 1, 2, 2),
    "prefill": PrefillConfig(16, 64, 64, 4, 2, 3),
    "warpgroup": WarpgroupConfig(16, 64, 64, 4, 4, 32, 64, 3),
    "decode, wide": DecodeConfig(8, 128, 128, 4, 4, 2, 2, 1, 128, 128),
    "warp, shared": WarpConfig(4, 256, 128, 16, 16, 1, 1, 1, 64, 64, 2, 4),
    "prefill, wide": PrefillConfig(64, 128, 128, 8, 2, 2, 128, 16),
    "warpgroup, wide": WarpgroupConfig(64, 128, 128, 8, 6, 64, 32, 2),
}
EACH = [
    pytest.param(
        config,
        id=name,
        marks=pytest.mark.skipif(
            isinstance(config, WarpgroupConfig) and not HOPPER,
            reason="needs a GPU of compute capability 9.0",
        ),
    )
    for name, config in CONFIGS.items()
]
PLAIN = EACH[:4]
# One token. All warps at work; warps at rest, and rows begun amid a record of 64; columns shared by
# warps, of which the last have fewer.
SINGLE = {
    "single": SingleConfig(4, 128, 128, 8, 8, 1, 2, 2),
    "single, resting": SingleConfig(4, 96, 64, 8, 4, 1, 1, 1),
    "single, shared": SingleConfig(4, 64, 128, 16, 32, 1, 1, 1, 64, 64, 4, 4),
}
# For tests of what does not depend on the shape: one step of a program less without a GPU, and on
# one the shape of the others, whose kernels are compiled.
HIDDEN = 256 if torch.cuda.is_available() else 128
# The interpreter rounds float32 to bfloat16 by cutting off, and multiplies no bfloat16.
DTYPES = {"cpu": [torch.float16], "cuda": [torch.float16, torch.bfloat16]}


def run(x, layer, weights, ids, config, device):
    """On the device, behind memory that holds NaN: what was not written shows."""
    poison = [torch.full((1 << 16,), float("nan"), device=device) for _ in range(4)]
    del poison
    out = fused_experts(x.to(device), layer, weights.to(device), ids.to(device), config)
    return out.cpu()


def check(layer, tokens, top_k, config, device, ids=None, seed=0):
    tiled = tile_layer(to_device(layer, device))
    weights, routed = random_routing(tokens, layer.num_experts, top_k, seed)
    ids = routed if ids is None else ids
    for dtype in DTYPES[device]:
        x = random_input(tokens, layer.hidden_size, dtype, seed)
        reference = experts_float64(x, layer, weights, ids)
        granted = relative_error(experts_rounded(x, layer, weights, ids), reference)
        out = run(x, tiled, weights, ids, config, device)
        assert out.dtype == dtype
        assert relative_error(out, reference) <= 1.1 * granted, dtype


@pytest.mark.sampled(4)
@pytest.mark.parametrize("config", EACH)
@pytest.mark.parametrize(
    ("tokens", "top_k"),
    [(1, 2), (3, 7), (9, 1), (17, 3)],
)
def test_no_kernel_errs_more_than_plain_torch(config, tokens, top_k, device):
    check(random_layer(MIXED13, MIXED2), tokens, top_k, config, device)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("config", PLAIN)
@pytest.mark.parametrize(
    ("hidden", "intermediate", "group_size"),
    [
        (128, 128, 128),  # half a step
        (384, 192, 64),  # an odd number of tiles, half a tile
        (192, 96, 32),
    ],
)
def test_shapes_that_fill_no_step(config, hidden, intermediate, group_size, device):
    layer = random_layer((1, 2, 3, 4), (4, 1, 2, 3), hidden, intermediate, group_size)
    check(layer, 6, 2, fit(config, LayerShape(4, 2, hidden, intermediate)), device)


@pytest.mark.parametrize(
    ("columns", "splits", "parts", "ahead", "ragged"),
    [
        (1024, 2, 2, 1, False),
        (896, 2, 2, 1, True),  # half a step
        (512, 2, 2, 1, True),  # one step for two warps, in each of two programs
        (1536, 1, 2, 2, True),  # three steps, two at a time
        (768, 1, 2, 2, True),  # two steps and one
    ],
)
def test_where_warps_share_a_row_unevenly(columns, splits, parts, ahead, ragged):
    assert is_ragged(columns, splits, parts, ahead) == ragged


def set_scale(matrices, rows, value, zero=None):
    """Of the first expert; its zeros stay if none is given."""
    words, bits = matrices.scale[0][rows], matrices.bits[0]
    scale, zeros = unpack_scale(words, bits)
    zeros = zeros if zero is None else torch.full_like(zeros, zero)
    words.copy_(pack_scale(torch.full_like(scale, value), zeros, bits))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("config", PLAIN)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_integers_come_out_exact(bits, config, device):
    """One-hot tokens, a gate of 32 (whose silu is 32 in float32) and integer weights: every
    number on the way is an integer that all the formats hold, so one wrong bit shows."""
    layer = random_layer((bits, 1, 2, 3, 4))  # all pairs go to the first
    unit = 2 if bits == 1 else 1  # 1 bit: the zero is 0.5
    set_scale(layer.w13, slice(None), unit)
    set_scale(layer.w2, slice(None), unit * 2.0**-6)  # so that float16 holds the sums
    layer.w13.packed[0][:128] = pack(torch.ones(128, 256, dtype=torch.uint8), bits)
    set_scale(layer.w13, slice(128), 16.0, zero=0.0)
    x = torch.zeros(16, 256, dtype=torch.float16)
    x[torch.arange(16), torch.randperm(256)[:16]] = 2.0
    ids, weights = torch.zeros(16, 1, dtype=torch.int32), torch.ones(16, 1)
    out = run(x, tile_layer(to_device(layer, device)), weights, ids, config, device)
    assert torch.equal(out, fused_experts_torch(x, layer, weights, ids))
    assert len(out.unique()) > 20


@pytest.mark.sampled(2)
@pytest.mark.parametrize("config", SINGLE.values(), ids=SINGLE)
@pytest.mark.parametrize(("hidden", "intermediate", "group_size"), [(384, 320, 64), (192, 96, 32)])
def test_one_token(config, hidden, intermediate, group_size, device):
    layer = random_layer((1, 2, 3, 4), (4, 1, 2, 3), hidden, intermediate, group_size)
    check(layer, 1, 2, fit(config, LayerShape(4, 2, hidden, intermediate)), device)


@pytest.mark.sampled(0)
def test_one_token_of_more_experts_than_threads(device):
    """Every thread holds the entries of several experts."""
    layer = random_layer((1, 2, 0, 3, 4) * 15, (2, 1, 0, 4, 3) * 15, 128, 64, 64)
    tiled = tile_layer(to_device(layer, device))
    config = fit(SingleConfig(4, 32, 64, 2, 2), LayerShape(75, 8, 128, 64))
    x, (weights, _) = random_input(1, 128, torch.float16), random_routing(1, 75, 8)
    ids = torch.tensor([[63, 64, 0, 74, 2, 72, -1, 33]], dtype=torch.int32)  # 2, 72: dropped
    out = run(x, tiled, weights, ids, config, device)
    assert relative_error(out, experts_float64(x, layer, weights, ids)) < 1e-3


@pytest.mark.sampled(0)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("hidden", "intermediate", "group_size"), [(256, 256, 128), (192, 96, 32)])
def test_one_token_alone_gives_the_same_bits(hidden, intermediate, group_size, dtype, device):
    """Its kernels make all digits and the sum themselves, in the order of the others."""
    layer = random_layer((1, 2, 3, 4), (4, 1, 2, 3), hidden, intermediate, group_size)
    tiled = tile_layer(to_device(layer, device))
    shape = LayerShape(4, 3, hidden, intermediate)
    together, alone = (fit(c, shape) for c in (CONFIGS["warp"], SINGLE["single"]))
    x, (weights, ids) = random_input(2, hidden, dtype), random_routing(2, 4, 3)
    ids[1, 1], x[0] = -1, x[0] * torch.logspace(-3, 0, hidden)
    expected = run(x, tiled, weights, ids, together, device)
    for row in (slice(0, 1), slice(1, 2)):
        out = run(x[row], tiled, weights[row], ids[row], alone, device)
        assert torch.equal(out, expected[row])


@pytest.mark.parametrize("config", PLAIN)
def test_skipped_pairs_and_padding_rows(config, device):
    layer = random_layer(MIXED13, MIXED2)
    x, (weights, ids) = random_input(8, 256, torch.float16), random_routing(8, 7, 2)
    ids[0], x[0], weights[0] = -1, float("nan"), float("nan")  # padding, whatever it holds
    ids[1, 0], weights[1, 0] = -1, float("nan")  # pruned
    ids[2] = 4  # dropped alone
    ids[3] = 5  # twice the same
    out = run(x, tile_layer(to_device(layer, device)), weights, ids, config, device)
    assert torch.equal(out[[0, 2]], torch.zeros(2, 256, dtype=x.dtype))
    reference = experts_float64(x.nan_to_num(), layer, weights.nan_to_num(), ids)
    assert relative_error(out, reference) < 1e-3


ONE_TOKEN = [pytest.param(config, 1, id=f"{name}-1") for name, config in SINGLE.items()]


def with_tokens(configs, *numbers):
    """Each configuration with each number of tokens."""
    return [
        pytest.param(*p.values, n, id=f"{p.id}-{n}", marks=p.marks)
        for p in configs
        for n in numbers
    ]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("config", "tokens"), [*with_tokens(PLAIN, 1, 4), ONE_TOKEN[0]])
def test_pruning_is_skipping_the_pairs(config, tokens, device):
    """The same bits as with ids that were pruned before; padding among them."""
    layer = random_layer(MIXED13, MIXED2, HIDDEN)
    tiled = tile_layer(to_device(layer, device))
    x = random_input(tokens, HIDDEN, torch.float16).to(device)
    weights, ids = (t.to(device) for t in random_routing(tokens, 7, 3))
    ids[-1], weights[-1] = torch.tensor([-1, 0, 3]), torch.tensor([9.0, 0.5, 0.25])
    pruned = prune_ids(weights, ids, 0.7)
    assert bool((pruned != ids).any())
    expected = fused_experts(x, tiled, weights, pruned, config)
    counts = torch.ones(2, dtype=torch.int64, device=device)
    assert torch.equal(fused_experts(x, tiled, weights, ids, config, 0.7, counts), expected)
    assert torch.equal(counts, 1 + pair_counts(ids, pruned))
    without = fused_experts(x, tiled, weights, ids, config, 0.0, counts)
    assert counts[1] == 1 + (pruned != ids).sum() and counts[0] == 1 + 2 * (ids >= 0).sum()
    assert torch.equal(without, fused_experts(x, tiled, weights, ids, config))
    assert not torch.equal(without, expected)


@pytest.mark.parametrize(("config", "tokens"), [*with_tokens(PLAIN, 0, 1, 5), ONE_TOKEN[0]])
def test_nothing_to_compute_gives_zeros(config, tokens, device):
    tiled = tile_layer(to_device(random_layer(MIXED13, MIXED2), device))
    ids = torch.full((tokens, 2), -1, dtype=torch.int32)
    out = run(random_input(tokens, 256), tiled, torch.rand(tokens, 2), ids, config, device)
    assert torch.equal(out, torch.zeros(tokens, 256, dtype=torch.bfloat16))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("config", PLAIN)
@pytest.mark.parametrize("routing", ["one expert", "skewed"])
def test_uneven_routing(config, routing, device):
    ids = torch.full((19, 2), 3, dtype=torch.int32)
    if routing == "skewed":
        ids[:, 1] = (torch.arange(19) % 9 == 0).int()
    check(random_layer(MIXED13, MIXED2, HIDDEN), 19, 2, config, device, ids)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("config", PLAIN)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_other_activations(config, activation, device):
    layer = random_layer(MIXED13, MIXED2, HIDDEN, activation=Activation(activation))
    x, (weights, ids) = random_input(5, HIDDEN, torch.float16), random_routing(5, 7, 2)
    out = run(x, tile_layer(to_device(layer, device)), weights, ids, config, device)
    assert relative_error(out, experts_float64(x, layer, weights, ids)) < 1e-3


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("config", "tokens"), [*with_tokens(PLAIN, 3), ONE_TOKEN[0]])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_not_hidden(value, config, tokens, device):
    layer = random_layer(MIXED13, MIXED2, HIDDEN)
    x, (weights, ids) = random_input(tokens, HIDDEN, torch.float16), random_routing(tokens, 4, 2)
    spoiled = torch.arange(tokens) == tokens // 2
    x[spoiled, 5] = value
    out = run(x, tile_layer(to_device(layer, device)), weights, ids, config, device)
    assert bool(out[~spoiled].isfinite().all()) and not bool(out[spoiled].isfinite().all())


@pytest.mark.parametrize("kernel", ["gate_up_warpgroup_kernel", "down_warpgroup_kernel"])
def test_launches_without_a_gpu_give_every_argument(kernel, monkeypatch, device):
    """Gluon has no interpreter: what can be checked anywhere is the call."""
    names = getattr(warpgroup, kernel).arg_names
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: calls.append((self.name, grid, args, kwargs))

    for name in ("gate_up_warpgroup_kernel", "down_warpgroup_kernel"):
        monkeypatch.setattr(warpgroup, name, Recorder(name))
    tiled = tile_layer(to_device(random_layer((2, 3)), device))
    weights, ids = (t.to(device) for t in random_routing(5, 2, 2))
    fused_experts(random_input(5, 256).to(device), tiled, weights, ids, CONFIGS["warpgroup, wide"])
    ((grid, args, kwargs),) = (call[1:] for call in calls if call[0] == kernel)
    assert len(grid) == 3 and len(args) + len(kwargs.keys() & set(names)) == len(names)
    assert list(names[len(args) :]) == [n for n in names if n in kwargs]


def test_wrong_input_is_refused_all_at_once(device):
    tiled = tile_layer(to_device(random_layer((2, 3)), device))
    x = torch.zeros(3, 128, device=device)
    ids = torch.zeros(2, 2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError) as e:
        fused_experts(x, tiled, torch.zeros(2, 2, device=device), ids)
    for part in ("float32", "[3, 128]", "256", "[2, 2]"):
        assert part in str(e.value)
    rest = (tiled, torch.zeros(2, 2, device=device), ids)
    x = torch.zeros(2, 256, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="one token, x has 2") as e:
        fused_experts(x, *rest, SINGLE["single, resting"])  # 96 rows do not divide 2 * 128
    assert "96" in str(e.value) and "256" in str(e.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    @pytest.mark.parametrize("config", EACH)
    @pytest.mark.parametrize(
        ("seed", "tokens"), list(enumerate((1, 2, 3, 7, 8, 9, 17, 33, 64, 65, 130, 257)))
    )
    def test_many_shapes(self, seed, tokens, config):
        experts, top_k = ((11, 8), (5, 1), (7, 3))[seed % 3]
        generator = torch.Generator().manual_seed(seed)

        def widths():  # all four in each matrix: kernels are compiled for the set of them
            more = torch.randint(1, 5, (experts - 4,), generator=generator)
            everything = torch.cat([torch.tensor([1, 2, 3, 4]), more])
            return everything[torch.randperm(experts, generator=generator)].tolist()

        layer = random_layer(widths(), widths(), 512, 384, seed=seed)
        check(layer, tokens, top_k, config, "cuda", seed=seed)

    @pytest.mark.parametrize("config", SINGLE.values(), ids=SINGLE)
    @pytest.mark.parametrize(("experts", "top_k"), [(11, 8), (5, 1), (7, 3)])
    def test_one_token_of_larger_layers(self, experts, top_k, config):
        widths = [(1, 2, 3, 4)[e % 4] for e in range(experts)]
        layer = random_layer(widths, widths[::-1], 512, 1408)
        config = fit(config, LayerShape(experts, top_k, 512, 1408))
        for seed in range(4):
            check(layer, 1, top_k, config, "cuda", seed=seed)

    @pytest.mark.parametrize(
        ("config", "tokens"),
        [*with_tokens([*EACH, pytest.param(None, id="chosen")], 1, 40), *ONE_TOKEN],
    )
    def test_a_graph_follows_the_routing_and_repeats_itself(self, config, tokens):
        if config is not None:
            config = fit(config, LayerShape(7, 3, 256, 128))
        layer = random_layer(MIXED13, MIXED2)
        tiled = tile_layer(to_device(layer, "cuda"))
        x = random_input(tokens, 256).cuda()
        weights, ids = (t.cuda() for t in random_routing(tokens, 7, 3))
        generator = torch.Generator().manual_seed(0)
        fused_experts(x, tiled, weights, ids, config)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused_experts(x, tiled, weights, ids, config)
        for seed in range(3):
            new_weights, new_ids = random_routing(tokens, 7, 3, seed + 1)
            new_ids[torch.rand(new_ids.shape, generator=generator) < 0.2] = -1
            weights.copy_(new_weights), ids.copy_(new_ids)
            results = []
            for _ in range(20):
                out.fill_(float("nan"))
                graph.replay()
                results.append(out.clone())
            reference = experts_float64(x.cpu(), layer, new_weights, new_ids)
            error = (results[0].cpu().double() - reference).norm()
            assert error <= 0.01 * reference.norm()  # both are 0 if nothing is left of one token
            assert all(torch.equal(r, results[0]) for r in results)

    @pytest.mark.parametrize(
        ("config", "tokens"),
        [*with_tokens([*EACH, pytest.param(None, id="chosen")], 8, 40), *ONE_TOKEN],
    )
    def test_layers_that_follow_each_other_in_a_graph(self, config, tokens):
        # Launches of one begin while those of the one before run, and have the memory that it had.
        if config is not None:
            config = fit(config, LayerShape(7, 3, 256, 128))
        widths = ((MIXED13, MIXED2), (MIXED2[::-1], MIXED13[::-1]))
        layers = [tile_layer(to_device(random_layer(*w), "cuda")) for w in widths]
        x = random_input(tokens, 256).cuda()
        calls = []
        for seed in range(12):
            weights, ids = (t.cuda() for t in random_routing(tokens, 7, 3, seed))
            ids[seed % tokens :: 5] = -1
            calls.append((layers[seed % 2], weights, ids, config))
        alone = []
        for call in calls:
            alone.append(fused_experts(x, *call))
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            together = [fused_experts(x, *call) for call in calls]
        for _ in range(10):
            for out in together:
                out.fill_(float("nan"))
            graph.replay()
            assert all(torch.equal(t, a) for t, a in zip(together, alone, strict=True))

    def test_nothing_is_compiled_or_waited_for_once_warm(self, monkeypatch):
        tiled = tile_layer(to_device(random_layer(MIXED13, MIXED2), "cuda"))
        torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads a model
        try:
            warm_up(tiled, 3, torch.bfloat16)
        finally:
            torch.set_default_dtype(torch.float32)
        compiled = []
        from triton import knobs

        monkeypatch.setattr(
            knobs.runtime, "jit_post_compile_hook", lambda **of: compiled.append(of["fn"].name)
        )
        x, (weights, ids) = random_input(4096, 256).cuda(), random_routing(4096, 7, 3)
        weights, ids = weights.cuda(), ids.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for tokens in (1, 2, 3, 8, 16, 40, 64, 100, 200, 341, 342, 512, 1000, 2048, 4096):
                fused_experts(x[:tokens], tiled, weights[:tokens], ids[:tokens])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not compiled


def test_rocm_is_refused(monkeypatch):
    """Its devices are called "cuda" too."""
    monkeypatch.setattr(torch.version, "hip", "6.2")
    problems = why_not_gpu(torch.device("cuda"), torch.bfloat16)
    assert len(problems) == 1 and "ROCm 6.2" in problems[0]
