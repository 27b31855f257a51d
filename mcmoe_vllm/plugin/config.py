"""quantization_config of a checkpoint -> the method that vLLM uses for each layer."""

from __future__ import annotations

import re
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig as VllmQuantizationConfig,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

import mcmoe_vllm
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin.cache import CacheBudget
from mcmoe_vllm.plugin.metrics import PruningCounts
from mcmoe_vllm.plugin.pruning import LayerPruning, refuse_decode_only
from mcmoe_vllm.pruning.table import DECODE_ONLY, Pruning, parse_switch, read_table, switch_of

logger = init_logger("vllm.mcmoe")

NO_CHECKPOINT = (
    "--quantization mcmoe needs a checkpoint that mcmoe made: this model's config.json has no "
    "quantization_config. Compress it first with `mcmoe quantize <model> -o <folder>` and serve "
    "that folder, or drop --quantization mcmoe to serve the model as it is."
)
SCALE_BITS = 16  # of a group: scale and zero
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def true_bits(config: QuantizationConfig) -> float:
    """Bits per expert weight with scales and zeros counted; w13 holds two thirds of the weights."""
    share = {"w13": 2 / 3, "w2": 1 / 3}
    widths = [
        sum(
            part * (bits + SCALE_BITS / config.group_size[group])
            for group, part in share.items()
            if (bits := config.bits(layer, group)[expert])
        )
        for layer in config.expert_bits
        for expert in range(config.num_experts)
    ]
    return sum(widths) / len(widths)


class McmoeConfig(VllmQuantizationConfig):
    """vLLM's view of our QuantizationConfig. Travels to the workers by pickle: holds no tensor.

    num_layers: decoder layers of the main model, once vLLM has told; a layer beyond them belongs
    to a draft model and is not quantized.
    """

    def __init__(self, config: QuantizationConfig | None = None) -> None:
        super().__init__()
        if config is None:  # vLLM's call for a checkpoint without quantization_config
            raise UserError(NO_CHECKPOINT)
        self.config = config
        self.num_layers: int | None = None
        self._expected = 0
        self._ready = 0
        self._cache: CacheBudget | None = None
        self._pruning: Pruning | None = None
        self._decode_only = False
        self._counts: PruningCounts | None = None

    def get_name(self) -> str:
        return "mcmoe"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> McmoeConfig:
        return cls(QuantizationConfig.from_dict(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> None:
        return None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        text_config = getattr(hf_config, "get_text_config", lambda: hf_config)()
        self.num_layers = getattr(text_config, "num_hidden_layers", None)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        index = self._layer_index(prefix)
        if isinstance(layer, RoutedExperts):
            if index is None or index not in self.config.expert_bits:
                return UnquantizedFusedMoEMethod(layer.moe_config)
            from mcmoe_vllm.plugin.experts import McmoeExpertsMethod

            self._expected += 1
            return McmoeExpertsMethod(self, layer.moe_config, prefix, index)
        if isinstance(layer, LinearBase):
            if index is None or not self.is_dense_int4(prefix):
                return UnquantizedLinearMethod()
            from mcmoe_vllm.plugin.linear import McmoeLinearMethod

            return McmoeLinearMethod(self, prefix)
        return None

    def is_dense_int4(self, prefix: str) -> bool:
        """Whether the linear of this name, such as `model.layers.0.self_attn.qkv_proj`, is int4:
        its parent is one of `dense_modules`."""
        parent = prefix.split(".")[-2:-1]
        return self.config.dense_bits == 4 and bool(set(parent) & set(self.config.dense_modules))

    def experts_ready(self, compute_path: str, announce: bool) -> None:
        """Note that one layer's experts are ready; after the last, say so in one line."""
        self._ready += 1
        if self._ready != self._expected or not announce:
            return
        logger.info(
            "mcmoe %s: %d MoE layers, %.2f true bits/weight (experts), compute path = %s%s",
            mcmoe_vllm.__version__,
            self._ready,
            true_bits(self.config),
            compute_path,
            self._pruning_announcement(),
        )

    def _pruning_announcement(self) -> str:
        if self._pruning is None or not self._pruning.ratios:
            return ""
        only = f" ({DECODE_ONLY})" if self._decode_only else ""
        return f", pruning in {len(self._pruning.ratios)} layers{only}"

    def weight_cache(self, additional_config: object) -> CacheBudget:
        """The engine's budget for dequantized weights on a CPU, which its layers share."""
        if self._cache is None:
            self._cache = CacheBudget.from_additional_config(additional_config)
        return self._cache

    def layer_pruning(
        self, index: int, vllm_config: Any, device: torch.device, counting: bool
    ) -> LayerPruning | None:
        """What the launch prunes in a layer; None where it prunes in no layer."""
        if self._pruning is None:
            table = read_table(self.config)
            setting = switch_of(vllm_config.additional_config)
            self._pruning = Pruning(
                parse_switch(setting, table), table is not None and table.renormalize
            )
            self._decode_only = setting == DECODE_ONLY
            if self._decode_only:
                refuse_decode_only(device, vllm_config.parallel_config.data_parallel_size)
        if not self._pruning.ratios:
            return None
        if counting and self._counts is None:
            self._counts = PruningCounts(sorted(self.config.expert_bits), device)
            self._counts.publish()
        return LayerPruning(
            self._pruning.ratios.get(index, 0.0),
            self._pruning.renormalize,
            self._decode_only,
            self._counts.of_layer(index) if self._counts and counting else None,
        )

    def _layer_index(self, prefix: str) -> int | None:
        """Index of the main model's decoder layer that a name belongs to."""
        match = _LAYER.search(f"{prefix}.")
        if match is None:
            return None
        index = int(match.group(1))
        return None if self.num_layers is not None and index >= self.num_layers else index
