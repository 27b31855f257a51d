"""What a compressed checkpoint holds, and whether it holds what its config.json says.

    folder -> inspect_checkpoint -> Inspection (bits, bytes, parameters)

Only headers are read. With check=True every byte is: hashes against the manifest, values of
scales and zeros against docs/FORMAT.md.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mcmoe_kernels import packing
from mcmoe_vllm import report
from mcmoe_vllm.checkpoint import (
    INDEX_FILE,
    MANIFEST_FILE,
    Checkpoint,
    TensorInfo,
    explain_os_errors,
    file_sha256,
    open_checkpoint,
    read_manifest,
    tensor_sha256,
)
from mcmoe_vllm.config import EXPERT_SCALES, QUANT_METHOD, QuantizationConfig, read_json
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.models import Architecture, find_architecture
from mcmoe_vllm.pruning import read_table

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


@dataclass(frozen=True)
class _Pair:
    """Two tensors that store one matrix [rows, columns]: codes and scales.

    bits: width of the codes; group_size: columns that share a scale.
    """

    codes: str
    scales: str
    rows: int
    columns: int
    bits: int
    group_size: int


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
            f"{report.some(wrong)}\nDownload the checkpoint again, or compress the model anew"
        )
    if check:
        wrong = list(_wrong_content(checkpoint, [*experts, *dense]))
        if wrong:
            raise UserError(
                f"{checkpoint.path} is damaged, {len(wrong)} checks failed:"
                f"{report.some(wrong)}\nDownload the checkpoint again"
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


def print_inspection(inspection: Inspection) -> None:
    """The result on stdout: totals, then the widths of every layer, coloured on a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    i = inspection
    console = Console(highlight=False)
    dense = "int4" if i.config.dense_bits == DENSE_WIDTH else "16 bits"
    nominal = i.config.average_bits.get("nominal")
    target = "" if nominal is None else f" (asked for {nominal:g})"
    lines = [
        f"{i.path}",
        f"{i.architecture}: {len(i.layers)} layers x {i.num_experts} experts, "
        f"{i.parameters:,} parameters, format version {i.config.format_version}",
        f"bits per expert weight: {i.code_bits:.3f} nominal{target}, {i.expert_bits:.3f} true "
        f"(scales and zeros counted); whole model {i.model_bits:.3f}",
        f"size: {report.size(i.total_bytes)} in {i.num_shards} shards: experts "
        f"{report.size(i.expert_bytes)}, dense linears in int4 {report.size(i.dense_bytes)}, "
        f"the rest in 16 bits {report.size(i.other_bytes)}",
        f"group size: {', '.join(f'{k} {v}' for k, v in i.config.group_size.items())}; "
        f"attention and shared experts: {dense}",
    ]
    pruning = read_table(i.config)
    ratios = {} if pruning is None else pruning.layer_ratios()
    if pruning is not None:
        lines.append(
            f"online pruning: {pruning.target_drop:.1%} of expert activations, rule "
            f"{pruning.rule}; calibrated up to {max(pruning.ratios):.1%}"
        )
    console.print("\n".join(lines), markup=False, soft_wrap=True)

    def heatmap(widths: tuple[int, ...]) -> Text:
        text = Text(overflow="fold")
        for b in widths:
            # Black is the terminal's own colour: a dropped expert needs an edge to be seen.
            colour = "grey23" if b == 0 else report.WIDTH_COLOURS[b]
            text.append(str(b), style=f"bold {'black' if b in (2, 3) else 'white'} on {colour}")
        return text

    differ = any(w13 != w2 for w13, w2 in i.bits.values())
    used = sorted({b for w13, w2 in i.bits.values() for b in (*w13, *w2)})
    table = Table()
    table.add_column("layer", justify="right")
    for name in ("w13 ", "w2 ") if differ else ("",):
        table.add_column(f"{name}experts 0..{i.num_experts - 1}", overflow="fold")
    for b in used:
        table.add_column(f"{b}-bit", justify="right")
    table.add_column("average", justify="right")
    if pruning is not None:
        table.add_column("drop below", justify="right")
    for layer, (w13, w2) in i.bits.items():
        counts = Counter(w13) + Counter(w2)  # half an expert each
        table.add_row(
            str(layer),
            *(heatmap(widths) for widths in ((w13, w2) if differ else (w13,))),
            *(f"{counts[b] / 2:g}" for b in used),
            f"{(2 * sum(w13) + sum(w2)) / (3 * len(w13)):.3f}",
            *([f"{ratios.get(layer, 0.0):.3f}"] if pruning is not None else []),
        )
    console.print(table)


def read_config(checkpoint: Checkpoint) -> QuantizationConfig:
    raw = checkpoint.config.get("quantization_config")
    if raw is None:
        raise UserError(
            f"{checkpoint.path} is not compressed: its config.json has no quantization_config. "
            f"Compress it with: mcmoe quantize {checkpoint.path} -o FOLDER"
        )
    method = raw.get("quant_method") if isinstance(raw, dict) else None
    if isinstance(method, str) and method != QUANT_METHOD:
        raise UserError(
            f"{checkpoint.path} was compressed by another tool (quant_method {method!r}, an mcmoe "
            f"checkpoint has {QUANT_METHOD!r}). Compress the original 16-bit model with: "
            "mcmoe quantize MODEL -o FOLDER"
        )
    try:
        return QuantizationConfig.from_dict(raw)
    except UserError as e:
        raise UserError(f"{checkpoint.path / 'config.json'}: {e}") from None


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
        raise UserError(f"{checkpoint.path / 'config.json'} is not usable:{report.some(wrong)}")
    return found["hidden_size"], found[architecture.expert_width]


