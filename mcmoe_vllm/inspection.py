"""What a compressed checkpoint holds, and whether it holds what its config.json says.

    folder -> inspect_checkpoint -> Inspection (bits, bytes, parameters)

Only headers are read. With check=True every byte is: hashes against the manifest, values of
scales and zeros against docs/FORMAT.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mcmoe_kernels.formats import WIDTHS
from mcmoe_vllm.checkpoint.files import Checkpoint, TensorInfo, open_checkpoint, read_config
from mcmoe_vllm.checkpoint.format import EXPERT_SCALES, QuantizationConfig
from mcmoe_vllm.checkpoint.verification import Pair, wrong_content
from mcmoe_vllm.errors import UserError, some
from mcmoe_vllm.model.architectures import Architecture, find_architecture

DENSE_WIDTH = 4


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

    @property
    def code_bits(self) -> float:
        """Bits per routed expert weight, codes alone."""
        # w13 has twice the weights of w2.
        total = sum(2 * sum(w13) + sum(w2) for w13, w2 in self.bits.values())
        return total / (3 * len(self.layers) * self.num_experts)

    @property
    def expert_bits(self) -> float:
        """True bits per routed expert weight: scales and zeros counted."""
        return 8 * self.expert_bytes / self.expert_parameters

    @property
    def model_bits(self) -> float:
        """True bits per weight of the whole model."""
        return 8 * self.total_bytes / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """What `mcmoe inspect --json` prints."""
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


def inspect_checkpoint(path: str | os.PathLike[str], check: bool = False) -> Inspection:
    """Read the headers of a compressed checkpoint and compare them with its config.json.

    check: also verify sizes and SHA-256 of shards and tensors against the manifest, and that
    scales and zeros have values that docs/FORMAT.md allows.
    Raises UserError for what `open_checkpoint` refuses, for a checkpoint that is not compressed,
    and for tensors that contradict the config or the manifest: all of them are listed.
    """
    checkpoint = open_checkpoint(path)
    architecture = find_architecture(checkpoint.config)
    config = read_config(checkpoint)
    hidden, width = _read_sizes(checkpoint, architecture, config)
    experts = list(_expert_pairs(architecture, config, hidden, width))
    dense, wrong = _dense_pairs(checkpoint, architecture, config)
    wrong = [
        *_wrong_layers(checkpoint, architecture, config),
        *(
            line
            for pair in experts
            for line in _wrong_expert(checkpoint, pair, config.format_version)
        ),
        *wrong,
        *_unexpected(checkpoint, architecture, [*experts, *dense]),
    ]
    if wrong:
        raise UserError(
            f"{checkpoint.path} contradicts its config.json in {len(wrong)} places:"
            f"{some(wrong)}\nDownload the checkpoint again, or compress the model anew"
        )
    if check:
        wrong = list(wrong_content(checkpoint, [*experts, *dense]))
        if wrong:
            raise UserError(
                f"{checkpoint.path} is damaged, {len(wrong)} checks failed:"
                f"{some(wrong)}\nDownload the checkpoint again"
            )
    expert_bytes, dense_bytes = (
        sum(checkpoint.tensors[name].nbytes for pair in pairs for name in (pair.codes, pair.scales))
        for pairs in (experts, dense)
    )
    layers = tuple(sorted(config.expert_bits))
    expert_parameters = len(layers) * config.num_experts * 3 * hidden * width
    stored = {name for pair in (*experts, *dense) for name in (pair.codes, pair.scales)}
    rest = [t for name, t in checkpoint.tensors.items() if name not in stored]
    return Inspection(
        path=checkpoint.path,
        architecture=architecture.name,
        config=config,
        layers=layers,
        bits={layer: (config.bits(layer, "w13"), config.bits(layer, "w2")) for layer in layers},
        expert_bytes=expert_bytes,
        dense_bytes=dense_bytes,
        other_bytes=checkpoint.nbytes - expert_bytes - dense_bytes,
        expert_parameters=expert_parameters,
        parameters=expert_parameters
        + sum(pair.rows * pair.columns for pair in dense)
        + sum(torch.Size(t.shape).numel() for t in rest),
        num_shards=len({t.shard for t in checkpoint.tensors.values()}),
        checked=check,
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


def _wrong_layers(
    checkpoint: Checkpoint, architecture: Architecture, config: QuantizationConfig
) -> list[str]:
    """Layers whose router and widths do not go together."""
    routers = {
        layer
        for layer in range(_num_layers(checkpoint))
        if f"model.layers.{layer}.{architecture.block}.{ROUTER}" in checkpoint
    }
    expected = set(config.expert_bits)
    return [
        *(
            f"layer {i} has a router but no widths in expert_bits"
            for i in sorted(routers - expected)
        ),
        *(f"layer {i} has widths in expert_bits but no router" for i in sorted(expected - routers)),
    ]


def _wrong_expert(checkpoint: Checkpoint, pair: Pair, version: int) -> list[str]:
    wrong = []
    rows, columns = pair.rows, pair.columns
    codes = checkpoint.tensors.get(pair.codes)
    shape = (rows, columns * pair.bits // 8)
    if codes is None:
        wrong.append(f"{pair.codes} is missing, config says {pair.bits} bits")
    elif codes.dtype != "U8" or codes.shape != shape:
        held = codes.shape[1] * 8 / columns if len(codes.shape) == 2 else 0
        guess = f" ({held:g} bits)" if codes.shape[:1] == (rows,) and held in WIDTHS else ""
        wrong.append(
            f"{pair.codes} is {_describe(codes)}{guess}, config says U8 {list(shape)} "
            f"({pair.bits} bits)"
        )
    scales = checkpoint.tensors.get(pair.scales)
    dtype, per_group = EXPERT_SCALES[version]
    shape = (rows, per_group * columns // pair.group_size)
    if scales is None:
        wrong.append(f"{pair.scales} is missing")
    elif scales.dtype != dtype or scales.shape != shape:
        wrong.append(
            f"{pair.scales} is {_describe(scales)}, needs {dtype} {list(shape)} "
            f"(group size {pair.group_size})"
        )
    return wrong


def _dense_pairs(
    checkpoint: Checkpoint, architecture: Architecture, config: QuantizationConfig
) -> tuple[list[Pair], list[str]]:
    """The int4 linears that are sound, and what is wrong with the other dense linears."""
    quantized = config.dense_modules if config.dense_bits == DENSE_WIDTH else ()
    group_size = config.group_size["dense"]
    pairs: list[Pair] = []
    wrong = [
        f"dense_modules names {name!r}, {architecture.name} has {', '.join(architecture.dense)}"
        for name in quantized
        if name not in architecture.dense
    ]
    for layer in range(_num_layers(checkpoint)):
        for linear in (name for group in architecture.dense_linears for name in group):
            if linear.startswith("mlp.") and layer not in config.expert_bits:
                continue  # a dense layer has no shared expert
            on_disk = linear.replace("mlp.", f"{architecture.block}.", 1)
            prefix = f"model.layers.{layer}.{on_disk}"
            weight, qweight, scales = (f"{prefix}.{s}" for s in ("weight", "qweight", "scales"))
            if linear.split(".")[-2] not in quantized:
                if weight not in checkpoint:
                    wrong.append(f"{weight} is missing")
                wrong += [
                    f"{name} belongs to an int4 linear, config says 16 bits"
                    for name in (qweight, scales)
                    if name in checkpoint
                ]
                continue
            if weight in checkpoint:
                wrong.append(f"{weight} is there, config says int4 ({qweight})")
            absent = [f"{n} is missing" for n in (qweight, scales) if n not in checkpoint]
            if absent:
                wrong += absent
                continue
            codes, scale = checkpoint.tensors[qweight], checkpoint.tensors[scales]
            if codes.dtype != "I32" or len(codes.shape) != 2:
                wrong.append(f"{qweight} is {_describe(codes)}, needs I32 [columns/8, rows]")
                continue
            columns, rows = 8 * codes.shape[0], codes.shape[1]
            if columns % group_size:
                wrong.append(
                    f"{qweight} has {columns} columns, no multiple of the group size {group_size}"
                )
                continue
            shape = (columns // group_size, rows)
            if scale.dtype != "F16" or scale.shape != shape:
                wrong.append(
                    f"{scales} is {_describe(scale)}, needs F16 {list(shape)} "
                    f"(group size {group_size})"
                )
                continue
            pairs.append(Pair(qweight, scales, rows, columns, DENSE_WIDTH, group_size))
    return pairs, wrong


def _unexpected(checkpoint: Checkpoint, architecture: Architecture, pairs: list[Pair]) -> list[str]:
    """Tensors of experts, or of this format, that the config knows nothing of."""
    expected = {name for pair in pairs for name in (pair.codes, pair.scales)}
    dense = {
        f"{linear.replace('mlp.', f'{architecture.block}.', 1)}{suffix}"
        for group in architecture.dense_linears
        for linear in group
        for suffix in (".qweight", ".scales")
    }
    return [
        f"{name} is not expected: its expert has 0 bits or no place in expert_bits"
        if architecture.is_routed_expert(name)
        else f"{name} is not expected: config names no such int4 linear"
        for name in checkpoint.tensors
        if name not in expected
        and (architecture.is_routed_expert(name) or name.endswith(OWN_SUFFIXES))
        # What is wrong with these is already said, in other words.
        and name.split(".", 3)[-1] not in dense
    ]


def _num_layers(checkpoint: Checkpoint) -> int:
    return int(checkpoint.config["num_hidden_layers"])


def _describe(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"
