"""The plan: the width of every expert, and what it was decided on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mcmoe_vllm.disk import check_version
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.limits import DENSE_BITS, GROUP_SIZES
from mcmoe_vllm.widths import average_width, candidate_bits

PLAN_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """The width of every expert, and what it was decided on.

    layers: decoder layers with experts; bits[row][expert]: widths, a row per entry of `layers`;
    w2_bits: those of the down projections, empty where `bits` holds for all three.
    options: the settings of the measurement and the allocation (report only).
    """

    model: str
    architecture: str
    layers: tuple[int, ...]
    bits: tuple[tuple[int, ...], ...]
    candidate_bits: tuple[int, ...]
    group_size: int
    dense_bits: int
    nominal_bits: float
    w2_bits: tuple[tuple[int, ...], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        wrong = []
        if not self.layers:
            wrong.append("it has no layers")
        if len(set(self.layers)) != len(self.layers):
            wrong.append(f"layers {list(self.layers)} repeat a layer")
        if len(self.layers) != len(self.bits):
            wrong.append(f"{len(self.layers)} layers but {len(self.bits)} rows of bits")
        if len({len(row) for row in self.bits}) > 1:
            wrong.append("rows of bits have different lengths")
        allowed = set(self.candidate_bits)
        for rows in (self.bits, self.w2_bits):
            for layer, row in zip(self.layers, rows, strict=False):
                bad = sorted({b for b in row if b not in allowed})
                if bad:
                    wrong.append(f"layer {layer} has widths {bad}, allowed are {sorted(allowed)}")
        if [len(row) for row in self.w2_bits] not in ([], [len(row) for row in self.bits]):
            wrong.append("w2_bits and bits have rows of different lengths")
        elif any((a == 0) != (b == 0) for row in self.pairs() for a, b in row):
            wrong.append("an expert is dropped in bits or in w2_bits alone")
        wrong += check_candidate_bits(self.candidate_bits)
        if self.group_size not in GROUP_SIZES:
            wrong.append(f"group_size is {self.group_size}, allowed are {GROUP_SIZES}")
        if self.dense_bits not in DENSE_BITS:
            wrong.append(f"dense_bits is {self.dense_bits}, allowed are {DENSE_BITS}")
        if not (isinstance(self.nominal_bits, int | float) and math.isfinite(self.nominal_bits)):
            wrong.append(f"nominal_bits is {self.nominal_bits!r}, needs a number")
        for name in ("model", "architecture"):
            if not isinstance(getattr(self, name), str):
                wrong.append(f"{name} is {getattr(self, name)!r}, needs a string")
        if not isinstance(self.options, Mapping):
            wrong.append(f"options is {self.options!r}, needs an object")
        if wrong:
            raise UserError("the plan is not valid:\n  - " + "\n  - ".join(wrong))

    @property
    def num_experts(self) -> int:
        return len(self.bits[0]) if self.bits else 0

    def average_bits(self) -> float:
        """Mean width over all experts, as the paper counts it: codes alone."""
        return average_width(pair for row in self.pairs() for pair in row)

    def pairs(self) -> list[list[tuple[int, int]]]:
        """For every layer and expert the width of gate and up, and that of the down projection."""
        rows = zip(self.bits, self.w2_bits or self.bits, strict=True)
        return [list(zip(w13, w2, strict=True)) for w13, w2 in rows]

    def to_dict(self) -> dict[str, Any]:
        value = asdict(self)
        for name in ("bits", "w2_bits"):
            value[name] = ["".join(map(str, row)) for row in value[name]]
        if not self.w2_bits:
            del value["w2_bits"]
        return value

    @classmethod
    def from_dict(cls, value: Any, source: str = "plan.json") -> Plan:
        """The inverse of `to_dict`. Raises UserError naming `source`."""
        if not isinstance(value, dict):
            raise UserError(f"{source} is no plan: it holds a {type(value).__name__}")
        required = {
            name
            for name in cls.__dataclass_fields__
            if name not in ("options", "format_version", "w2_bits")
        }
        missing, unknown = required - set(value), set(value) - set(cls.__dataclass_fields__)
        if missing or unknown:
            raise UserError(
                f"{source} is no plan: missing {sorted(missing)}, unknown {sorted(unknown)}"
            )
        check_version(value.get("format_version", 1), source, PLAN_VERSION)
        try:
            return cls(
                **{
                    **value,
                    "layers": tuple(int(i) for i in value["layers"]),
                    **{
                        name: tuple(tuple(int(d) for d in row) for row in value.get(name, ()))
                        for name in ("bits", "w2_bits")
                    },
                    "candidate_bits": tuple(int(b) for b in value["candidate_bits"]),
                }
            )
        except (TypeError, ValueError) as e:
            raise UserError(f"{source} is no valid plan: {e}") from None


def check_candidate_bits(bits: Sequence[int]) -> list[str]:
    """What is wrong with a set of candidate widths, a sentence each."""
    wrong = []
    if not bits or not set(bits) - {0}:
        wrong.append(f"candidate bits {list(bits)} hold no width above 0")
    if len(set(bits)) != len(bits):
        wrong.append(f"candidate bits {list(bits)} repeat a width")
    bad = [b for b in bits if b not in candidate_bits()]
    if bad:
        wrong.append(f"candidate bits {bad} are not among {candidate_bits()}")
    return wrong
