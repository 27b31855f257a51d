"""Dense int4 linears: vLLM's kernel in 16 bits, exact weights in float32."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from mcmoe_kernels.formats.packing import dequantize_int4_linear, pack_int4_linear
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.errors import UserError
from tests.helpers.expert_layers import relative_error

pytestmark = pytest.mark.vllm

K, N = 256, 64


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """vLLM's parameters ask for their rank when they are made."""
    from vllm.model_executor import parameter

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


def make_method(group_size):
    from vllm.config import get_current_vllm_config

    from mcmoe_vllm.plugin.launch import Launch
    from mcmoe_vllm.plugin.linear import McmoeLinearMethod

    config = QuantizationConfig(
        group_size={"w13": 64, "w2": 64, "dense": group_size},
        expert_bits={0: ("22", "22")},
        dense_bits=4,
        dense_modules=("self_attn",),
    )
    launch = Launch(config, get_current_vllm_config())
    return McmoeLinearMethod(config, launch, "model.layers.3.self_attn.o_proj")


def make_layer(dtype, group_size, input_size=K):
    layer, method = torch.nn.Module(), make_method(group_size)
    layer.bias = torch.nn.Parameter(torch.ones(N, dtype=dtype), requires_grad=False)
    method.create_weights(
        layer, K, [N], input_size, N, dtype, weight_loader=lambda p, value: p.data.copy_(value)
    )
    qweight, scales = stored(group_size)
    layer.qweight.weight_loader(layer.qweight, qweight)
    layer.scales.weight_loader(layer.scales, scales)
    method.process_weights_after_loading(layer)
    return layer, method, dequantize_int4_linear(qweight, scales.float())


def stored(group_size):
    """As a checkpoint has them: int32 [K/8, N], float16 [K/G, N]."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (N, K), generator=generator)
    scales = torch.rand(K // group_size, N, generator=generator) * 0.1 + 0.01
    return pack_int4_linear(codes), scales.bfloat16().half()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 4e-3), (torch.float16, 1e-3), (torch.float32, 1e-6)]
)
@pytest.mark.parametrize("cache_gib", [0, 1])  # vLLM's int4 kernel, dequantized at load
def test_it_computes_the_stored_weight(vllm_config, group_size, dtype, limit, cache_gib):
    vllm_config.additional_config = {"cpu_weight_cache_gib": cache_gib}
    layer, method, exact = make_layer(dtype, group_size)
    for tokens in (1, 33):
        x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(1)).to(dtype)
        out = method.apply(layer, x, layer.bias)  # of the dtype that the kernel asks for
        reference = x.double() @ exact.t().double() + 1
        assert out.dtype == dtype and relative_error(out, reference) < limit
    has_int4 = hasattr(torch.ops._C, "cpu_gemm_wna16")  # not without AVX-512
    dequantized = cache_gib > 0 or dtype == torch.float32 or not has_int4
    assert (method.plain is not None) == dequantized
    assert hasattr(layer, "qweight") != dequantized, "no weight is kept twice"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_is_booked_once(vllm_config, dtype):
    vllm_config.additional_config = {"cpu_weight_cache_gib": 1}
    _, method, _ = make_layer(dtype, 32)
    spent = 0 if dtype == torch.float32 else K * N * 2  # float32 is asked for, whatever it takes
    assert method.launch.budget.bytes == (1 << 30) - spent


@pytest.mark.parametrize("case", ["kept", "no AMX", "AMX denied", "chosen"])
def test_activations_are_kept_in_16_bits(monkeypatch, case):
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )

    from mcmoe_vllm.plugin.linear import keep_activations

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: case != "no AMX")
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: case != "AMX denied")
    monkeypatch.delenv("VLLM_CPU_INT4_W4A8", raising=False)
    if case == "chosen":
        monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "1")
    config = MPLinearLayerConfig((K, N), (K, N), None, torch.bfloat16, 128, False)
    assert (keep_activations(config).act_type != torch.bfloat16) == (case == "kept")


PARTS = ("q", "k", "v")


@pytest.fixture
def fused(vllm_config):
    """A fused linear of three parts and its method."""
    layer, method = torch.nn.Module(), make_method(32)
    method.create_weights(
        layer, K, [N, N, N], K, 3 * N, torch.bfloat16,
        weight_loader=lambda param, value, part: param.data.narrow(
            1, PARTS.index(part) * N, N
        ).copy_(value),
    )  # fmt: skip
    return layer, method


@pytest.mark.parametrize("gap", [("qweight", "k"), ("scales", "v"), None])
def test_gaps_of_fused_linears_are_listed(fused, gap):
    layer, method = fused
    for name, value in zip(("qweight", "scales"), stored(32), strict=True):
        for part in PARTS:
            if (name, part) != gap:
                getattr(layer, name).weight_loader(getattr(layer, name), value, part)
    if gap is None:
        method.process_weights_after_loading(layer)
        return
    with pytest.raises(UserError, match=rf"o_proj: .* lacks {gap[0]} \(2 of 3 parts loaded\) of"):
        method.process_weights_after_loading(layer)


def test_what_is_loaded_again_must_be_whole(fused):
    layer, method = fused
    for name, value in zip(("qweight", "scales"), stored(32), strict=True):
        for part in PARTS:
            getattr(layer, name).weight_loader(getattr(layer, name), value, part)
    method.process_weights_after_loading(layer)
    with pytest.raises(UserError, match="0 of 3 parts loaded"):
        method.process_weights_after_loading(layer)


def test_dummy_weights_have_no_gaps(vllm_config, fused):
    vllm_config.load_config.load_format = "dummy"
    layer, method = fused
    method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("qweight", lambda t: t.view(torch.float32), "qweight is float32, needs int32"),
        ("scales", lambda t: t.bfloat16(), "scales is bfloat16, needs float16"),
        ("scales", lambda t: t * torch.nan, "scales has 512 scales that are not finite"),
        ("scales", lambda t: -t, "scales has 512 scales that are not finite and positive"),
    ],
)
def test_a_damaged_tensor_is_refused(fused, name, change, said):
    layer, _ = fused
    value = change(dict(zip(("qweight", "scales"), stored(32), strict=True))[name])
    with pytest.raises(UserError, match=said):
        getattr(layer, name).weight_loader(getattr(layer, name), value, "q")


def test_a_deleted_engine_gives_its_linears_back(vllm_config):
    """vLLM keeps a parameter's attributes until the layer is gone, which they must not prevent."""

    class Linear(torch.nn.Module):
        def load(self, param, value):
            param.data.copy_(value)

    layer, method = Linear(), make_method(32)
    method.create_weights(layer, K, [N], K, N, torch.bfloat16, weight_loader=layer.load)
    layer.qweight.weight_loader(layer.qweight, stored(32)[0])
    loaders, alive = [p.weight_loader for p in layer.parameters()][:2], weakref.ref(layer)
    del layer
    gc.collect()
    assert len(loaders) == 2 and alive() is None


