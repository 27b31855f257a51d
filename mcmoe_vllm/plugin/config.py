"""quantization_config of a checkpoint -> the method that vLLM uses for each layer."""

from __future__ import annotations

import re
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig as VllmQuantizationConfig,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.platforms import current_platform

from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin.experts import McmoeExpertsMethod
from mcmoe_vllm.plugin.launch import Launch
from mcmoe_vllm.plugin.linear import McmoeLinearMethod

NO_CHECKPOINT = (
    "--quantization mcmoe needs a checkpoint that mcmoe made: this model's config.json has no "
    "quantization_config. Compress it first with `mcmoe quantize <model> -o <folder>` and serve "
    "that folder, or drop --quantization mcmoe to serve the model as it is."
)
NO_ROCM = (
    "mcmoe does not serve on AMD GPUs: this vLLM is for ROCm, and mcmoe's kernels are written and "
    "tuned for NVIDIA's. Serve the folder on an NVIDIA GPU or with vLLM's build for CPUs, or the "
    "uncompressed model here."
)
# What may stand before the decoder layers of a language model. Drafts, and towers for pictures and
# sound, have layers of the same names behind others.
_HOLDERS = ("model", "language_model", "text_model", "backbone", "transformer", "thinker", "llm")
_LAYER = re.compile(rf"^(?:(?:{'|'.join(_HOLDERS)})\.)*layers\.(\d+)\.")


class McmoeConfig(VllmQuantizationConfig):
    """vLLM's view of our QuantizationConfig. Travels to the workers by pickle, without the launch.

    num_layers: decoder layers of the main model, once vLLM has told; a layer beyond them belongs
    to a draft model and is not quantized. dense_parents: what vLLM calls the modules whose linears
    are int4.
    """

    def __init__(self, config: QuantizationConfig | None = None) -> None:
        super().__init__()
        if config is None:  # vLLM's call for a checkpoint without quantization_config
            raise UserError(NO_CHECKPOINT)
        if current_platform.is_rocm():
            raise UserError(NO_ROCM)
        self.config = config
        self.num_layers: int | None = None
        self.dense_parents = frozenset(config.dense_modules if config.dense_bits == 4 else ())
        self._launch: Launch | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_launch": None}

    @property
    def launch(self) -> Launch:
        """What this process sets up for the model that vLLM is building: made for its first layer,
        while vLLM's current config is the model's."""
        if self._launch is None:
            self._launch = Launch(self.config, get_current_vllm_config())
        return self._launch

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

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Learn what vLLM's class calls modules that checkpoints call otherwise."""
        self.dense_parents |= {
            mapped.split(".")[-2]
            for parent in self.dense_parents
            if (mapped := hf_to_vllm_mapper._map_name(f"model.layers.0.{parent}.weight"))
        }

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        index = self._layer_index(prefix)
        if isinstance(layer, RoutedExperts):
            if index is None or index not in self.config.expert_bits:
                return UnquantizedFusedMoEMethod(layer.moe_config)
            self.launch.expect(prefix)
            return McmoeExpertsMethod(self.config, self.launch, layer.moe_config, prefix, index)
        if isinstance(layer, LinearBase):
            if index is None or not self.is_dense_int4(prefix):
                return UnquantizedLinearMethod()
            return McmoeLinearMethod(self.config, self.launch, prefix)
        return None

    def is_dense_int4(self, prefix: str) -> bool:
        """Whether the linear of this name, such as `model.layers.0.self_attn.qkv_proj`, is int4 if
        it belongs to a decoder layer: by its parent."""
        return not self.dense_parents.isdisjoint(prefix.split(".")[-2:-1])

    def _layer_index(self, prefix: str) -> int | None:
        """Index of the main model's decoder layer that a name belongs to."""
        match = _LAYER.search(f"{prefix}.")
        if match is None:
            return None
        index = int(match.group(1))
        return None if self.num_layers is not None and index >= self.num_layers else index
