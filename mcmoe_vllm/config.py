"""The values that travel between the steps and into config.json, and every check on them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mcmoe_vllm.errors import UserError

QUANT_METHOD = "mcmoe"
FORMAT_VERSION = 2
PLAN_VERSION = 1
# format_version -> dtype of an expert's weight_scale, and its numbers for each group of columns
EXPERT_SCALES = {1: ("F16", 2), 2: ("I16", 1)}
CANDIDATE_BITS = (0, 1, 2, 3, 4)
GROUP_SIZES = (32, 64, 128)
DENSE_BITS = (4, 16)
PROJECTION_GROUPS = ("w13", "w2", "dense")


def read_json(path: str | os.PathLike[str]) -> Any:
    """A JSON file's content. Raises UserError if it is missing, no UTF-8 or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, a JSON file is needed") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8: {e}") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not valid JSON: {e}") from None
    except RecursionError:
        raise UserError(f"{path} is not usable JSON: it is nested too deeply") from None


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON beside `path`, flush it to the disk and rename: never half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


@dataclass(frozen=True)
class QuantizationConfig:
    """`quantization_config` of an mcmoe checkpoint (docs/FORMAT.md).

    group_size: columns that share a scale, per projection group ("w13", "w2", "dense").
    expert_bits: decoder layer -> (widths of w13, widths of w2), a digit per expert; 0 = dropped.
    dense_bits: 4 (symmetric int4) or 16 (untouched).
    dense_modules: parents of the int4 linears, such as "self_attn".
    pruning: None, or the table of online pruning.
    average_bits: nominal, expert and model bits per weight (report only).
    recipe: how the checkpoint was made (report only).

    Raises UserError listing every field that is out of range.
    """

    group_size: Mapping[str, int]
    expert_bits: Mapping[int, tuple[str, str]]
    dense_bits: int = 16
    dense_modules: tuple[str, ...] = ()
    pruning: Mapping[str, Any] | None = None
    average_bits: Mapping[str, float] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        wrong = []
        if set(self.group_size) != set(PROJECTION_GROUPS):
            wrong.append(f"group_size has {sorted(self.group_size)}, needs {PROJECTION_GROUPS}")
        for name, size in self.group_size.items():
            if size not in GROUP_SIZES:
                wrong.append(f"group_size of {name} is {size}, allowed are {GROUP_SIZES}")
        if self.dense_bits not in DENSE_BITS:
            wrong.append(f"dense_bits is {self.dense_bits}, allowed are {DENSE_BITS}")
        if self.dense_bits == 4 and not self.dense_modules:
            wrong.append("dense_bits is 4 but dense_modules is empty")
        if not self.expert_bits:
            wrong.append("expert_bits is empty")
        lengths = set()
        for layer, widths in self.expert_bits.items():
            if len(widths) != 2:
                wrong.append(f"layer {layer} has {len(widths)} strings of widths, needs 2")
            for digits in widths:
                lengths.add(len(digits))
                if not digits or set(digits) - set("01234"):
                    wrong.append(f"layer {layer} has widths {digits!r}, allowed digits are 0 to 4")
            if len(widths) == 2 and any((a == "0") != (b == "0") for a, b in zip(*widths)):  # noqa: B905
                wrong.append(f"layer {layer} drops an expert in w13 or w2 alone")
        if len(lengths) > 1:
            wrong.append(f"layers have different numbers of experts: {sorted(lengths)}")
        if wrong:
            raise UserError("quantization_config is not valid:\n  - " + "\n  - ".join(wrong))

    @property
    def num_experts(self) -> int:
        return len(next(iter(self.expert_bits.values()))[0])

    def bits(self, layer: int, projection: str) -> tuple[int, ...]:
        """Width of each expert of a layer; projection is "w13" or "w2"."""
        return tuple(int(d) for d in self.expert_bits[layer][("w13", "w2").index(projection)])

    def widths(self, projection: str) -> tuple[int, ...]:
        """The widths that occur in any layer; projection is "w13" or "w2"."""
        side = ("w13", "w2").index(projection)
        digits = {d for strings in self.expert_bits.values() for d in strings[side]}
        return tuple(sorted(map(int, digits)))

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of config.json, including `quant_method`."""
        value = asdict(self)
        value["expert_bits"] = {str(i): list(w) for i, w in self.expert_bits.items()}
        value["dense_modules"] = list(self.dense_modules)
        return {"quant_method": QUANT_METHOD, **value}

    @classmethod
    def from_dict(cls, value: Any) -> QuantizationConfig:
        """The inverse of `to_dict`.

        Raises UserError for another quant_method, a newer format_version, or missing, unknown
        or mistyped fields.
        """
        if not isinstance(value, Mapping):
            raise UserError(f"quantization_config is {type(value).__name__}, needs an object")
        value = dict(value)
        method = value.pop("quant_method", None)
        if method != QUANT_METHOD:
            raise UserError(f"quant_method is {method!r}, an mcmoe checkpoint has {QUANT_METHOD!r}")
        _check_version(value.get("format_version"), "this checkpoint", FORMAT_VERSION)
        known = set(cls.__dataclass_fields__)
        missing = sorted({"group_size", "expert_bits"} - set(value))
        unknown = sorted(set(value) - known)
        if missing or unknown:
            raise UserError(
                "quantization_config "
                + "; ".join(
                    f"{word} {', '.join(names)}"
                    for word, names in (("lacks", missing), ("has unknown fields", unknown))
                    if names
                )
            )
        mistyped = _mistyped_fields(value)
        if mistyped:
            raise UserError(
                "quantization_config has mistyped fields:\n  - " + "\n  - ".join(mistyped)
            )
        value["expert_bits"] = {int(layer): tuple(w) for layer, w in value["expert_bits"].items()}
        value["dense_modules"] = tuple(value.get("dense_modules", ()))
        return cls(**value)


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
        total = sum(2 * w13 + w2 for row in self.pairs() for w13, w2 in row)
        return total / (3 * len(self.bits) * self.num_experts)

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
        _check_version(value.get("format_version", 1), source, PLAN_VERSION)
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


def _check_version(version: Any, source: str, newest: int) -> None:
    if not _is_integer(version) or version < 1:
        raise UserError(f"{source}: format_version is {version!r}, needs an integer from 1")
    if version > newest:
        raise UserError(
            f"{source} has format_version {version}, this mcmoe-vllm reads up to {newest}: "
            f"upgrade with pip install -U mcmoe-vllm"
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mistyped_fields(value: Mapping[str, Any]) -> list[str]:
    """Fields of a raw `quantization_config` whose JSON type is wrong, a sentence each."""
    wrong = []

    def need(name: str, good: Callable[[Any], bool], what: str) -> None:
        if name in value and not good(value[name]):
            wrong.append(f"{name} is {value[name]!r:.80}, needs {what}")

    def is_object_of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda v: isinstance(v, Mapping) and all(good(entry) for entry in v.values())

    def is_strings(v: Any) -> bool:
        return isinstance(v, list | tuple) and all(isinstance(entry, str) for entry in v)

    need("group_size", is_object_of(_is_integer), "an object of integers")
    need("dense_bits", _is_integer, "an integer")
    need("dense_modules", is_strings, "a list of strings")
    need("pruning", lambda v: v is None or isinstance(v, Mapping), "null or an object")
    need(
        "average_bits",
        is_object_of(lambda v: _is_integer(v) or isinstance(v, float)),
        "an object of numbers",
    )
    need("recipe", lambda v: isinstance(v, Mapping), "an object")
    need("expert_bits", lambda v: isinstance(v, Mapping), "an object")
    if isinstance(value["expert_bits"], Mapping):
        for layer, widths in value["expert_bits"].items():
            # "03" would silently stand for the same layer as "3".
            if not (isinstance(layer, str) and re.fullmatch(r"0|[1-9][0-9]{0,8}", layer)):
                wrong.append(f"expert_bits has layer {layer!r}, needs the number of a layer")
            if not (is_strings(widths) and len(widths) == 2):
                wrong.append(
                    f"expert_bits of layer {layer} is {widths!r:.80}, needs a list of 2 strings"
                )
    return wrong


def check_candidate_bits(bits: Sequence[int]) -> list[str]:
    """What is wrong with a set of candidate widths, a sentence each."""
    wrong = []
    if not bits or not set(bits) - {0}:
        wrong.append(f"candidate bits {list(bits)} hold no width above 0")
    if len(set(bits)) != len(bits):
        wrong.append(f"candidate bits {list(bits)} repeat a width")
    bad = [b for b in bits if b not in CANDIDATE_BITS]
    if bad:
        wrong.append(f"candidate bits {bad} are not among {CANDIDATE_BITS}")
    return wrong
