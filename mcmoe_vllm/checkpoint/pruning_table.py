"""`pruning` in a checkpoint's quantization_config: the thresholds of online pruning."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mcmoe_vllm.disk import is_integer, is_number
from mcmoe_vllm.errors import UserError, some
from mcmoe_vllm.limits import MAX_DROP

RULES = ("sensitivity", "median")
REQUIRED = ("rule", "target_drop", "layers", "ratios")
_SHARE = re.compile(r"(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?")


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
        _refuse(list(self._problems()))

    def _problems(self) -> Iterator[str]:
        if self.rule not in RULES:
            yield f"rule is {self.rule!r:.40}, allowed are {RULES}"
        if twice := sorted(layer for layer, n in Counter(self.layers).items() if n > 1):
            yield f"layers repeats {twice}"
        if not self.ratios:
            yield "ratios is empty"
        for share, row in self.ratios.items():
            if not 0 <= share <= MAX_DROP:
                yield f"ratios has the share {share}, allowed are 0 to {MAX_DROP}"
            if len(row) != len(self.layers):
                yield f"ratios of {share} has {len(row)} layers, needs {len(self.layers)}"
            for ratio in row:
                if not 0 <= ratio <= 1:
                    yield f"ratios of {share} has {ratio!r:.40}, allowed are 0 to 1"
        if list(self.ratios) != sorted(self.ratios):
            yield "ratios is not ascending"
        if self.ratios and not 0 <= self.target_drop <= max(self.ratios):
            yield f"target_drop is {self.target_drop!r:.40}, allowed are 0 to {max(self.ratios)}"

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
        """The inverse of `to_dict`: JSON's types are asked for, nothing is converted.

        Raises UserError listing every missing, unknown, mistyped or contradicting field.
        """
        if not isinstance(value, Mapping):
            raise UserError(f"pruning in config.json is {value!r:.40}, needs an object")
        _refuse(list(_mistyped(value)))
        return cls(
            rule=value["rule"],
            target_drop=float(value["target_drop"]),
            layers=tuple(value["layers"]),
            ratios={float(s): tuple(map(float, row)) for s, row in value["ratios"].items()},
            renormalize=value.get("renormalize", False),
        )


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise UserError(
            f"pruning in config.json is not valid:{some(wrong, 10)}\n"
            "Calibrate again with `mcmoe calibrate-pruning`"
        )


def _mistyped(value: Mapping[str, Any]) -> Iterator[str]:
    """Fields of a raw table that are missing, unknown or of another type, a sentence each."""
    for name in REQUIRED:
        if name not in value:
            yield f"{name} is missing"
    known = PruningTable.__dataclass_fields__
    for name in value:
        if name not in known:
            yield f"{name!r:.40} is no field of it"
    needs = {
        "rule": (lambda v: isinstance(v, str), "a string"),
        "target_drop": (is_number, "a number"),
        "layers": (_is_layers, "a list of the numbers of layers"),
        "ratios": (lambda v: isinstance(v, Mapping), "an object"),
        "renormalize": (lambda v: isinstance(v, bool), "true or false"),
    }
    for name, (good, what) in needs.items():
        if name in value and not good(value[name]):
            yield f"{name} is {value[name]!r:.40}, needs {what}"
    ratios = value.get("ratios")
    yield from _mistyped_ratios(ratios) if isinstance(ratios, Mapping) else ()


def _mistyped_ratios(ratios: Mapping[Any, Any]) -> Iterator[str]:
    spelled: dict[float, str] = {}
    for share, row in ratios.items():
        if not (isinstance(share, str) and _SHARE.fullmatch(share)):
            yield f"ratios has the key {share!r:.40}, needs a share such as '0.15'"
        elif (other := spelled.setdefault(float(share), share)) != share:
            yield f"ratios has one share as {other!r:.40} and as {share!r:.40}"
        if not (isinstance(row, list | tuple) and all(map(is_number, row))):
            yield f"ratios of {share!r:.40} is {row!r:.40}, needs a list of numbers"


def _is_layers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(is_integer(v) and 0 <= v < 10**9 for v in value)
