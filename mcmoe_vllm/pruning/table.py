"""Online dynamic pruning: which of a token's routed experts are worth computing.

The rule, in plain torch; whatever serves it must give the same bits. Of a token's experts, one
whose weight is below `ratio` times the token's largest is dropped (Huang et al., arXiv 2410.06270,
section 3.3, for two experts a token). The largest always stays. `ratio` belongs to a layer; it is
calibrated (`pruning.calibration`) and stored in the checkpoint as a `PruningTable`.

A dropped expert is marked by the id -1, which every kernel skips. Weights of the others stay as
they are unless the table says `renormalize`: handing the dropped weight to the experts that stay
doubled the damage on the models measured, whatever the router does when it chooses
(benchmarks/quality/pruning.py compares).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mcmoe_kernels.pruning import Measure, beside_largest, pair_counts, prune
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.checkpoint.pruning_table import PruningTable as PruningTable
from mcmoe_vllm.errors import UserError

# --additional-config '{"mcmoe": {"pruning": ...}}'
OPTION, SWITCH = "mcmoe", "pruning"


DECODE_ONLY = "decode-only"
MODES = ("off", "on", DECODE_ONLY)


def lone_tokens(query_starts: torch.Tensor, tokens: int) -> torch.Tensor:
    """Tokens that are the only one of their request in a step: bool [T].

    query_starts: int [R + 1], where each request's tokens begin, and their end. Rows from there on
    belong to no request.
    """
    lengths = query_starts.diff()
    alone = torch.repeat_interleave(lengths == 1, lengths)
    return torch.nn.functional.pad(alone, (0, tokens - len(alone)))


@dataclass
class Pruning:
    """Pruning while a model runs, and what it dropped. ratios: of the layers that are pruned."""

    ratios: Mapping[int, float]
    renormalize: bool = False
    measure: Measure = beside_largest
    dropped: int = 0
    routed: int = 0

    def __call__(
        self, layer: int, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`prune` with the layer's ratio, counted."""
        ratio = self.ratios.get(layer, 0.0)
        weights, ids = prune(topk_weights, topk_ids, ratio, self.renormalize, self.measure)
        routed, dropped = pair_counts(topk_ids, ids).tolist()
        self.routed += routed
        self.dropped += dropped
        return weights, ids

    @property
    def dropped_fraction(self) -> float:
        return self.dropped / self.routed if self.routed else 0.0


def read_table(quantization: QuantizationConfig | None) -> PruningTable | None:
    """The table of a checkpoint, None if it is not calibrated."""
    return None if quantization is None else quantization.pruning


def switch_of(additional_config: object) -> object:
    """The setting in vLLM's --additional-config, None without one. Raises UserError for options
    that do not exist."""
    options = additional_config.get(OPTION) if isinstance(additional_config, Mapping) else None
    if options is None:
        return None
    if not isinstance(options, Mapping) or set(options) - {SWITCH}:
        raise UserError(
            f'--additional-config has {{"{OPTION}": {options!r}}}, needs an object whose only key '
            f'is "{SWITCH}"'
        )
    return options.get(SWITCH)


def parse_switch(setting: object, table: PruningTable | None) -> dict[int, float]:
    """The layers' ratios that a launch asks for; empty where nothing is pruned.

    setting: "off", "on", a share of experts to drop, or None: on if the checkpoint is calibrated.
    "decode-only" has the ratios of "on"; which tokens they are for, the one who prunes knows.
    Raises UserError for other settings, and for any but "off" without a calibration.
    """
    if setting is None:
        return {} if table is None else table.layer_ratios()
    is_share = isinstance(setting, int | float) and not isinstance(setting, bool)
    if not is_share and setting not in MODES:
        raise UserError(
            f'pruning is {setting!r}, allowed are "on", "off", "{DECODE_ONLY}" and a share such as '
            "0.15"
        )
    if setting == "off":
        return {}
    if table is None:
        raise UserError(
            f"pruning is {setting!r}, but the checkpoint is not calibrated for it: run "
            "`mcmoe calibrate-pruning <folder> --text <file>` first"
        )
    return table.layer_ratios(float(setting) if is_share else None)  # type: ignore[arg-type]
