"""The experts of a layer on a GPU: the Triton kernels, or plain torch where they cannot run."""

from __future__ import annotations

import torch
from vllm.logger import init_logger

from mcmoe_kernels.layer import ExpertLayer, fused_experts_static
from mcmoe_vllm.plugin.prepared import PreparedExperts, add_pruning
from mcmoe_vllm.plugin.pruning import LayerPruning

logger = init_logger("vllm.mcmoe")


def prepare_on_gpu(
    layer: ExpertLayer, dtype: torch.dtype, top_k: int, pruning: LayerPruning | None
) -> PreparedExperts:
    """The Triton kernels, compiled for every batch size; plain torch where they cannot run."""
    problems = why_not_triton(layer, dtype)
    if problems:
        logger.warning_once(
            "mcmoe: the Triton kernels are not used, plain torch computes every expert on every "
            "token: %s",
            "; ".join(problems),
        )
        plain = PreparedExperts(
            "plain torch (every expert on every token)",
            lambda x, weights, ids: fused_experts_static(x, layer, weights, ids),
            keeps_packed=True,
            tensors=(*layer.w13.tensors, *layer.w2.tensors),
        )
        return add_pruning(plain, pruning)
    from mcmoe_kernels.gpu.experts import fused_experts, warm_up
    from mcmoe_kernels.gpu.tiled import tile_layer

    tiled = tile_layer(layer)
    if pruning is None or pruning.renormalize:  # the kernels leave weights as they are
        warm_up(tiled, top_k, dtype)
        prepared = PreparedExperts(
            "Triton kernels",
            lambda x, weights, ids: fused_experts(x, tiled, weights, ids),
            keeps_packed=False,
            tensors=tiled.tensors,
        )
        return add_pruning(prepared, pruning)
    ratio, counts = pruning.ratio, pruning.counts
    warm_up(tiled, top_k, dtype, ratio, counting=counts is not None)

    def compute(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        row = None if counts is None else counts.row()
        out = fused_experts(x, tiled, weights, ids, prune_ratio=ratio, counts=row)
        if counts is not None:
            counts.show()
        return out

    return PreparedExperts("Triton kernels", compute, keeps_packed=False, tensors=tiled.tensors)


def why_not_triton(layer: ExpertLayer, dtype: torch.dtype) -> list[str]:
    """Reasons why the Triton kernels cannot run a layer; none if they can."""
    try:
        from mcmoe_kernels.gpu.experts import why_not_gpu
    except ImportError as e:
        return [f"triton cannot be imported ({e})"]
    from mcmoe_kernels.gpu.tiled import why_not_tiled

    return why_not_gpu(layer.w13.scale[0].device, dtype) + why_not_tiled(layer)
