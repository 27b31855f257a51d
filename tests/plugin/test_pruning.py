"""One layer's pruning while vLLM runs it: routers and phases."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from mcmoe_kernels.pruning import prune
from mcmoe_vllm.plugin.pruning import LayerPruning
from tests.conftest import SIZES, TINY_MODELS
from tests.helpers.expert_layers import random_routing

pytestmark = pytest.mark.vllm

# How vLLM's model definitions ask for their routing: (model_type, settings) -> renormalize.
ROUTERS = {
    "MixtralForCausalLM": ("mixtral", {}, True),
    "Qwen2MoeForCausalLM": ("qwen2_moe", {"norm_topk_prob": False}, False),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {"norm_topk_prob": True}, True),
    "OlmoeForCausalLM": ("olmoe", {"norm_topk_prob": False}, False),
}


def kept_pairs(weights, ids):
    """(token, expert) -> weight; the order within a token is the router's."""
    return {
        (token, expert): float(weight)
        for token, row in enumerate(zip(ids.tolist(), weights, strict=True))
        for expert, weight in zip(*row, strict=True)
        if expert >= 0
    }


@pytest.mark.parametrize("renormalize_kept", [False, True])
@pytest.mark.parametrize("architecture", sorted(ROUTERS))
def test_every_router_is_pruned_by_the_definition(architecture, renormalize_kept):
    """vLLM's routing behind the plugin, against transformers' behind plain torch."""
    cpu_router = pytest.importorskip("vllm.model_executor.layers.fused_moe.router.cpu_router")
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings, renormalize = ROUTERS[architecture]
    values = {**SIZES, **TINY_MODELS[model_type], **settings, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    gate = model.model.layers[0].mlp.gate.float()
    torch.nn.init.normal_(gate.weight, 0, 0.1)
    x = torch.randn(64, SIZES["hidden_size"])
    with torch.no_grad():
        logits, weights, ids = gate(x)
    router = cpu_router.CPURouter(ids.shape[1], logits.shape[1], renormalize=renormalize)
    pruning = LayerPruning(0.6, renormalize_kept)
    served = kept_pairs(*pruning(*router._compute_routing(x, logits, torch.int32)))
    expected = kept_pairs(*prune(weights, ids, 0.6, renormalize_kept))
    assert 64 < len(expected) < ids.numel()
    assert served == pytest.approx(expected, rel=1e-5)


def test_a_factor_on_all_weights_changes_nothing():
    """Routers of sigmoids scale their weights, whose sum is not 1."""
    torch.manual_seed(1)
    weights, ids = torch.rand(64, 16).sigmoid().topk(6)
    pruned = LayerPruning(0.97)(weights, ids)[1]
    assert 0 < (pruned < 0).sum() < 64 * 5
    assert torch.equal(LayerPruning(0.97)(weights * 2.5, ids)[1], pruned)
    assert torch.equal(LayerPruning(0.97)(weights / weights.sum(1, True), ids)[1], pruned)


@pytest.mark.parametrize("renormalize", [False, True])
def test_decode_only_prunes_tokens_that_are_alone(forward, renormalize):
    weights, ids = random_routing(9, 6, 3)
    starts = torch.tensor([0, 1, 5, 6, 8], dtype=torch.int32)  # and a row of padding
    alone = torch.tensor([True, False, False, False, False, True, False, False, False])
    with forward({"model.layers.0.self_attn.attn": SimpleNamespace(query_start_loc=starts)}):
        served_weights, served_ids = LayerPruning(0.9, renormalize, decode_only=True)(weights, ids)
    all_weights, all_ids = prune(weights, ids, 0.9, renormalize)
    assert (all_ids[alone] < 0).any() and (all_ids[~alone] < 0).any()
    assert torch.equal(served_ids, torch.where(alone[:, None], all_ids, ids))
    assert torch.equal(served_weights, torch.where(alone[:, None], all_weights, weights))
    with forward(None):  # vLLM's own runs
        assert torch.equal(LayerPruning(0.9, decode_only=True)(weights, ids)[1], ids)
