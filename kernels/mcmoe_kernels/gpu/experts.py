"""The experts on a GPU: the one function that the rest calls, and what it needs beforehand."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mcmoe_kernels.gpu.block import fused_experts_decode
from mcmoe_kernels.gpu.choice import (
    Config,
    DecodeConfig,
    LayerShape,
    SingleConfig,
    WarpConfig,
    WarpgroupConfig,
    choose_config,
    configs_for,
    is_usable,
    table_name,
)
from mcmoe_kernels.gpu.common import COMBINE_WIDE
from mcmoe_kernels.gpu.prefill import fused_experts_prefill
from mcmoe_kernels.gpu.pruning import prune_ids
from mcmoe_kernels.gpu.routing import FEW_PAIRS, ONE_PROGRAM_PAIRS
from mcmoe_kernels.gpu.single import fused_experts_single
from mcmoe_kernels.gpu.tiled import TiledLayer
from mcmoe_kernels.gpu.warp import fused_experts_warp
from mcmoe_kernels.gpu.warpgroup import fused_experts_warpgroup

FEW_TOKENS: dict[type[Config], Any] = {
    DecodeConfig: fused_experts_decode,
    WarpConfig: fused_experts_warp,
    SingleConfig: fused_experts_single,
}
DTYPES = (torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
# From COMBINE_WIDE tokens on rows are summed in wider pieces.
COMPILED_APART = (2, COMBINE_WIDE)


def fused_experts(
    x: torch.Tensor,
    layer: TiledLayer,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    config: Config | None = None,
    prune_ratio: float = 0.0,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, H] bfloat16 or float16, topk_weights float [T, k], topk_ids int [T, k] -> new [T, H].

    Ids are global; -1 is skipped, and so are remote and dropped experts. A row without any other
    id gives exact zeros. prune_ratio: pairs whose weight is below so much of their token's largest
    are skipped as well (`pruning`). counts: int64 [2] on the device, to which the numbers of pairs
    with an id and of those skipped for prune_ratio are added. No host synchronisation; launches
    depend on T and k alone. The same input gives the same bits, however it is batched within one
    configuration.

    Raises ValueError for a dtype or shapes that do not fit.
    """
    _check(x, layer, topk_weights, topk_ids, config)
    if not x.shape[0]:
        return torch.empty_like(x)
    inputs = (x.contiguous(), layer, topk_weights.contiguous(), topk_ids.contiguous())
    if config is None:
        shape = shape_of(layer, topk_ids.shape[1])
        config = choose_config(x.device, shape, x.shape[0], layer.has_codes8)
    pdl = supports_pdl(x.device)
    if run := FEW_TOKENS.get(type(config)):
        return run(*inputs, config, prune_ratio, counts, inline=inline(), pdl=pdl)
    if prune_ratio > 0 or counts is not None:
        inputs = (*inputs[:3], prune_ids(*inputs[2:], prune_ratio, counts))
    if isinstance(config, WarpgroupConfig):
        return fused_experts_warpgroup(*inputs, config, pdl=pdl)
    return fused_experts_prefill(*inputs, config, inline=inline(), pdl=pdl)


def shape_of(layer: TiledLayer, top_k: int) -> LayerShape:
    sizes = layer.hidden_size, layer.intermediate_size
    group_size = min(layer.w13.group_size, layer.w2.group_size)
    return LayerShape(len(layer.lookup), top_k, *sizes, layer.activation.rows, group_size)


def warm_up(
    layer: TiledLayer,
    top_k: int,
    dtype: torch.dtype,
    prune_ratio: float = 0.0,
    counting: bool = False,
) -> None:
    """Compile every kernel that the layer may use, so that no capture of a graph has to.

    Configurations are compiled side by side, as Triton's compiler works outside Python's lock.
    """
    device = layer.lookup.device
    counts = torch.zeros(2, dtype=torch.int64, device=device) if counting else None
    shape = shape_of(layer, top_k)
    found = configs_for(table_name(device), shape)
    configs = {config for config in found.values() if is_usable(config, layer.has_codes8)}
    # More than FEW_PAIRS pairs are routed in another way, and more than ONE_PROGRAM_PAIRS again.
    batches = {*COMPILED_APART, FEW_PAIRS // top_k + 1, ONE_PROGRAM_PAIRS // top_k + 1}

    def compile_config(config: Config) -> None:
        with torch.cuda.device(device):  # the current device is a thread's own
            for tokens in (1,) if isinstance(config, SingleConfig) else batches:
                x = torch.zeros(tokens, layer.hidden_size, dtype=dtype, device=device)
                ids = torch.full((tokens, top_k), -1, dtype=torch.int32, device=device)
                # Whatever the default is: vLLM sets it to the model's dtype while it loads.
                weights = torch.zeros(ids.shape, dtype=torch.float32, device=device)
                fused_experts(x, layer, weights, ids, config, prune_ratio, counts)

    with ThreadPoolExecutor(min(len(configs), len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(compile_config, configs))  # raises what a thread raised


def why_not_gpu(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Reasons why the kernels do not run on a device; none if they do."""
    problems = []
    if device.type != "cuda":
        problems.append(f"device {device} is no CUDA device")
    elif torch.version.hip:  # which says "cuda" too, and whose capabilities mean something else
        problems.append(f"torch is built for ROCm {torch.version.hip}, the kernels are NVIDIA's")
    elif torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        have = "{}.{}".format(*torch.cuda.get_device_capability(device))
        need = "{}.{}".format(*MIN_CAPABILITY)
        problems.append(f"compute capability {have} is below {need}")
    if dtype not in DTYPES:
        problems.append(f"dtype {dtype} is neither bfloat16 nor float16")
    return problems


def inline() -> bool:
    """Whether kernels may use inline PTX: Triton's interpreter has none."""
    return os.environ.get("TRITON_INTERPRET", "0") != "1"


def supports_pdl(device: torch.device) -> bool:
    """Whether a grid may start before the previous one ends (compute capability 9.0 on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _check(
    x: torch.Tensor,
    layer: TiledLayer,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    config: Config | None,
) -> None:
    problems = []
    if x.dtype not in DTYPES:
        problems.append(f"x is {x.dtype}, needs bfloat16 or float16")
    if x.dim() != 2 or x.shape[1] != layer.hidden_size:
        problems.append(f"x is {list(x.shape)}, needs [tokens, {layer.hidden_size}]")
    if topk_ids.shape != topk_weights.shape or topk_ids.shape[:1] != x.shape[:1]:
        problems.append(
            f"topk_weights {list(topk_weights.shape)} and topk_ids {list(topk_ids.shape)} need "
            f"the rows of x, {x.shape[0]}, and one shape"
        )
    if config is not None:
        for name, rows in (
            ("block_n13", layer.w13.rows),
            ("block_n2", layer.hidden_size),
        ):
            if rows % getattr(config, name):
                problems.append(f"{name} of {config} does not divide {rows} rows (`choice.fit`)")
    if config is not None and not is_usable(config, layer.has_codes8):
        problems.append(f"{config} takes 8-bit codes, which some format of the layer lacks")
    if isinstance(config, SingleConfig) and x.shape[0] > 1:
        problems.append(f"{config} is for one token, x has {x.shape[0]}")
    if problems:
        raise ValueError("; ".join(problems))
