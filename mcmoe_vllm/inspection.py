"""What a compressed checkpoint holds, and whether it holds what its config.json says.

    folder -> inspect_checkpoint -> Inspection (bits, bytes, parameters)

Only headers are read. With check=True every byte is: hashes against the manifest, values of
scales and zeros against docs/FORMAT.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mcmoe_kernels.formats import FORMATS
from mcmoe_vllm.checkpoint.files import Checkpoint, TensorInfo, open_checkpoint, read_config
from mcmoe_vllm.checkpoint.format import DENSE_WIDTH, EXPERT_SCALES, QuantizationConfig
from mcmoe_vllm.checkpoint.sizes import size
from mcmoe_vllm.checkpoint.verification import Pair, wrong_content
from mcmoe_vllm.errors import UserError, some
from mcmoe_vllm.model.architectures import Architecture, find_architecture
from mcmoe_vllm.widths import average_width, bits_per_weight, code_bits, count_matrices, in_words

ROUTER = "gate.weight"  # of every supported architecture, in the MoE block
OWN_SUFFIXES = (".weight_packed", ".weight_scale", ".qweight", ".scales")


@dataclass(frozen=True)
class Inspection:
    """The content of a checkpoint, recomputed from its tensors.

    layers: decoder layers with routed experts; bits: layer -> (widths of w13, widths of w2);
    expert_bytes: codes, scales and zeros of routed experts; dense_bytes: int4 linears with their
    scales; other_bytes: everything else, 16 bits; expert_parameters, parameters: of the original
    model, dropped experts included; checked: whether hashes and values were verified.
    """

    path: Path
    architecture: str
    config: QuantizationConfig
    layers: tuple[int, ...]
    bits: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]]
    expert_bytes: int
    dense_bytes: int
    other_bytes: int
    expert_parameters: int
    parameters: int
    num_shards: int
    checked: bool

    @property
    def num_experts(self) -> int:
        return self.config.num_experts

    @property
    def total_bytes(self) -> int:
        return self.expert_bytes + self.dense_bytes + self.other_bytes

    def pairs(self) -> dict[int, list[tuple[int, int]]]:
        """Layer -> for every expert the width of gate and up, and that of down."""
        return {layer: list(zip(w13, w2, strict=True)) for layer, (w13, w2) in self.bits.items()}

    @property
    def code_bits(self) -> float:
        """Bits per routed expert weight, codes alone."""
        return average_width(pair for row in self.pairs().values() for pair in row)

    @property
    def expert_bits(self) -> float:
        """True bits per routed expert weight: scales and zeros counted."""
        return bits_per_weight(self.expert_bytes, self.expert_parameters)

    @property
    def model_bits(self) -> float:
        """True bits per weight of the whole model."""
        return bits_per_weight(self.total_bytes, self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """What `mcmoe inspect --json` prints."""
        pairs = [pair for row in self.pairs().values() for pair in row]
        return {
            "schema_version": 1,
            "path": str(self.path),
            "architecture": self.architecture,
            "layers": list(self.layers),
            "num_experts": self.num_experts,
            "bits": {
                str(layer): {"w13": list(w13), "w2": list(w2)}
                for layer, (w13, w2) in self.bits.items()
            },
            "matrices": {str(width): n for width, n in count_matrices(pairs).items()},
            "average_bits": {
                "codes": self.code_bits,
                "experts": self.expert_bits,
                "model": self.model_bits,
            },
            "bytes": {
                "experts": self.expert_bytes,
                "dense": self.dense_bytes,
                "other": self.other_bytes,
                "total": self.total_bytes,
            },
            "parameters": {"experts": self.expert_parameters, "model": self.parameters},
            "shards": self.num_shards,
            "checked": self.checked,
            "quantization_config": self.config.to_dict(),
        }


@dataclass(frozen=True)
class _Promised:
    """What a config.json says that a checkpoint holds.

    hidden, width: the sizes of an expert; experts: matrices of routed experts; linears: prefix of
    every linear of attention and shared experts -> whether it is int4.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    config: QuantizationConfig
    hidden: int
    width: int
    experts: list[Pair]
    linears: Mapping[str, bool]

    def int4_pairs(self) -> list[Pair]:
        """The int4 linears that are sound."""
        group_size = self.config.group_size["dense"]
        return [
            _int4_pair(self.checkpoint, prefix, group_size)
            for prefix, is_int4 in self.linears.items()
            if is_int4 and not _wrong_int4(self.checkpoint, prefix, group_size)
        ]


