"""The plan: the width of every expert, and what it was decided on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from string import digits
from typing import Any

from mcmoe_vllm.disk import check_version, is_integer, is_number
from mcmoe_vllm.errors import UserError, some
from mcmoe_vllm.limits import DENSE_BITS, GROUP_SIZES, PROJECTION_GROUPS
from mcmoe_vllm.widths import average_width, candidate_bits

PLAN_VERSION = 2


@dataclass(frozen=True)
class Plan:
    """The width of every expert, and what it was decided on.

    layers: decoder layers with experts; bits[row][expert]: widths, a row per entry of `layers`;
    w2_bits: those of the down projections, empty where `bits` holds for all three.
    group_size: columns that share a scale, by kind of matrix. options: the settings of the
    measurement and the allocation (report only).
    """

    model: str
    architecture: str
    layers: tuple[int, ...]
    bits: tuple[tuple[int, ...], ...]
    candidate_bits: tuple[int, ...]
    group_size: Mapping[str, int]
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
        if set(self.group_size) != set(PROJECTION_GROUPS):
            wrong.append(f"group_size has {sorted(self.group_size)}, needs {PROJECTION_GROUPS}")
        wrong += [
            f"group_size of {kind} is {size}, allowed are {GROUP_SIZES}"
            for kind, size in self.group_size.items()
            if size not in GROUP_SIZES
        ]
        if self.dense_bits not in DENSE_BITS:
            wrong.append(f"dense_bits is {self.dense_bits}, allowed are {DENSE_BITS}")
        if not is_number(self.nominal_bits):
            wrong.append(f"nominal_bits is {self.nominal_bits!r}, needs a number")
        for name in ("model", "architecture"):
            if not isinstance(getattr(self, name), str):
                wrong.append(f"{name} is {getattr(self, name)!r}, needs a string")
        if not isinstance(self.options, Mapping):
            wrong.append(f"options is {self.options!r}, needs an object")
        if wrong:
            raise UserError(f"the plan is not valid:{some(wrong)}")

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
        value = {**asdict(self), "group_size": dict(self.group_size)}
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
                f"{source} is no plan: missing {sorted(missing)}, unknown {sorted(unknown)[:10]}"
            )
        check_version(value.get("format_version", 1), source, PLAN_VERSION)
        if mistyped := _mistyped(value):
            raise UserError(f"{source} is no valid plan:{some(mistyped)}")
        sizes = value["group_size"]  # version 1 had one for all
        value = {
            **value,
            "group_size": same_group_size(sizes) if is_integer(sizes) else sizes,
            "format_version": PLAN_VERSION,
        }
        rows = {name: tuple(map(_widths, value.get(name, ()))) for name in ("bits", "w2_bits")}
        lists = {name: tuple(value[name]) for name in ("layers", "candidate_bits")}
        try:
            return cls(**{**value, **rows, **lists})
        except UserError as e:
            raise UserError(f"{source}: {e}") from None


def same_group_size(size: int) -> dict[str, int]:
    """One for all kinds of matrices."""
    return dict.fromkeys(PROJECTION_GROUPS, size)


def check_candidate_bits(bits: Any) -> list[str]:
    """What is wrong with a set of candidate widths, a sentence each."""
    if not (isinstance(bits, list | tuple) and all(map(is_integer, bits))):
        return [f"candidate bits are {bits!r:.60}, needs a list of whole numbers"]
    wrong = []
    if not bits or not set(bits) - {0}:
        wrong.append(f"candidate bits {list(bits)} hold no width above 0")
    if len(set(bits)) != len(bits):
        wrong.append(f"candidate bits {list(bits)} repeat a width")
    bad = [b for b in bits if b not in candidate_bits()]
    if bad:
        wrong.append(f"candidate bits {bad} are not among {candidate_bits()}")
    return wrong


def _mistyped(value: Mapping[str, Any]) -> list[str]:
    """Fields of a raw plan whose JSON type is wrong, a sentence each; nothing is converted."""

    def is_rows(rows: Any) -> bool:
        return isinstance(rows, list | tuple) and all(_widths(row) is not None for row in rows)

    needs: dict[str, tuple[Callable[[Any], bool], str]] = {
        "model": (lambda v: isinstance(v, str), "a string"),
        "architecture": (lambda v: isinstance(v, str), "a string"),
        "layers": (_is_integers, "a list of the numbers of layers"),
        "bits": (is_rows, "a list of rows of digits"),
        "w2_bits": (is_rows, "a list of rows of digits"),
        "candidate_bits": (_is_integers, "a list of whole numbers"),
        "group_size": (_is_sizes, f"a whole number for each of {', '.join(PROJECTION_GROUPS)}"),
        "dense_bits": (is_integer, "a whole number"),
        "nominal_bits": (is_number, "a number"),
        "options": (lambda v: isinstance(v, Mapping), "an object"),
    }
    return [
        f"{name} is {value[name]!r:.60}, needs {what}"
        for name, (good, what) in needs.items()
        if name in value and not good(value[name])
    ]


def _is_sizes(value: Any) -> bool:
    members = value.values() if isinstance(value, Mapping) else [value]
    return all(map(is_integer, members))


def _is_integers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(is_integer, value))


def _widths(row: Any) -> tuple[int, ...] | None:
    """A row of a plan's file, a digit an expert or a list of widths; None for anything else."""
    if isinstance(row, str) and set(row) <= set(digits):
        return tuple(map(int, row))
    return tuple(row) if _is_integers(row) else None
