"""Loading and running one layer's experts through vLLM's method interface, without an engine."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from mcmoe_kernels.activations import Activation
from mcmoe_kernels.formats.packing import unpack_scale
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin import metrics
from mcmoe_vllm.pruning.table import PruningTable
from tests.helpers.expert_layers import (
    DEEPSEEK_V4,
    GPT_OSS,
    STEP,
    experts_float64,
    random_input,
    random_layer,
    random_routing,
    relative_error,
)

pytestmark = pytest.mark.vllm

BITS13, BITS2 = "12340213", "23140342"  # widths differ, expert 4 is dropped
HIDDEN, WIDTH, GROUP = 256, 128, 32
PREFIX = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def checkpoint():
    return random_layer(
        [int(b) for b in BITS13], [int(b) for b in BITS2], HIDDEN, WIDTH, group_size=GROUP
    )


def quantization_config(bits13=BITS13, bits2=BITS2, group=GROUP):
    return QuantizationConfig(
        group_size={"w13": group, "w2": group, "dense": group}, expert_bits={0: (bits13, bits2)}
    )


def make_method(
    moe_config, layer, config=None, width=WIDTH, tp=(1, 0), dtype=torch.bfloat16, **settings
):
    from vllm.config import VllmConfig, get_current_vllm_config_or_none

    from mcmoe_vllm.plugin.experts import McmoeExpertsMethod
    from mcmoe_vllm.plugin.launch import Launch

    moe = moe_config(8, tp_size=tp[0], tp_rank=tp[1], **settings)
    config = config or quantization_config()
    launch = Launch(config, get_current_vllm_config_or_none() or VllmConfig())
    launch.expect(PREFIX)
    method = McmoeExpertsMethod(config, launch, moe, PREFIX, 0)
    local = 8 if layer.held is None else len(layer.held)
    method.create_weights(layer, local, HIDDEN, width // tp[0], dtype)
    return method


def expert_tensors(checkpoint):
    """(parameter, tensor, shard, expert) of every tensor in the checkpoint."""
    for expert in range(8):
        if not checkpoint.present(expert):
            continue
        for kind in ("packed", "scale"):
            gate_up = getattr(checkpoint.w13, kind)[expert]
            down = getattr(checkpoint.w2, kind)[expert]
            yield f"w13_weight_{kind}", gate_up[:WIDTH], "w1", expert
            yield f"w13_weight_{kind}", gate_up[WIDTH:], "w3", expert
            yield f"w2_weight_{kind}", down, "w2", expert


def load(layer, tensors):
    for name, tensor, shard, expert in tensors:
        param = getattr(layer, name)
        param.weight_loader(
            param=param,
            loaded_weight=tensor,
            weight_name=f"{PREFIX}.{name}",
            shard_id=shard,
            expert_id=expert,
            return_success=True,
        )


@pytest.fixture
def lines(monkeypatch):
    """What a launch says."""
    from mcmoe_vllm.plugin import launch

    said = []
    monkeypatch.setattr(launch.logger, "info", lambda text, *args: said.append(text % args))
    return said


@pytest.fixture(autouse=True)
def forget_layers():
    yield
    gc.collect()


def test_a_deleted_engine_gives_its_layers_back(vllm_config, moe_config, fake_layer):
    """vLLM keeps a parameter's attributes until the layer is gone, which they must not prevent."""
    layer = fake_layer(8)
    make_method(moe_config, layer)
    loaders = [param.weight_loader for param in layer.parameters()]
    alive = weakref.ref(layer)
    del layer
    gc.collect()
    assert len(loaders) == 4 and alive() is None