def inspect_checkpoint(path: str | os.PathLike[str], check: bool = False) -> Inspection:
    """Read the headers of a compressed checkpoint and compare them with its config.json.

    check: also verify sizes and SHA-256 of shards and tensors against the manifest, and that
    scales and zeros have values that docs/FORMAT.md allows.
    Raises UserError for what `open_checkpoint` refuses, for a checkpoint that is not compressed,
    and for tensors that contradict the config or the manifest: all of them are listed.
    """
    promised = _read_promises(open_checkpoint(path))
    wrong = [line for _, find in CHECKS for line in find(promised)]
    if wrong:
        raise UserError(
            f"{promised.checkpoint.path} contradicts its config.json in "
            f"{_counted(len(wrong), 'place')}:{some(wrong)}\n"
            "Download the checkpoint again, or compress the model anew"
        )
    if check:
        stored = [*promised.experts, *promised.int4_pairs()]
        wrong = list(wrong_content(promised.checkpoint, stored))
        if wrong:
            raise UserError(
                f"{promised.checkpoint.path} is damaged, {_counted(len(wrong), 'check')} failed:"
                f"{some(wrong)}\nDownload the checkpoint again"
            )
    return _summarize(promised, check)


def print_inspection(inspection: Inspection) -> None:
    """The result on stdout: totals, then the widths of every layer, coloured on a terminal."""
    from rich.console import Console

    from mcmoe_vllm.pruning.table import read_table
    from mcmoe_vllm.report.tables import widths_table

    console = Console(highlight=False)
    lines = _totals(inspection)
    pruning = read_table(inspection.config)
    last = None
    if pruning is not None:
        lines.append(
            f"online pruning: {pruning.target_drop:.1%} of expert activations, rule "
            f"{pruning.rule}; calibrated up to {max(pruning.ratios):.1%}"
        )
        ratios = pruning.layer_ratios()
        last = "drop below", {i: f"{ratios.get(i, 0.0):.3f}" for i in inspection.layers}
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    console.print(widths_table(inspection.pairs(), last))


def _totals(i: Inspection) -> list[str]:
    attention = "int4" if i.config.dense_bits == DENSE_WIDTH else "16 bits"
    nominal = i.config.average_bits.get("nominal")
    target = "" if nominal is None else f" (asked for {nominal:g})"
    return [
        f"{i.path}",
        f"{i.architecture}: {len(i.layers)} layers x {i.num_experts} experts, "
        f"{i.parameters:,} parameters, format version {i.config.format_version}",
        f"bits per expert weight: {i.code_bits:.3f} nominal{target}, {i.expert_bits:.3f} true "
        f"(scales and zeros counted); whole model {i.model_bits:.3f}",
        f"size: {size(i.total_bytes)} in {_counted(i.num_shards, 'shard')}: experts "
        f"{size(i.expert_bytes)}, dense linears in int4 {size(i.dense_bytes)}, "
        f"the rest in 16 bits {size(i.other_bytes)}",
        f"group size: {', '.join(f'{k} {v}' for k, v in i.config.group_size.items())}; "
        f"attention and shared experts: {attention}",
    ]


