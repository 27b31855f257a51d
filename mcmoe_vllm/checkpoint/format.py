"""The format of a compressed checkpoint: names of files, `quantization_config`, and its checks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mcmoe_kernels.formats import packing
from mcmoe_vllm.checkpoint.pruning_table import PruningTable
from mcmoe_vllm.disk import check_version, is_integer, is_number
from mcmoe_vllm.errors import UserError, some
from mcmoe_vllm.limits import DENSE_BITS, GROUP_SIZES, PROJECTION_GROUPS
from mcmoe_vllm.widths import candidate_bits

QUANT_METHOD = "mcmoe"
FORMAT_VERSION = 2  # of a checkpoint that needs no other
NEWEST_VERSION = 3  # that is read; written where experts have biases or clamp what they multiply
# format_version -> dtype of an expert's weight_scale, and its numbers for each group of columns
EXPERT_SCALES = {1: ("F16", 2), 2: ("I16", 1), 3: ("I16", 1)}


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
    pruning: PruningTable | None = None
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
                if not digits or set(digits) - set(map(str, candidate_bits())):
                    wrong.append(
                        f"layer {layer} has widths {digits!r}, allowed digits are 0 to "
                        f"{candidate_bits()[-1]}"
                    )
            if len(widths) == 2 and any((a == "0") != (b == "0") for a, b in zip(*widths)):  # noqa: B905
                wrong.append(f"layer {layer} drops an expert in w13 or w2 alone")
        if len(lengths) > 1:
            wrong.append(f"layers have different numbers of experts: {sorted(lengths)}")
        if self.pruning is not None:
            strange = sorted(set(self.pruning.layers) ^ set(self.expert_bits))
            if strange:
                wrong.append(
                    f"pruning and expert_bits disagree on layers {strange}: the folder mixes two "
                    "checkpoints; calibrate again with `mcmoe calibrate-pruning`"
                )
        if wrong:
            raise UserError(f"quantization_config is not valid:{some(wrong)}")

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
        value["pruning"] = None if self.pruning is None else self.pruning.to_dict()
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
        check_version(value.get("format_version"), "this checkpoint", NEWEST_VERSION)
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
            raise UserError(f"quantization_config has mistyped fields:{some(mistyped)}")
        if value.get("pruning") is not None:
            value["pruning"] = PruningTable.from_dict(value["pruning"])
        value["expert_bits"] = {int(layer): tuple(w) for layer, w in value["expert_bits"].items()}
        value["dense_modules"] = tuple(value.get("dense_modules", ()))
        return cls(**value)


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

    need("group_size", is_object_of(is_integer), "an object of integers")
    need("dense_bits", is_integer, "an integer")
    need("dense_modules", is_strings, "a list of strings")
    need("pruning", lambda v: v is None or isinstance(v, Mapping), "null or an object")
    need("average_bits", is_object_of(is_number), "an object of numbers")
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


INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MANIFEST_FILE = "mcmoe_manifest.json"
MANIFEST_VERSION = 2


def stored_scale(tensor: torch.Tensor, bits: int, name: str) -> torch.Tensor:
    """An expert's weight_scale as format version 2 stores it: int16 [N, K/G].

    tensor: that, or the float16 [N, 2*K/G] of version 1. Raises UserError, naming the tensor, for
    what does not fit into version 2.
    """
    if tensor.dtype != torch.float16:
        return tensor
    try:
        return packing.upgrade_scale(tensor, bits)
    except ValueError as e:
        raise UserError(
            f"{name} of format version 1 cannot be read: {e}. Compress the model again."
        ) from None


DENSE_WIDTH = 4