@pytest.mark.parametrize("cache_gib", [0, 1])  # int4 codes, dequantized at load
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_loaded_layer_computes(checkpoint, vllm_config, moe_config, fake_layer, dtype, cache_gib):
    vllm_config.additional_config = {"cpu_weight_cache_gib": cache_gib}
    layer = fake_layer(8)
    method = make_method(moe_config, layer, dtype=dtype)
    load(layer, expert_tensors(checkpoint))
    method.process_weights_after_loading(layer)
    x, (weights, ids) = random_input(5, HIDDEN, dtype), random_routing(5, 8, 3)
    ids[1] = -1
    ids[2, 0] = -1
    out = method.apply(layer, x, topk_weights=weights, topk_ids=ids)
    limit = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-6}[dtype]
    assert relative_error(out, experts_float64(x, checkpoint, weights, ids)) < limit
    assert not out[1].any()
    assert ("dequantized" in method.prepared.path) == (cache_gib > 0 or dtype != torch.bfloat16)
    # What is kept dequantized is not kept packed as well.
    assert (layer.w13_weight_packed.numel() == 0) == (cache_gib > 0)


def test_the_flat_buffers_hold_no_more_than_the_widths(checkpoint, moe_config, fake_layer):
    layer = fake_layer(8)
    make_method(moe_config, layer)
    for name, bits, size in (("w13", BITS13, 2 * WIDTH * HIDDEN), ("w2", BITS2, HIDDEN * WIDTH)):
        packed = getattr(layer, f"{name}_weight_packed")
        assert packed.dtype == torch.uint8 and packed.dim() == 1
        assert packed.numel() == sum(map(int, bits)) * size // 8
        assert getattr(layer, f"{name}_weight_scale").shape[0] == 7  # none for the dropped one


def paired_tensors(checkpoint):
    """The same in the names and the order of rows of vLLM's class for GPT-OSS."""
    for expert in filter(checkpoint.present, range(8)):
        for kind in ("packed", "scale"):
            gate_up = getattr(checkpoint.w13, kind)[expert]
            pairs = torch.stack(gate_up.chunk(2), 1).flatten(0, 1)
            yield f"w13_weight_{kind}", pairs, "gpt_oss_w13", expert
            yield f"w2_weight_{kind}", getattr(checkpoint.w2, kind)[expert], "gpt_oss_w2", expert


@pytest.mark.parametrize("ranks", [1, 2])
def test_pairs_of_rows_and_biases_are_loaded(vllm_config, moe_config, fake_layer, ranks):
    """As vLLM's class for GPT-OSS does it: rows of pairs for each rank, down's bias for one."""
    checkpoint = random_layer(
        [int(b) for b in BITS13], [int(b) for b in BITS2], HIDDEN, WIDTH, GROUP,
        activation=GPT_OSS, biases=True,
    )  # fmt: skip
    bias13 = torch.stack(checkpoint.w13.bias.chunk(2, 1), 2).flatten(1)
    x, (weights, ids) = random_input(5, HIDDEN, torch.float32), random_routing(5, 8, 3)
    total = torch.zeros(5, HIDDEN)
    for rank in range(ranks):
        layer = fake_layer(8, activation="swigluoai")
        method = make_method(
            moe_config, layer, tp=(ranks, rank), dtype=torch.float32, has_bias=True
        )
        load(layer, paired_tensors(checkpoint))
        layer.w13_bias.copy_(bias13.chunk(ranks, 1)[rank])
        layer.w2_bias.copy_(checkpoint.w2.bias if rank == 0 else 0 * checkpoint.w2.bias)
        method.process_weights_after_loading(layer)
        total += method.apply(layer, x, topk_weights=weights, topk_ids=ids)
        del method, layer
        gc.collect()
    assert relative_error(total, experts_float64(x, checkpoint, weights, ids)) < 1e-6
    exchanged = replace(
        checkpoint, w13=replace(checkpoint.w13, bias=checkpoint.w13.bias.roll(WIDTH, 1))
    )
    assert relative_error(total, experts_float64(x, exchanged, weights, ids)) > 1e-2


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("gelu_tanh", {}, Activation("gelu_tanh")),
        ("silu", {"swiglu_limit": 10.0}, DEEPSEEK_V4),
        ("swigluoai", {"swiglu_limit": 7.0}, GPT_OSS),
        (
            "swigluoai_uninterleave",  # MiniMax-M3
            {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
            GPT_OSS,
        ),
        ("swiglustep", {}, STEP),
        ("silu", {"swiglu_limit": 10.0, "swiglu_alpha": 1.7}, "with swiglu_alpha 1.7, which vLLM"),
        ("swigluoai", {"swiglu_limit": 5.0}, "with swiglu_limit 5, which vLLM"),
    ],
)
def test_what_a_layer_says_of_its_activation(moe_config, fake_layer, name, settings, expected):
    from mcmoe_vllm.plugin.activation import find_activation

    layer = fake_layer(8, activation=name)
    (first, value), *others = settings.items() or [("swiglu_limit", None)]
    setattr(layer, first, value)
    moe = moe_config(8, **dict(others))  # either may say it
    if isinstance(expected, Activation):
        assert find_activation(layer, moe, PREFIX) == expected
        return
    with pytest.raises(UserError, match=expected):
        find_activation(layer, moe, PREFIX)


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_ranks_add_up(checkpoint, vllm_config, moe_config, fake_layer, ranks):
    x, (weights, ids) = random_input(5, HIDDEN, torch.float32), random_routing(5, 8, 3)
    total = torch.zeros(5, HIDDEN)
    for rank in range(ranks):
        layer = fake_layer(8)
        method = make_method(moe_config, layer, tp=(ranks, rank), dtype=torch.float32)
        load(layer, expert_tensors(checkpoint))
        method.process_weights_after_loading(layer)
        total += method.apply(layer, x, topk_weights=weights, topk_ids=ids)
        del method, layer
        gc.collect()
    assert relative_error(total, experts_float64(x, checkpoint, weights, ids)) < 1e-6