def _read_promises(checkpoint: Checkpoint) -> _Promised:
    architecture = find_architecture(checkpoint.config)
    config = read_config(checkpoint)
    hidden, width = _read_sizes(checkpoint, architecture, config)
    return _Promised(
        checkpoint=checkpoint,
        architecture=architecture,
        config=config,
        hidden=hidden,
        width=width,
        experts=list(_expert_pairs(architecture, config, hidden, width)),
        linears=dict(_linears(checkpoint, architecture, config)),
    )


def _summarize(promised: _Promised, checked: bool) -> Inspection:
    checkpoint, config = promised.checkpoint, promised.config
    int4 = promised.int4_pairs()
    expert_bytes, dense_bytes = (
        sum(checkpoint.tensors[name].nbytes for pair in pairs for name in (pair.codes, pair.scales))
        for pairs in (promised.experts, int4)
    )
    layers = tuple(sorted(config.expert_bits))
    expert_parameters = len(layers) * config.num_experts * 3 * promised.hidden * promised.width
    stored = _stored_names([*promised.experts, *int4])
    rest = [t for name, t in checkpoint.tensors.items() if name not in stored]
    return Inspection(
        path=checkpoint.path,
        architecture=promised.architecture.name,
        config=config,
        layers=layers,
        bits={layer: (config.bits(layer, "w13"), config.bits(layer, "w2")) for layer in layers},
        expert_bytes=expert_bytes,
        dense_bytes=dense_bytes,
        other_bytes=checkpoint.nbytes - expert_bytes - dense_bytes,
        expert_parameters=expert_parameters,
        parameters=expert_parameters
        + sum(pair.rows * pair.columns for pair in int4)
        + sum(torch.Size(t.shape).numel() for t in rest),
        num_shards=len({t.shard for t in checkpoint.tensors.values()}),
        checked=checked,
    )


def _read_sizes(
    checkpoint: Checkpoint, architecture: Architecture, config: QuantizationConfig
) -> tuple[int, int]:
    """Hidden size and expert width, which every shape follows from."""
    wrong, found = [], {}
    keys = ("hidden_size", "num_hidden_layers", architecture.expert_width, architecture.num_experts)
    for key in keys:
        value = checkpoint.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            wrong.append(f"{key} is {value!r}, needs an integer from 1")
        else:
            found[key] = value
    told = found.get("num_hidden_layers", 0)
    if told > len(checkpoint.tensors):  # a sane bound for the loops over layers
        wrong.append(f"num_hidden_layers is {told}, there are {len(checkpoint.tensors)} tensors")
    experts = found.get(architecture.num_experts)
    if experts is not None and experts != config.num_experts:
        wrong.append(
            f"{architecture.num_experts} is {experts}, quantization_config has widths of "
            f"{config.num_experts} experts"
        )
    beyond = [i for i in sorted(config.expert_bits) if i >= found.get("num_hidden_layers", i + 1)]
    if beyond:
        wrong.append(f"expert_bits has layers {beyond}, num_hidden_layers ends before them")
    for projection, key in (("w13", "hidden_size"), ("w2", architecture.expert_width)):
        if found.get(key, 0) % config.group_size[projection]:
            wrong.append(
                f"{key} is {found[key]}, no multiple of the group size "
                f"{config.group_size[projection]} of {projection}"
            )
    if wrong:
        raise UserError(f"{checkpoint.path / 'config.json'} is not usable:{some(wrong)}")
    return found["hidden_size"], found[architecture.expert_width]


def _expert_pairs(
    architecture: Architecture, config: QuantizationConfig, hidden: int, width: int
) -> Iterator[Pair]:
    """What config.json promises of the routed experts; nothing for a dropped one."""
    for layer in sorted(config.expert_bits):
        widths = zip(config.bits(layer, "w13"), config.bits(layer, "w2"), strict=True)
        for expert, (bits13, bits2) in enumerate(widths):
            gate, up, down = architecture.expert_weights(layer, expert)
            for name, rows, columns, bits, projection in (
                (gate, width, hidden, bits13, "w13"),
                (up, width, hidden, bits13, "w13"),
                (down, hidden, width, bits2, "w2"),
            ):
                if bits:
                    yield Pair(
                        f"{name}_packed",
                        f"{name}_scale",
                        rows,
                        columns,
                        bits,
                        config.group_size[projection],
                    )


