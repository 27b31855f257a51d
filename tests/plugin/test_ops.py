"""The operator `mcmoe::experts`, the choice of the CPU path, and vLLM's kernel behind it."""

import gc
import importlib

import pytest
import torch

pytest.importorskip("vllm")

from mcmoe_kernels.cpu.experts import dense_bytes, prepare_dense
from mcmoe_kernels.pruning import prune
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin.cache import DEFAULT_CACHE_GIB, GIB, CacheBudget
from mcmoe_vllm.plugin.cpu import choose_mode, vllm_kernel
from mcmoe_vllm.plugin.gpu import prepare_on_gpu
from mcmoe_vllm.plugin.operator import add_layer, define_operator, logger, prepare_experts
from mcmoe_vllm.plugin.pruning import LayerPruning
from tests.expert_layers import (
    experts_float64,
    experts_rounded,
    random_input,
    random_layer,
    random_routing,
    relative_error,
)

pytestmark = pytest.mark.vllm

MIXED13, MIXED2 = (1, 2, 3, 4, 0, 2), (2, 3, 1, 2, 0, 4)


@pytest.fixture
def prepared():
    layer = random_layer(MIXED13, MIXED2)
    value = prepare_experts(layer, torch.bfloat16, CacheBudget(1), 2)
    add_layer("test.experts", value)
    yield layer
    del value
    gc.collect()


def test_a_deleted_layer_that_waits_for_the_collector_frees_its_name():
    layer = random_layer(MIXED13, MIXED2)
    engine = {"experts": prepare_experts(layer, torch.bfloat16, CacheBudget(1), 2)}
    engine["self"] = engine  # as an engine's objects do
    gc.disable()
    try:
        add_layer("test.again", engine["experts"])
        del engine
        second = prepare_experts(layer, torch.bfloat16, CacheBudget(1), 2)
        add_layer("test.again", second)
    finally:
        gc.enable()


