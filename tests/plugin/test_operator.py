"""The operator `mcmoe::experts`, and pruning before it."""

import gc
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from mcmoe_kernels.pruning import prune
from mcmoe_vllm.plugin import operator
from mcmoe_vllm.plugin.operator import add_layer, prepare_experts
from mcmoe_vllm.plugin.prepared import CacheBudget
from mcmoe_vllm.plugin.pruning import LayerPruning
from tests.helpers.expert_layers import (
    experts_float64,
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


def test_a_second_import_leaves_the_operator_as_it_is(prepared):
    """torch refuses a second definition, and the twin's table of layers is empty."""
    twin = types.ModuleType("a_twin_of_the_operator")
    exec(Path(operator.__file__).read_text(), twin.__dict__)
    operator.define_operator()
    x, (weights, ids) = random_input(5, 256), random_routing(5, 6, 2)
    out = torch.ops.mcmoe.experts(x, weights, ids, "test.experts")
    assert relative_error(out, experts_float64(x, prepared, weights, ids)) < 0.01