def _linears(
    checkpoint: Checkpoint, architecture: Architecture, config: QuantizationConfig
) -> Iterator[tuple[str, bool]]:
    """Prefix of every linear of attention and shared experts, and whether it should be int4."""
    int4 = config.dense_modules if config.dense_bits == DENSE_WIDTH else ()
    for layer in range(_num_layers(checkpoint)):
        for linear in _linear_names(architecture):
            if linear.startswith("mlp.") and layer not in config.expert_bits:
                continue  # a layer without routed experts has no shared expert
            prefix = f"model.layers.{layer}.{_on_disk(architecture, linear)}"
            yield prefix, linear.split(".")[-2] in int4


# The checks, in the order in which offenders are listed


def _wrong_layers(promised: _Promised) -> Iterator[str]:
    """Layers whose router and widths do not go together."""
    routers = {
        layer
        for layer in range(_num_layers(promised.checkpoint))
        if f"model.layers.{layer}.{promised.architecture.block}.{ROUTER}" in promised.checkpoint
    }
    expected = set(promised.config.expert_bits)
    for i in sorted(routers - expected):
        yield f"layer {i} has a router but no widths in expert_bits"
    for i in sorted(expected - routers):
        yield f"layer {i} has widths in expert_bits but no router"


def _wrong_experts(promised: _Promised) -> Iterator[str]:
    for pair in promised.experts:
        yield from _wrong_codes(promised.checkpoint, pair)
        yield from _wrong_scales(promised.checkpoint, pair, promised.config.format_version)


