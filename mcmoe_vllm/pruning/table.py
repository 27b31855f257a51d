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
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mcmoe_kernels.pruning import Measure, beside_largest, pair_counts, prune
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.limits import MAX_DROP

# --additional-config '{"mcmoe": {"pruning": ...}}'
OPTION, SWITCH = "mcmoe", "pruning"


RULES = ("sensitivity", "median")
DECODE_ONLY = "decode-only"
MODES = ("off", "on", DECODE_ONLY)


@dataclass(frozen=True)
class PruningTable:
    """`pruning` in a checkpoint's quantization_config (docs/FORMAT.md).

    rule: "sensitivity" (least measured KL) or "median" (the paper's).
    target_drop: share of expert activations that is dropped unless the launch says otherwise.
    ratios: for each calibrated share, a ratio for each layer of `layers`, ascending by share.
    renormalize: whether the weights that stay are scaled up to the sum of all.

    Raises UserError listing every field that is out of range.
    """

    rule: str
    target_drop: float
    layers: tuple[int, ...]
    ratios: Mapping[float, tuple[float, ...]]
    renormalize: bool = False

    def __post_init__(self) -> None:
        wrong = []
        if self.rule not in RULES:
            wrong.append(f"rule is {self.rule!r}, allowed are {RULES}")
        if not self.ratios:
            wrong.append("ratios is empty")
        for share, row in self.ratios.items():
            if not 0 <= share <= MAX_DROP:
                wrong.append(f"ratios has the share {share}, allowed are 0 to {MAX_DROP}")
            if len(row) != len(self.layers):
                wrong.append(f"ratios of {share} has {len(row)} layers, needs {len(self.layers)}")
            wrong += [
                f"ratios of {share} has {r}, allowed are 0 to 1" for r in row if not 0 <= r <= 1
            ]
        if list(self.ratios) != sorted(self.ratios):
            wrong.append("ratios is not ascending")
        if self.ratios and not 0 <= self.target_drop <= max(self.ratios):
            wrong.append(f"target_drop is {self.target_drop}, allowed are 0 to {max(self.ratios)}")
        if wrong:
            raise UserError("pruning in config.json is not valid:\n  - " + "\n  - ".join(wrong))

    def layer_ratios(self, target_drop: float | None = None) -> dict[int, float]:
        """The ratio of each layer for a share, between two calibrated ones by interpolation.

        Raises UserError for a share beyond what was calibrated.
        """
        share = self.target_drop if target_drop is None else target_drop
        if not 0 <= share <= max(self.ratios):
            raise UserError(
                f"the share of dropped experts is {share}, calibrated are 0 to "
                f"{max(self.ratios)}; calibrate again with a larger --target-drop"
            )
        points = {0.0: (0.0,) * len(self.layers), **self.ratios}
        below = max(s for s in points if s <= share)
        above = min(s for s in points if s >= share)
        part = 0.0 if above == below else (share - below) / (above - below)
        pairs = zip(points[below], points[above], strict=True)
        row = [low + part * (high - low) for low, high in pairs]
        return dict(zip(self.layers, row, strict=True))

    def to_dict(self) -> dict[str, Any]:
        value = asdict(self)
        value["layers"] = list(self.layers)
        value["ratios"] = {str(share): list(row) for share, row in self.ratios.items()}
        return value

    @classmethod
    def from_dict(cls, value: Any) -> PruningTable:
        """The inverse of `to_dict`. Raises UserError for missing, unknown or mistyped fields."""
        try:
            fields = dict(value)
            fields["layers"] = tuple(int(layer) for layer in fields["layers"])
            fields["ratios"] = {
                float(share): tuple(float(r) for r in row)
                for share, row in fields["ratios"].items()
            }
            fields["target_drop"] = float(fields["target_drop"])
            return cls(**fields)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"pruning in config.json cannot be read ({e!r}); calibrate again with "
                "`mcmoe calibrate-pruning`"
            ) from None


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
    """The table of a checkpoint, None if it is not calibrated.

    Raises UserError if it is broken or is for other layers than the checkpoint's.
    """
    if quantization is None or quantization.pruning is None:
        return None
    table = PruningTable.from_dict(quantization.pruning)
    strange = sorted(set(table.layers) ^ set(quantization.expert_bits))
    if strange:
        raise UserError(
            f"pruning in config.json and expert_bits disagree on layers {strange}: the folder "
            "mixes two checkpoints; calibrate again with `mcmoe calibrate-pruning`"
        )
    return table


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
