"""The experts of a layer as one opaque operator: `torch.ops.mcmoe.experts`.

On a CPU vLLM compiles the model as a whole, so what happens inside must be hidden from the
compiler. The graph holds the layer's name, not its weights; the same name in the same process is
the same layer, so a compiled graph from the cache finds its weights again.
"""

from __future__ import annotations

import gc
import weakref

import torch
from vllm.logger import init_logger

from mcmoe_kernels.layer import ExpertLayer
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin.cpu import prepare_on_cpu
from mcmoe_vllm.plugin.gpu import prepare_on_gpu
from mcmoe_vllm.plugin.prepared import CacheBudget, PreparedExperts, add_pruning
from mcmoe_vllm.plugin.pruning import LayerPruning

logger = init_logger("vllm.mcmoe")
_layers: weakref.WeakValueDictionary[str, PreparedExperts] = weakref.WeakValueDictionary()


def add_layer(name: str, prepared: PreparedExperts) -> None:
    """Let the operator find a layer by name for as long as `prepared` is alive.

    Raises UserError if another live layer has the name: a second engine in this process would
    otherwise compute with the weights of the first.
    """
    if _layers.get(name) is prepared:  # its weights were loaded again
        return
    if name in _layers:
        gc.collect()  # a deleted engine's objects refer to each other and wait for the collector
    if name in _layers:
        raise UserError(
            f"{name} is already loaded in this process: two mcmoe engines cannot share one "
            f"process. End the first one with llm.llm_engine.engine_core.shutdown() and delete it, "
            f"or start each in a process of its own."
        )
    _layers[name] = prepared


def run_experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str
) -> torch.Tensor:
    """x [T, H], topk_weights float [T, k], topk_ids int [T, k] (-1: skipped) -> new [T, H]."""
    return _layers[layer_name].compute(x, topk_weights, topk_ids)


def _fake_experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str
) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def define_operator() -> None:
    """Define `mcmoe::experts`, once per process even if this module is imported twice."""
    if hasattr(torch.ops.mcmoe, "experts"):
        return
    torch.library.define(
        "mcmoe::experts",
        "(Tensor x, Tensor topk_weights, Tensor topk_ids, str layer_name) -> Tensor",
        tags=(torch.Tag.needs_fixed_stride_order,),
    )
    torch.library.impl("mcmoe::experts", ("cpu", "cuda"))(run_experts)
    torch.library.register_fake("mcmoe::experts")(_fake_experts)


def prepare_experts(
    layer: ExpertLayer,
    dtype: torch.dtype,
    cache: CacheBudget,
    top_k: int,
    pruning: LayerPruning | None = None,
) -> PreparedExperts:
    """Choose and prepare the compute path for the device that holds the packed weights."""
    if layer.w13.scale[0].device.type != "cpu":
        return prepare_on_gpu(layer, dtype, top_k, pruning)
    return add_pruning(prepare_on_cpu(layer, dtype, cache), pruning)


define_operator()
