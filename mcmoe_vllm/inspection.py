"""What a compressed checkpoint holds, and whether it holds what its config.json says.

    folder -> inspect_checkpoint -> Inspection (bits, bytes, parameters)

Only headers are read. With check=True every byte is: hashes against the manifest, values of
scales and zeros against docs/FORMAT.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcmoe_vllm.checkpoint.files import Checkpoint, open_checkpoint, read_config
from mcmoe_vllm.checkpoint.format import DENSE_WIDTH, QuantizationConfig
from mcmoe_vllm.checkpoint.sizes import size
from mcmoe_vllm.checkpoint.verification import Pair, wrong_content
from mcmoe_vllm.errors import UserError, some
from mcmoe_vllm.model.agreement import (
    PACKED,
    QWEIGHT,
    SCALE,
    SCALES,
    Promise,
    open_layout,
    promised_tensors,
)
from mcmoe_vllm.model.skeleton import Skeleton
from mcmoe_vllm.widths import average_width, bits_per_weight, count_matrices, describe_group_sizes


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


def inspect_checkpoint(path: str | os.PathLike[str], check: bool = False) -> Inspection:
    """Read the headers of a compressed checkpoint and compare them with its config.json.

    check: also verify sizes and SHA-256 of shards and tensors against the manifest, and that
    scales and zeros have values that docs/FORMAT.md allows.
    Raises UserError for what `open_checkpoint` refuses, for a checkpoint that is not compressed,
    and for tensors that contradict the config or the manifest: all of them are listed.
    """
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint)
    layout = open_layout(checkpoint, config)
    pairs = _quantized_pairs(promised_tensors(layout, config))
    if check:
        wrong = list(wrong_content(checkpoint, pairs))
        if wrong:
            raise UserError(
                f"{checkpoint.path} is damaged, {_counted(len(wrong), 'check')} failed:"
                f"{some(wrong)}\nDownload the checkpoint again"
            )
    return _summarize(checkpoint, layout.skeleton, config, pairs, check)


def print_inspection(inspection: Inspection) -> None:
    """The result on stdout: totals, then the widths of every layer, coloured on a terminal."""
    from mcmoe_vllm.pruning.table import read_table
    from mcmoe_vllm.report.console import Console
    from mcmoe_vllm.report.tables import widths_table

    console = Console()
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
        f"group size: {describe_group_sizes(i.config.group_size)}; "
        f"attention and shared experts: {attention}",
    ]


def _quantized_pairs(promised: Mapping[str, Promise]) -> list[Pair]:
    """The codes of every quantized matrix with their scales."""
    return [
        Pair(name, name.removesuffix(codes) + scales, m.rows, m.columns, m.width, m.group_size)
        for name, promise in promised.items()
        for codes, scales in ((PACKED, SCALE), (QWEIGHT, SCALES))
        if name.endswith(codes) and (m := promise.matrix) is not None
    ]


def _summarize(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    config: QuantizationConfig,
    pairs: Sequence[Pair],
    checked: bool,
) -> Inspection:
    def nbytes(kind: str) -> int:
        found = (pair for pair in pairs if pair.codes.endswith(kind))
        return sum(checkpoint.tensors[n].nbytes for p in found for n in (p.codes, p.scales))

    expert_bytes, dense_bytes = nbytes(PACKED), nbytes(QWEIGHT)
    layers = tuple(sorted(config.expert_bits))
    matrix = skeleton.hidden_size * skeleton.expert_width
    expert_parameters = len(layers) * config.num_experts * 3 * matrix
    stored = {name for pair in pairs for name in (pair.codes, pair.scales)}
    rest = [t for name, t in checkpoint.tensors.items() if name not in stored]
    return Inspection(
        path=checkpoint.path,
        architecture=skeleton.architecture.name,
        config=config,
        layers=layers,
        bits={layer: (config.bits(layer, "w13"), config.bits(layer, "w2")) for layer in layers},
        expert_bytes=expert_bytes,
        dense_bytes=dense_bytes,
        other_bytes=checkpoint.nbytes - expert_bytes - dense_bytes,
        expert_parameters=expert_parameters,
        parameters=expert_parameters
        + sum(pair.rows * pair.columns for pair in pairs if pair.codes.endswith(QWEIGHT))
        + sum(math.prod(t.shape) for t in rest),
        num_shards=len({t.shard for t in checkpoint.tensors.values()}),
        checked=checked,
    )


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
