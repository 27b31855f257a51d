"""What one worker sets up and counts while it loads one model: its run state.

`McmoeConfig` says what the checkpoint is and travels between processes; a Launch stays in its own.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger

import mcmoe_vllm
from mcmoe_vllm import widths
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.plugin.metrics import PruningCounts
from mcmoe_vllm.plugin.prepared import CacheBudget
from mcmoe_vllm.plugin.pruning import LayerPruning, refuse_decode_only
from mcmoe_vllm.plugin.unsupported import refuse_flags
from mcmoe_vllm.pruning.table import DECODE_ONLY, Pruning, parse_switch, read_table, switch_of

logger = init_logger("vllm.mcmoe")


def true_bits(config: QuantizationConfig) -> float:
    """Bits per expert weight with scales and zeros counted."""
    pairs = [
        pair
        for layer in config.expert_bits
        for pair in zip(config.bits(layer, "w13"), config.bits(layer, "w2"), strict=True)
    ]
    return widths.true_bits(pairs, config.group_size["w13"], config.group_size["w2"])


class Launch:
    """The memory that layers share, the pruning they are asked for, and how many are ready.

    budget: for weights that a CPU keeps dequantized.
    """

    def __init__(self, config: QuantizationConfig, vllm_config: Any) -> None:
        """vllm_config: the VllmConfig that the model is loaded with. Raises UserError for
        flags that mcmoe does not serve with, and for additional options that say nothing."""
        refuse_flags(vllm_config)
        self.config = config
        self._vllm_config = vllm_config
        self.budget = CacheBudget.from_additional_config(vllm_config.additional_config)
        table = read_table(config)
        setting = switch_of(vllm_config.additional_config)
        renormalize = table is not None and table.renormalize
        self._pruning = Pruning(parse_switch(setting, table), renormalize)
        self._decode_only = setting == DECODE_ONLY
        self._data_parallel_size: int = vllm_config.parallel_config.data_parallel_size
        self._counts: PruningCounts | None = None
        self._expected: set[str] = set()
        self._ready: set[str] = set()

    @property
    def dummy(self) -> bool:
        """Whether weights are made up now: vLLM can change its mind before it loads again."""
        return bool(self._vllm_config.load_config.load_format == "dummy")

    def pruning(self, layer: int, device: torch.device, counting: bool) -> LayerPruning | None:
        """What the launch prunes in a layer; None where it prunes in no layer. Raises UserError
        where the experts cannot tell what they are asked to tell apart."""
        if self._decode_only:
            refuse_decode_only(device, self._data_parallel_size)
        if not self._pruning.ratios:
            return None
        if counting and self._counts is None:
            self._counts = PruningCounts(sorted(self.config.expert_bits), device)
            self._counts.publish()
        return LayerPruning(
            self._pruning.ratios.get(layer, 0.0),
            self._pruning.renormalize,
            self._decode_only,
            self._counts.of_layer(layer) if self._counts and counting else None,
        )

    def expect(self, prefix: str) -> None:
        """Note that this worker holds a layer with experts. A rank of a pipeline holds some."""
        self._expected.add(prefix)

    def ready(self, prefix: str, compute_path: str, announce: bool) -> None:
        """Note that a layer's experts are ready; with the last of them, say so in one line."""
        if prefix in self._ready:
            return
        self._ready.add(prefix)
        if self._ready != self._expected or not announce:
            return
        logger.info(
            "mcmoe %s: %d MoE layers, %.2f true bits/weight (experts), compute path = %s%s",
            mcmoe_vllm.__version__,
            len(self._ready),
            true_bits(self.config),
            compute_path,
            self._pruning_announcement(),
        )

    def _pruning_announcement(self) -> str:
        if not self._pruning.ratios:
            return ""
        only = f" ({DECODE_ONLY})" if self._decode_only else ""
        return f", pruning in {len(self._pruning.ratios)} layers{only}"