def _expert_pairs(
    architecture: Architecture, config: QuantizationConfig, hidden: int, width: int
) -> Iterator[_Pair]:
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
                    yield _Pair(
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


def _wrong_expert(checkpoint: Checkpoint, pair: _Pair, version: int) -> list[str]:
    wrong = []
    rows, columns = pair.rows, pair.columns
    codes = checkpoint.tensors.get(pair.codes)
    shape = (rows, columns * pair.bits // 8)
    if codes is None:
        wrong.append(f"{pair.codes} is missing, config says {pair.bits} bits")
    elif codes.dtype != "U8" or codes.shape != shape:
        held = codes.shape[1] * 8 / columns if len(codes.shape) == 2 else 0
        guess = f" ({held:g} bits)" if codes.shape[:1] == (rows,) and held in (1, 2, 3, 4) else ""
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
) -> tuple[list[_Pair], list[str]]:
    """The int4 linears that are sound, and what is wrong with the other dense linears."""
    quantized = config.dense_modules if config.dense_bits == DENSE_WIDTH else ()
    group_size = config.group_size["dense"]
    pairs: list[_Pair] = []
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
            pairs.append(_Pair(qweight, scales, rows, columns, DENSE_WIDTH, group_size))
    return pairs, wrong


def _unexpected(
    checkpoint: Checkpoint, architecture: Architecture, pairs: list[_Pair]
) -> list[str]:
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


def _wrong_content(checkpoint: Checkpoint, pairs: list[_Pair]) -> Iterator[str]:
    """Every shard and tensor against the manifest, every scale and zero against the format."""
    yield from _wrong_index(checkpoint)
    manifest = read_manifest(checkpoint.path)
    shards, tensors = manifest["shards"], manifest["tensors"]
    by_shard: dict[str, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        by_shard.setdefault(info.shard, []).append(name)
    yield from (
        f"{name} is in {MANIFEST_FILE} alone" for name in sorted(set(shards) - set(by_shard))
    )
    yield from (
        f"{name} is in {MANIFEST_FILE} alone"
        for name in sorted(set(tensors) - set(checkpoint.tensors))
    )
    scales = {pair.scales: pair for pair in pairs}
    for shard, names in sorted(by_shard.items()):
        file = checkpoint.path / shard
        expected = shards.get(shard)
        if expected is None:
            yield f"{shard} is not in {MANIFEST_FILE}"
        elif file.stat().st_size != expected["bytes"]:
            yield f"{shard} has {file.stat().st_size} bytes, the manifest says {expected['bytes']}"
        elif file_sha256(file) != expected["sha256"]:
            yield f"{shard} has another SHA-256 than the manifest says"
        with explain_os_errors(f"reading {file}"), safe_open(file, framework="pt") as f:
            for name in names:
                tensor = f.get_tensor(name)
                if name not in tensors:
                    yield f"{name} is not in {MANIFEST_FILE}"
                elif tensor_sha256(tensor) != tensors[name]:
                    yield f"{name} has another SHA-256 than the manifest says"
                if name in scales:
                    yield from _wrong_values(tensor, scales[name])


def _wrong_index(checkpoint: Checkpoint) -> list[str]:
    """What the weight index leaves out; `open_checkpoint` has checked what it does say."""
    if not (checkpoint.path / INDEX_FILE).exists():
        return [f"{INDEX_FILE} is missing"]
    index = read_json(checkpoint.path / INDEX_FILE)
    wrong = [
        f"{n} is not in {INDEX_FILE}" for n in checkpoint.tensors if n not in index["weight_map"]
    ]
    told = index["metadata"].get("total_size") if isinstance(index.get("metadata"), dict) else None
    if told != checkpoint.nbytes:
        wrong.append(f"{INDEX_FILE} has total_size {told}, the tensors take {checkpoint.nbytes}")
    return wrong


def _wrong_values(tensor: torch.Tensor, pair: _Pair) -> Iterator[str]:
    """tensor: `weight_scale` of an expert (float16 in version 1) or `scales` of a linear."""
    scale, zero = tensor.float(), None
    if pair.codes.endswith(".weight_packed"):
        if tensor.dtype == torch.float16:
            scale, zero = scale[:, ::2], scale[:, 1::2]
        else:
            scale, zero = packing.unpack_scale(tensor, pair.bits)
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bad.any():
        yield f"{pair.scales} has {int(bad.sum())} scales that are not finite and positive"
    for dtype in (torch.bfloat16, torch.float16):
        inexact = ~bad & (scale.to(dtype).float() != scale)
        if inexact.any():
            name = str(dtype).removeprefix("torch.")
            yield f"{pair.scales} has {int(inexact.sum())} scales that {name} cannot hold"
    if zero is None:
        return
    if pair.bits == 1:
        bad, allowed = zero != 0.5, "0.5"
    else:
        most = (1 << pair.bits) - 1
        steps = 2 if pair.bits == 2 else 1
        # A comparison with NaN is false: written so that NaN is bad.
        bad = ~((zero >= 0) & (zero <= most) & (steps * zero == (steps * zero).round()))
        allowed = f"multiples of 0.5 in 0..{most}" if steps == 2 else f"integers 0..{most}"
    if bad.any():
        yield (
            f"{pair.scales} has {int(bad.sum())} zeros out of range, allowed at {pair.bits} bits: "
            f"{allowed}"
        )


def _num_layers(checkpoint: Checkpoint) -> int:
    return int(checkpoint.config["num_hidden_layers"])


def _describe(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"