def test_expert_parallel_ranks_add_up(checkpoint, vllm_config, moe_config, fake_layer):
    x, (weights, ids) = random_input(5, HIDDEN, torch.float32), random_routing(5, 8, 3)
    total = torch.zeros(5, HIDDEN)
    for held in ([0, 1, 2, 3, 4], [5, 6, 7]):
        layer = fake_layer(8, held)
        method = make_method(moe_config, layer, dtype=torch.float32)
        load(layer, expert_tensors(checkpoint))
        assert {e for e, _, _ in method.filled} == set(held) - {4}
        method.process_weights_after_loading(layer)
        total += method.apply(layer, x, topk_weights=weights, topk_ids=ids)
        del method, layer
        gc.collect()
    assert relative_error(total, experts_float64(x, checkpoint, weights, ids)) < 1e-6


def test_a_remote_expert_is_not_loaded(checkpoint, moe_config, fake_layer):
    layer = fake_layer(8, [0, 1])
    make_method(moe_config, layer)
    param = layer.w2_weight_packed
    given = {"param": param, "loaded_weight": torch.zeros(1), "weight_name": "w2_weight_packed"}
    assert param.weight_loader(**given, shard_id="w2", expert_id=7, return_success=True) is False
    assert param.weight_loader(**given, shard_id="w2", expert_id=7) is None


def test_gaps_are_listed(checkpoint, vllm_config, moe_config, fake_layer):
    layer = fake_layer(8)
    method = make_method(moe_config, layer)
    load(layer, [t for t in expert_tensors(checkpoint) if t[3] != 2 and t[2:] != ("w3", 6)])
    with pytest.raises(UserError) as error:
        method.process_weights_after_loading(layer)
    message = str(error.value)
    assert "lacks 8 expert tensor(s)" in message and "expert 6 w3.weight_scale" in message
    assert " more" not in message  # all eight are named
    assert all(f"expert 2 {p}.weight_packed" in message for p in ("w1", "w2", "w3"))


@pytest.mark.parametrize(("expert", "steps"), [(0, 2), (1, 7), (2, 8)])  # of 1, 2 and 3 bits
def test_zeros_that_no_width_has_are_refused(
    checkpoint, vllm_config, moe_config, fake_layer, expert, steps
):
    layer = fake_layer(8)
    method = make_method(moe_config, layer)
    load(layer, expert_tensors(checkpoint))
    word = 20 << 7 | steps << 12
    layer.w13_weight_scale.data[expert, 3, 1] = word - 65536 if word > 32767 else word
    said = f"{expert + 1}-bit w13.weight_scale has 1 zeros out of range"
    with pytest.raises(UserError, match=said):
        method.process_weights_after_loading(layer)