def test_the_operator_is_opaque_and_keeps_its_contract(prepared):
    x, (weights, ids) = random_input(5, 256), random_routing(5, 6, 2)
    torch.library.opcheck(
        torch.ops.mcmoe.experts.default,
        (x, weights, ids, "test.experts"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_operator_compiles(prepared):
    x, (weights, ids) = random_input(5, 256), random_routing(5, 6, 2)

    @torch.compile(fullgraph=True, backend="eager")
    def step(x, weights, ids):
        return torch.ops.mcmoe.experts(x * 1, weights, ids, "test.experts")

    assert torch.equal(
        step(x, weights, ids), torch.ops.mcmoe.experts(x, weights, ids, "test.experts")
    )


def test_defining_the_operator_again_changes_nothing():
    importlib.reload(importlib.import_module("mcmoe_vllm.plugin.operator"))
    define_operator()
    assert torch.ops.mcmoe.experts is not None


def test_registering_is_idempotent():
    from vllm.model_executor.layers.quantization import get_quantization_config

    from mcmoe_vllm.plugin import register
    from mcmoe_vllm.plugin.config import McmoeConfig

    register()
    register()
    assert get_quantization_config("mcmoe") is McmoeConfig


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_fused_kernel_is_used_and_errs_no_more_than_plain_torch(dtype, tokens):
    layer = random_layer(MIXED13, MIXED2)
    prepared = prepare_experts(layer, dtype, CacheBudget(1), 2)
    assert "vLLM's fused kernel" in prepared.path and not prepared.keeps_packed
    x, (weights, ids) = random_input(tokens, 256, dtype), random_routing(tokens, 6, 2)
    if tokens > 1:
        ids[0] = -1
        ids[1, 1] = -1
    reference = experts_float64(x, layer, weights, ids)
    out = prepared.compute(x, weights, ids)
    granted = relative_error(experts_rounded(x, layer, weights, ids), reference)
    # In float32 both are noise of the order of summation.
    limit = 1e-6 if dtype == torch.float32 else 1.1 * granted
    assert relative_error(out, reference) <= limit
    if tokens > 1:
        assert not out[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_is_computed_alike_beside_pruned_ones(dtype):
    """To the bit: else a request's text would depend on its neighbours."""
    prepared = prepare_experts(random_layer(MIXED13, MIXED2), dtype, CacheBudget(1), 3)
    assert "vLLM's fused kernel" in prepared.path
    x, (weights, ids) = random_input(12, 256, dtype), random_routing(12, 6, 3)
    ids[0], ids[1, 0], ids[2, 1:], ids[7, 2] = -1, -1, -1, -1
    alone = [prepared.compute(x[i : i + 1], weights[i : i + 1], ids[i : i + 1]) for i in range(12)]
    assert torch.equal(prepared.compute(x, weights, ids), torch.cat(alone))


def test_the_fused_kernel_is_not_used_where_it_cannot_be(monkeypatch):
    from vllm import _custom_ops

    layer = random_layer((2, 3))
    dense = prepare_dense(layer, torch.bfloat16)
    assert vllm_kernel(*dense, "silu") is not None
    odd = tuple(torch.zeros(2, n, k) for n, k in ((2 * 40, 48), (48, 40)))
    assert vllm_kernel(*odd, "silu") is None  # no multiple of 32
    # A vLLM whose kernel has other arguments, or another meaning.
    monkeypatch.setattr(_custom_ops, "cpu_fused_moe", lambda a, b: None)
    assert vllm_kernel(*dense, "silu") is None
    monkeypatch.setattr(_custom_ops, "cpu_fused_moe", lambda out, *args: out.fill_(3))
    assert vllm_kernel(*dense, "silu") is None
    prepared = prepare_experts(layer, torch.bfloat16, CacheBudget(1), 2)
    x, (weights, ids) = random_input(5, 256), random_routing(5, 2, 2)
    reference = experts_float64(x, layer, weights, ids)
    assert relative_error(prepared.compute(x, weights, ids), reference) < 0.01


def test_the_cache_is_shared_until_it_is_spent():
    layer = random_layer((2, 3))
    size = dense_bytes(layer, torch.bfloat16)
    assert size == 2 * 3 * 256 * 128 * 2
    cache = CacheBudget(2.5 * size / GIB)
    modes = [choose_mode(layer, torch.bfloat16, cache) for _ in range(4)]
    assert modes == ["dense", "dense", "int4", "int4"]
    assert choose_mode(layer, torch.float16, CacheBudget(0)) == "packed"
    assert CacheBudget.from_additional_config({}).bytes == DEFAULT_CACHE_GIB * GIB
    assert CacheBudget.from_additional_config({"cpu_weight_cache_gib": 0}).bytes == 0


@pytest.mark.parametrize("value", [-1, "four", float("nan"), float("inf"), True])
def test_a_wrong_cache_size_is_refused(value):
    with pytest.raises(UserError, match="cpu_weight_cache_gib is .*, needs a number of GiB from 0"):
        CacheBudget.from_additional_config({"cpu_weight_cache_gib": value})


def test_where_triton_cannot_run_plain_torch_does_and_says_why(monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warning_once", lambda text, *values: said.append(values))
    layer = random_layer(MIXED13, MIXED2)
    prepared = prepare_on_gpu(layer, torch.float32, 2, None)  # held by a CPU
    assert "torch" in prepared.path and prepared.keeps_packed
    assert "no CUDA device" in str(said) and "float32" in str(said)
    x, (weights, ids) = random_input(5, 256, torch.float32), random_routing(5, 6, 2)
    out = prepared.compute(x, weights, ids)
    assert relative_error(out, experts_float64(x, layer, weights, ids)) < 1e-6


@pytest.mark.parametrize("renormalize", [False, True])
def test_pruned_experts_are_the_experts_without_the_dropped(renormalize):
    layer = random_layer(MIXED13, MIXED2)
    plain = prepare_experts(layer, torch.bfloat16, CacheBudget(1), 2)
    pruning = LayerPruning(0.6, renormalize)
    pruned = prepare_experts(layer, torch.bfloat16, CacheBudget(1), 2, pruning)
    x, (weights, ids) = random_input(9, 256), random_routing(9, 6, 2)
    kept, kept_ids = prune(weights, ids, 0.6, renormalize)
    assert 0 < (kept_ids < 0).sum() < 9
    expected = plain.compute(x, kept, kept_ids)
    assert torch.equal(pruned.compute(x, weights, ids), expected)
    assert not torch.equal(plain.compute(x, weights, ids), expected)