def test_a_split_through_a_group_is_refused(vllm_config):
    with pytest.raises(UserError, match="model.layers.3.*split over 4 ranks gives 192, no mult"):
        make_method(128).create_weights(
            torch.nn.Module(), 192, [N], 768, N, torch.bfloat16, weight_loader=None
        )


def test_vllm_picks_the_loader_that_knows_packed_weights():
    from vllm.model_executor.layers.linear import WEIGHT_LOADER_V2_SUPPORTED

    from mcmoe_vllm.plugin.linear import McmoeLinearMethod

    assert McmoeLinearMethod.__name__ in WEIGHT_LOADER_V2_SUPPORTED


@pytest.fixture
def machete(monkeypatch):
    """A kernel such as vLLM chooses on Hopper, where Marlin would do as well."""
    from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel

    class MacheteLinearKernel(MPLinearKernel):
        get_min_capability = can_implement = process_weights_after_loading = apply_weights = (
            lambda *_: (True, None)
        )

    monkeypatch.setattr(MarlinLinearKernel, "can_implement", classmethod(lambda *_: (True, None)))
    config = SimpleNamespace(zero_points=False, has_g_idx=False)
    return MacheteLinearKernel(config, "qweight", "scales", "qzeros")


def test_marlin_takes_the_place_of_machete(vllm_config, machete):
    from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel

    from mcmoe_vllm.plugin.linear import prefer_marlin

    found = prefer_marlin(machete)
    assert type(found) is MarlinLinearKernel and found.config is machete.config
    assert (found.w_q_name, found.w_s_name, found.w_zp_name) == ("qweight", "scales", "qzeros")
    assert prefer_marlin(found) is found


@pytest.mark.parametrize("reason", ["disabled", "chosen", "chosen for int4", "impossible"])
def test_machete_stays(vllm_config, machete, monkeypatch, reason):
    from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel

    from mcmoe_vllm.plugin.linear import prefer_marlin

    if reason == "disabled":
        monkeypatch.setenv("VLLM_DISABLED_KERNELS", "MarlinLinearKernel")
    elif reason == "chosen":
        vllm_config.kernel_config.linear_backend = "machete"
    elif reason == "chosen for int4":
        vllm_config.kernel_config.linear_backend_per_quant = {"mixed_precision": "machete"}
    else:
        monkeypatch.setattr(
            MarlinLinearKernel, "can_implement", classmethod(lambda *_: (False, ""))
        )
    assert prefer_marlin(machete) is machete