def test_version_1_loads_the_same_weights(vllm_config, moe_config, fake_layer, checkpoint):
    found = []
    for version in (1, 2):
        layer = fake_layer(8)
        config = replace(quantization_config(), format_version=version)
        method = make_method(moe_config, layer, config)
        tensors = list(expert_tensors(checkpoint))
        if version == 1:  # float16, scale and zero side by side
            tensors = [
                (
                    name,
                    interleaved(t, shard, expert) if name.endswith("scale") else t,
                    shard,
                    expert,
                )
                for name, t, shard, expert in tensors
            ]
        load(layer, tensors)
        found.append((layer.w13_weight_scale.clone(), layer.w2_weight_scale.clone()))
        method.process_weights_after_loading(layer)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def interleaved(words, shard, expert):
    bits = int((BITS2 if shard == "w2" else BITS13)[expert])
    return torch.stack(unpack_scale(words, bits), dim=-1).flatten(-2).half()


def test_dummy_weights_have_no_gaps_and_compute(vllm_config, moe_config, fake_layer):
    vllm_config.load_config.load_format = "dummy"
    layer = fake_layer(8)
    method = make_method(moe_config, layer)
    assert method.process_weights_after_loading(layer) is None
    out = method.apply(layer, random_input(2, HIDDEN), *random_routing(2, 8, 2))
    assert out.any() and out.isfinite().all()


