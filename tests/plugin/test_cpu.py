"""The choice of the CPU's path, and vLLM's fused kernel behind it."""

import pytest
import torch

pytest.importorskip("vllm")

from mcmoe_kernels.activations import Activation
from mcmoe_kernels.cpu.experts import dense_bytes, prepare_dense
from mcmoe_vllm.plugin.cpu import _rounds_down, choose_mode, vllm_kernel
from mcmoe_vllm.plugin.operator import prepare_experts
from mcmoe_vllm.plugin.prepared import GIB, CacheBudget
from tests.helpers.expert_layers import (
    experts_float64,
    experts_rounded,
    random_input,
    random_layer,
    random_routing,
    relative_error,
)

pytestmark = pytest.mark.vllm

MIXED13, MIXED2 = (1, 2, 3, 4, 0, 2), (2, 3, 1, 2, 0, 4)


def has_fused_kernel(dtype):
    """Without AVX-512 vLLM's kernel does not round bfloat16 to nearest."""
    return dtype != torch.bfloat16 or torch.cpu._is_avx512_supported()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_fused_kernel_is_used_and_errs_no_more_than_plain_torch(dtype, tokens):
    layer = random_layer(MIXED13, MIXED2)
    prepared = prepare_experts(layer, dtype, CacheBudget(1), 2)
    assert ("vLLM's fused kernel" in prepared.path) == has_fused_kernel(dtype)
    assert not prepared.keeps_packed
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
    if not has_fused_kernel(dtype):
        pytest.skip("vLLM's fused kernel cuts bfloat16 off on this CPU")
    prepared = prepare_experts(random_layer(MIXED13, MIXED2), dtype, CacheBudget(1), 3)
    assert "vLLM's fused kernel" in prepared.path
    x, (weights, ids) = random_input(12, 256, dtype), random_routing(12, 6, 3)
    ids[0], ids[1, 0], ids[2, 1:], ids[7, 2] = -1, -1, -1, -1
    alone = [prepared.compute(x[i : i + 1], weights[i : i + 1], ids[i : i + 1]) for i in range(12)]
    assert torch.equal(prepared.compute(x, weights, ids), torch.cat(alone))


def test_the_fused_kernel_is_not_used_where_it_cannot_be(monkeypatch):
    from vllm import _custom_ops

    layer = random_layer((2, 3))
    dense = prepare_dense(layer, torch.float32)
    silu = Activation("silu")
    assert vllm_kernel(*dense, silu) is not None
    assert vllm_kernel(*dense, Activation("silu", limit=7.0)) is None
    odd = tuple(torch.zeros(2, n, k) for n, k in ((2 * 40, 48), (48, 40)))
    assert vllm_kernel(*odd, silu) is None  # no multiple of 32
    # A vLLM whose kernel has other arguments, or another meaning.
    monkeypatch.setattr(_custom_ops, "cpu_fused_moe", lambda a, b: None)
    assert vllm_kernel(*dense, silu) is None
    monkeypatch.setattr(_custom_ops, "cpu_fused_moe", lambda out, *args: out.fill_(3))
    assert vllm_kernel(*dense, silu) is None
    prepared = prepare_experts(layer, torch.bfloat16, CacheBudget(1), 2)
    x, (weights, ids) = random_input(5, 256), random_routing(5, 2, 2)
    reference = experts_float64(x, layer, weights, ids)
    assert relative_error(prepared.compute(x, weights, ids), reference) < 0.01


def test_a_kernel_that_cuts_off_is_told_from_one_that_rounds():
    exact = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    cut = (exact.view(torch.int32) & -0x10000).view(torch.float32)
    assert not _rounds_down(exact.bfloat16(), exact) and _rounds_down(cut.bfloat16(), exact)
    assert not _rounds_down(exact * (1 + 1e-7), exact)  # float32, summed in another order


def test_the_cache_is_shared_until_it_is_spent():
    layer = random_layer((2, 3))
    size = dense_bytes(layer, torch.bfloat16)
    assert size == 2 * 3 * 256 * 128 * 2
    cache = CacheBudget(2.5 * size / GIB)
    modes = [choose_mode(layer, torch.bfloat16, cache) for _ in range(4)]
    assert modes == ["dense", "dense", "int4", "int4"]
    assert choose_mode(layer, torch.float16, CacheBudget(0)) == "packed"