def _wrong_codes(checkpoint: Checkpoint, pair: Pair) -> Iterator[str]:
    codes = checkpoint.tensors.get(pair.codes)
    shape = (pair.rows, pair.columns * code_bits(pair.bits) // 8)
    if codes is None:
        yield f"{pair.codes} is missing, config says {in_words(pair.bits)}"
    elif codes.dtype != "U8" or codes.shape != shape:
        held = codes.shape[1] * 8 / pair.columns if len(codes.shape) == 2 else 0
        known = codes.shape[:1] == (pair.rows,) and held in FORMATS
        guess = f" ({in_words(int(held))})" if known else ""
        yield (
            f"{pair.codes} is {_describe(codes)}{guess}, config says U8 {list(shape)} "
            f"({in_words(pair.bits)})"
        )


def _wrong_scales(checkpoint: Checkpoint, pair: Pair, version: int) -> Iterator[str]:
    scales = checkpoint.tensors.get(pair.scales)
    dtype, per_group = EXPERT_SCALES[version]
    shape = (pair.rows, per_group * pair.columns // pair.group_size)
    if scales is None:
        yield f"{pair.scales} is missing"
    elif scales.dtype != dtype or scales.shape != shape:
        yield (
            f"{pair.scales} is {_describe(scales)}, needs {dtype} {list(shape)} "
            f"(group size {pair.group_size})"
        )


def _wrong_modules(promised: _Promised) -> Iterator[str]:
    """Modules with int4 linears that the architecture lacks."""
    known = promised.architecture.dense
    if promised.config.dense_bits == DENSE_WIDTH:
        for name in promised.config.dense_modules:
            if name not in known:
                yield (
                    f"dense_modules names {name!r}, {promised.architecture.name} has "
                    f"{', '.join(known)}"
                )


def _wrong_linears(promised: _Promised) -> Iterator[str]:
    """Linears of attention and shared experts that are not as the config says."""
    for prefix, is_int4 in promised.linears.items():
        if is_int4:
            group_size = promised.config.group_size["dense"]
            yield from _wrong_int4(promised.checkpoint, prefix, group_size)
        else:
            yield from _wrong_16_bits(promised.checkpoint, prefix)


def _wrong_16_bits(checkpoint: Checkpoint, prefix: str) -> Iterator[str]:
    if f"{prefix}.weight" not in checkpoint:
        yield f"{prefix}.weight is missing"
    for name in (f"{prefix}.qweight", f"{prefix}.scales"):
        if name in checkpoint:
            yield f"{name} belongs to an int4 linear, config says 16 bits"


def _wrong_int4(checkpoint: Checkpoint, prefix: str, group_size: int) -> list[str]:
    weight, qweight, scales = (f"{prefix}.{s}" for s in ("weight", "qweight", "scales"))
    wrong = []
    if weight in checkpoint:
        wrong.append(f"{weight} is there, config says int4 ({qweight})")
    absent = [f"{name} is missing" for name in (qweight, scales) if name not in checkpoint]
    if absent:
        return wrong + absent
    codes, scale = checkpoint.tensors[qweight], checkpoint.tensors[scales]
    if codes.dtype != "I32" or len(codes.shape) != 2:
        return [*wrong, f"{qweight} is {_describe(codes)}, needs I32 [columns/8, rows]"]
    pair = _int4_pair(checkpoint, prefix, group_size)
    shape = (pair.columns // group_size, pair.rows)
    if pair.columns % group_size:
        wrong.append(
            f"{qweight} has {pair.columns} columns, no multiple of the group size {group_size}"
        )
    elif scale.dtype != "F16" or scale.shape != shape:
        wrong.append(
            f"{scales} is {_describe(scale)}, needs F16 {list(shape)} (group size {group_size})"
        )
    return wrong


def _int4_pair(checkpoint: Checkpoint, prefix: str, group_size: int) -> Pair:
    words, rows = checkpoint.tensors[f"{prefix}.qweight"].shape
    names = f"{prefix}.qweight", f"{prefix}.scales"
    return Pair(*names, rows, 8 * words, DENSE_WIDTH, group_size)


def _unexpected(promised: _Promised) -> Iterator[str]:
    """Tensors of experts, or of this format, that the config knows nothing of."""
    architecture = promised.architecture
    expected = _stored_names([*promised.experts, *promised.int4_pairs()])
    # What is wrong with these is already said, in other words.
    said = {
        f"{_on_disk(architecture, linear)}{suffix}"
        for linear in _linear_names(architecture)
        for suffix in (".qweight", ".scales")
    }
    for name in promised.checkpoint.tensors:
        if name in expected or name.split(".", 3)[-1] in said:
            continue
        if architecture.is_routed_expert(name):
            yield f"{name} is not expected: its expert has 0 bits or no place in expert_bits"
        elif name.endswith(OWN_SUFFIXES):
            yield f"{name} is not expected: config names no such int4 linear"


CHECKS: tuple[tuple[str, Callable[[_Promised], Iterator[str]]], ...] = (
    ("routers and widths are in the same layers", _wrong_layers),
    ("experts have the widths that the config says", _wrong_experts),
    ("the architecture has the modules that are int4", _wrong_modules),
    ("linears are int4 or 16 bits as the config says", _wrong_linears),
    ("nothing else of this format is there", _unexpected),
)


def _linear_names(architecture: Architecture) -> Iterator[str]:
    return (name for group in architecture.dense_linears for name in group)


def _on_disk(architecture: Architecture, linear: str) -> str:
    return linear.replace("mlp.", f"{architecture.block}.", 1)


def _stored_names(pairs: list[Pair]) -> set[str]:
    return {name for pair in pairs for name in (pair.codes, pair.scales)}


def _num_layers(checkpoint: Checkpoint) -> int:
    return int(checkpoint.config["num_hidden_layers"])


def _describe(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