@pytest.mark.parametrize(
    ("name", "shard", "expert", "tensor", "said"),
    [
        (
            "w13_weight_packed", "w1", 1, torch.zeros(WIDTH, HIDDEN // 8 * 3, dtype=torch.uint8),
            "expert 1 w1.weight_packed is uint8 [128, 96], but width 2 in config.json "
            "(group size 32) needs uint8 [128, 64]",
        ),
        (
            "w2_weight_scale", "w2", 0, torch.zeros(HIDDEN, 2, dtype=torch.float16),
            "expert 0 w2.weight_scale is float16 [256, 2], but width 2 in config.json "
            "(group size 32) needs int16 [256, 4]",
        ),
        (
            "w2_weight_scale", "w2", 0, torch.zeros(HIDDEN, 8, dtype=torch.bfloat16),
            "is bfloat16 [256, 8]",
        ),
        (
            "w13_weight_packed", "w3", 4, torch.zeros(WIDTH, HIDDEN // 8, dtype=torch.uint8),
            "expert 4 w3.weight_packed is in the checkpoint, but config.json says that the expert "
            "was dropped",
        ),
    ],
)  # fmt: skip
def test_a_tensor_that_contradicts_the_config_is_refused(
    moe_config, fake_layer, name, shard, expert, tensor, said
):
    layer = fake_layer(8)
    make_method(moe_config, layer)
    with pytest.raises(UserError) as error:
        load(layer, [(name, tensor, shard, expert)])
    assert said in str(error.value) and PREFIX in str(error.value)


def test_a_split_through_a_group_is_refused(moe_config, fake_layer):
    with pytest.raises(UserError, match="expert width per rank of 64 .* group size 128.*"):
        make_method(moe_config, fake_layer(8), quantization_config(group=128), width=128, tp=(2, 0))
    with pytest.raises(UserError, match="--enable-expert-parallel"):
        make_method(moe_config, fake_layer(8), width=96, tp=(2, 0))


def test_another_number_of_experts_is_refused(moe_config, fake_layer):
    with pytest.raises(UserError, match="has 8 experts, but expert_bits in config.json has 4"):
        make_method(moe_config, fake_layer(8), quantization_config("2222", "2222"))


@pytest.mark.parametrize("activation", ["situ", "relu2_no_mul"])
def test_an_unknown_activation_is_refused(moe_config, fake_layer, activation):
    with pytest.raises(UserError, match=f"has activation '{activation}'; mcmoe serves gelu"):
        make_method(moe_config, fake_layer(8, activation=activation))


def test_every_unsupported_setting_is_listed(moe_config, monkeypatch):
    import vllm

    from mcmoe_vllm.plugin.experts import McmoeExpertsMethod

    monkeypatch.setattr(vllm, "__version__", "0.26.0")
    moe = moe_config(8, has_bias=True)
    moe.moe_parallel_config.enable_eplb = True
    moe.moe_parallel_config.use_all2all_kernels = True
    moe.moe_parallel_config.all2all_backend = "deepep_low_latency"
    with pytest.raises(UserError) as error:
        McmoeExpertsMethod(quantization_config(), None, moe, PREFIX, 0)
    for part in ("biases on vLLM 0.26.0", "0.32 or newer", "--enable-eplb", "deepep_low_latency"):
        assert part in str(error.value)


@pytest.mark.parametrize("cache_gib", [0, 1])  # int4 codes, dequantized at load
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_are_loaded_again_take_the_place_of_the_old(
    vllm_config, moe_config, fake_layer, dtype, cache_gib
):
    """As reload_weights does it: parameters as they were created, then loading and processing."""
    vllm_config.additional_config = {"cpu_weight_cache_gib": cache_gib}
    layer = fake_layer(8)
    method = make_method(moe_config, layer, dtype=dtype)
    created = {name: p.data.clone() for name, p in layer.named_parameters()}
    x, (weights, ids) = random_input(5, HIDDEN, dtype), random_routing(5, 8, 3)
    limit = {torch.bfloat16: 1e-2, torch.float32: 1e-6}[dtype]
    budget = []
    for seed in (1, 2, 1):
        widths = [[int(b) for b in side] for side in (BITS13, BITS2)]
        checkpoint = random_layer(*widths, HIDDEN, WIDTH, group_size=GROUP, seed=seed)
        for name, value in created.items():
            getattr(layer, name).data = value.clone()
        load(layer, expert_tensors(checkpoint))
        method.process_weights_after_loading(layer)
        out = method.apply(layer, x, topk_weights=weights, topk_ids=ids)
        assert relative_error(out, experts_float64(x, checkpoint, weights, ids)) < limit
        budget.append(method.launch.budget.bytes)
    assert budget[0] == budget[1] == budget[2], "memory is booked once"


def test_what_is_loaded_again_must_be_whole(checkpoint, vllm_config, moe_config, fake_layer):
    layer = fake_layer(8)
    method = make_method(moe_config, layer)
    created = {name: p.data.clone() for name, p in layer.named_parameters()}
    load(layer, expert_tensors(checkpoint))
    method.process_weights_after_loading(layer)
    for name, value in created.items():
        getattr(layer, name).data = value
    load(layer, list(expert_tensors(checkpoint))[:-1])
    with pytest.raises(UserError, match="lacks 1 expert tensor"):
        method.process_weights_after_loading(layer)


def test_a_loader_has_the_name_and_the_arguments_that_vllm_asks_for(moe_config, fake_layer):
    import inspect

    layer = fake_layer(8)
    make_method(moe_config, layer)
    loader = layer.w13_weight_packed.weight_loader
    assert loader.__name__ and {"param", "loaded_weight"} <= set(
        inspect.signature(loader).parameters
    )


def test_a_loaded_layer_is_not_saved(checkpoint, vllm_config, moe_config, fake_layer):
    """By save_sharded_state, torch.save or whoever asks for the model's state."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), fake_layer(8))
    method = make_method(moe_config, model[1])
    assert "1.w13_weight_packed" in model.state_dict()  # vLLM's dummy loader fills these
    load(model[1], expert_tensors(checkpoint))
    method.process_weights_after_loading(model[1])
    with pytest.raises(UserError, match="save_sharded_state .* cannot save .*experts .1. are laid"):
        model.state_dict()


def test_counts_outlive_a_sleep(checkpoint, vllm_config, moe_config, fake_layer, monkeypatch):
    """vLLM keeps buffers through a sleep of level 2."""
    monkeypatch.delenv(metrics.FOLDER, raising=False)  # they are published nowhere
    vllm_config.additional_config = {"mcmoe": {"pruning": 0.1}}
    layer = fake_layer(8)
    table = PruningTable("sensitivity", 0.1, (0,), {0.1: (0.5,)})
    method = make_method(moe_config, layer, replace(quantization_config(), pruning=table))
    load(layer, expert_tensors(checkpoint))
    method.process_weights_after_loading(layer)
    (buffer,) = layer.buffers()
    assert buffer.shape == (2, 2) and "pruning_counts" not in layer._parameters


def test_two_live_layers_of_one_name_are_refused(checkpoint, vllm_config, moe_config, fake_layer):
    first, second = fake_layer(8), fake_layer(8)
    methods = [make_method(moe_config, layer) for layer in (first, second)]
    for layer in (first, second):
        load(layer, expert_tensors(checkpoint))
    methods[0].process_weights_after_loading(first)
    with pytest.raises(UserError, match="already loaded in this process"):
        methods[1].process_weights_after_loading(second)


@pytest.mark.parametrize("ranks", [{"tp_rank": 1}, {"ep_rank": 1}])
def test_another_rank_than_the_first_is_silent(vllm_config, moe_config, fake_layer, lines, ranks):
    """Under expert parallelism tp_rank is 0 everywhere."""
    vllm_config.load_config.load_format = "dummy"
    layer = fake_layer(8)
    method = make_method(moe_config, layer)
    vars(method.moe.moe_parallel_config).update(ranks)
    method.process_weights_after_loading(layer)
    assert method.launch._ready == {PREFIX} and not lines


def test_the_start_is_announced(checkpoint, vllm_config, moe_config, fake_layer, lines):
    layer = fake_layer(8)
    method = make_method(moe_config, layer)
    load(layer, expert_tensors(checkpoint))
    assert not lines
    method.process_weights_after_loading(layer)
    (line,) = lines
    mean13 = sum(map(int, BITS13)) / 8 + 7 / 16  # 16 bits of scale and zero per group of 32
    mean2 = sum(map(int, BITS2)) / 8 + 7 / 16
    assert f"{(2 * mean13 + mean2) / 3:.2f} true bits/weight (experts)" in line
    assert line.startswith("mcmoe 0.1.0: 1 MoE layers") and "compute path = CPU" in line


def test_views_are_made_once_a_layer(checkpoint, vllm_config, moe_config, fake_layer, monkeypatch):
    """Made for each tensor, they would take seconds a layer where there are many experts."""
    from mcmoe_vllm.plugin import experts

    calls = []
    split_flat = experts.split_flat
    monkeypatch.setattr(
        experts, "split_flat", lambda *args: calls.append(args) or split_flat(*args)
    )
    layer = fake_layer(8)
    method = make_method(moe_config, layer)
    load(layer, expert_tensors(checkpoint))
    method.process_weights_after_loading(layer)
    assert len(calls) == 2  # w13 and w2
    assert not method._views, "they would keep the packed weights alive"


@pytest.mark.parametrize("replaced", ["w13_weight_packed", "w13_weight_scale", "w2_weight_packed"])
def test_buffers_that_vllm_replaces_are_loaded_and_computed_from(
    checkpoint, vllm_config, moe_config, fake_layer, replaced
):
    """As it does to move a layer to another device, at any time until the layer is prepared."""
    layer = fake_layer(8)
    method = make_method(moe_config, layer, dtype=torch.float32)
    tensors = list(expert_tensors(checkpoint))
    for part in (tensors[:20], tensors[20:]):
        load(layer, part)
        param = getattr(layer, replaced)
        old, param.data = param.data, param.data.clone()
        old.zero_()
    method.process_weights_after_loading(layer)
    x, (weights, ids) = random_input(5, HIDDEN, torch.float32), random_routing(5, 8, 3)
    out = method.apply(layer, x, topk_weights=weights, topk_ids=ids)
    assert relative_error(out, experts_float64(x, checkpoint, weights, ids)) < 1e-6
