"""The fastest kernels that others ship for the same layer, at their own widths, in vLLM's wheel.

Each function prepares random weights and returns call(x, topk_weights, topk_ids) -> output, from
given routes to the reduced sum, as vLLM calls the kernel.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
GROUP_SIZE = 128


def use_tuned_files(shapes: list[tuple[int, int]]) -> list[str]:
    """Let vLLM's bf16 kernel use the wheel's H200 configurations where it has none for this GPU.

    shapes: (experts, intermediate size). Returns the files in use. Before vllm is imported.
    """
    import importlib.util

    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None, "vllm is not installed"
    configs = Path(spec.origin).parent / "model_executor/layers/fused_moe/configs"
    device = torch.cuda.get_device_name().replace(" ", "_")
    folder, used = Path(tempfile.mkdtemp()), []
    for experts, size in shapes:
        name = f"E={experts},N={size},device_name="
        own, other = configs / f"{name}{device}.json", configs / f"{name}NVIDIA_H200.json"
        if own.exists():
            used.append(own.name)
        elif other.exists():
            shutil.copyfile(other, folder / own.name)
            used.append(other.name)
    os.environ["VLLM_TUNED_CONFIG_FOLDER"] = str(folder)
    return used


def vllm_bf16(experts: int, hidden: int, intermediate: int) -> Call:
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    new = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16) * 0.02  # noqa: E731
    w1, w2 = new(experts, 2 * intermediate, hidden), new(experts, hidden, intermediate)
    return lambda x, weights, ids: fused_experts(x, w1, w2, weights, ids)


def vllm_marlin_int4(experts: int, hidden: int, intermediate: int) -> Call:
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.scalar_type import scalar_types

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, device="cuda", dtype=torch.int32)

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device="cuda", dtype=torch.bfloat16) * 0.01

    w1 = words(experts, hidden // 16, 2 * intermediate * 2)
    w2 = words(experts, intermediate // 16, hidden * 2)
    s1 = scales(experts, hidden // GROUP_SIZE, 2 * intermediate)
    s2 = scales(experts, intermediate // GROUP_SIZE, hidden)
    return lambda x, weights, ids: fused_marlin_moe(
        x, w1, w2, None, None, s1, s2, weights, ids,
        quant_type_id=scalar_types.uint4b8.id, global_num_experts=experts,
    )  # fmt: skip


def humming(bits: int) -> Callable[[int, int, int], Call]:
    """humming's indexed grouped GEMM of unsigned weights with zero points, as vLLM drives it."""

    def prepare(experts: int, hidden: int, intermediate: int) -> Call:
        from humming.config.enum import GemmType
        from humming.layer import HummingLayer, HummingLayerMethod
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
        from vllm.model_executor.layers.fused_moe.moe_fused_mul_sum import moe_fused_mul_sum

        layers, tuning = {}, {}
        for name, n, k in (("w13", 2 * intermediate, hidden), ("w2", hidden, intermediate)):
            layer = HummingLayer(
                shape_n=n, shape_k=k,
                weight_config={
                    "dtype": f"uint{bits}", "group_size": GROUP_SIZE, "has_zero_point": True,
                },
                num_experts=experts, torch_dtype=torch.bfloat16,
                pad_n_to_multiple=256, pad_k_to_multiple=128,
            ).cuda()  # fmt: skip
            for p in layer.parameters():
                if p.dtype == torch.int32:
                    p.data = torch.randint(
                        -(2**31), 2**31 - 1, p.shape, device="cuda", dtype=torch.int32
                    )
                else:
                    p.data = (torch.rand(p.shape, device="cuda") * 0.01).to(p.dtype)
            layer.transform()
            layers[name] = layer
            tuning[name] = HummingLayerMethod.get_default_tuning_configs(
                layer=layer, gemm_type=GemmType.INDEXED
            )
        compute = json.dumps(
            {"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "indexed"}
        )
        tuned = {name: json.dumps(config) for name, config in tuning.items()}

        def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            pairs, top_k = ids.numel(), ids.shape[1]
            block = next(
                (c["block_shape"][0] for low, high, c in tuning["w13"] if low < pairs <= high), 64
            )
            sorted_ids, expert_ids, padded = moe_align_block_size(
                topk_ids=ids, block_size=block, num_experts=experts, expert_map=None,
                ignore_invalid_experts=True,
            )  # fmt: skip
            common = {
                "sorted_ids": sorted_ids, "expert_ids": expert_ids, "num_tokens_padded": padded,
                "compute_config": compute, "valid_shape_m": pairs,
            }  # fmt: skip

            def product(name: str, inputs: torch.Tensor, k: int) -> torch.Tensor:
                outputs = x.new_empty(pairs, layers[name].humming_metas[""].shape_n)
                HummingLayerMethod.forward_layer(
                    layer=layers[name], inputs=inputs, outputs=outputs, top_k=k,
                    tuning_config=tuned[name], **common,
                )  # fmt: skip
                return outputs

            gate_up = product("w13", x, top_k)
            if gate_up.shape[1] != 2 * intermediate:
                gate_up = gate_up[:, : 2 * intermediate].contiguous()
            h = x.new_empty(pairs, intermediate)
            torch.ops._C.silu_and_mul(h, gate_up)
            y = product("w2", h, 1)
            out = torch.empty_like(x)
            moe_fused_mul_sum(
                inputs=y.view(len(x), top_k, -1), topk_weights=weights, topk_ids=ids,
                expert_map=None, outputs=out,
            )  # fmt: skip
            return out

        return call

    return prepare


# name -> (bits of a weight, how to prepare it)
PEERS: dict[str, tuple[int, Callable[[int, int, int], Call]]] = {
    "vllm-bf16": (16, vllm_bf16),
    "vllm-marlin-int4": (4, vllm_marlin_int4),
    "humming-uint2": (2, humming(2)),
    "humming-uint3": (3, humming(3)),
}
