"""The output folder: everything besides the layers' shards, and its move into place."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcmoe_kernels.formats import packing
from mcmoe_vllm import __version__
from mcmoe_vllm.checkpoint.format import DENSE_WIDTH, QuantizationConfig
from mcmoe_vllm.checkpoint.manifest import write_manifest
from mcmoe_vllm.checkpoint.sizes import Sizes, size
from mcmoe_vllm.checkpoint.writing import copy_side_files, side_files, write_index
from mcmoe_vllm.compress.expected_loss import matrix_costs, summarize_costs
from mcmoe_vllm.compress.options import PLAN_TRAITS, QuantizeOptions, named_traits
from mcmoe_vllm.compress.workdirectory import WorkDirectory
from mcmoe_vllm.disk import explain_os_errors, write_json
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.memory import peak_rss_bytes
from mcmoe_vllm.model.moe_model import MoeModel, Outline
from mcmoe_vllm.plan import Plan
from mcmoe_vllm.report.card import write_model_card
from mcmoe_vllm.report.plots import write_heatmap
from mcmoe_vllm.widths import count_matrices


@dataclass(frozen=True)
class Summary:
    """What a finished job is described by. windows: [samples, length] of the calibration; layers:
    what was lost in each."""

    options: QuantizeOptions
    model: MoeModel
    windows: tuple[int, ...]
    plan: Plan
    sizes: Sizes
    layers: list[dict[str, Any]]

    @property
    def average_bits(self) -> dict[str, float]:
        return {
            "nominal": self.plan.nominal_bits,
            "codes": self.plan.average_bits(),
            "experts": self.sizes.expert_bits,
            "model": self.sizes.model_bits,
        }

    @property
    def recipe(self) -> dict[str, Any]:
        """How the checkpoint was made: the traits, and what a given plan had decided of them."""
        known = (*PLAN_TRAITS, "solver", "pins", "calibration", "samples", "sequence_length",
                 "seed")  # fmt: skip
        options = self.plan.options
        decided = {n: options[n] for n in known if options.get(n) is not None}
        return {**named_traits(self.options.traits), **decided, "mcmoe_version": __version__}


def write_output(folder: Path, summary: Summary) -> dict[str, Any]:
    """Everything of the output folder but the layers' shards and what `seal` adds; returns what
    report.json will hold."""
    source, plan = summary.model.checkpoint, summary.plan
    report = _report(folder, summary)
    with explain_os_errors(f"writing {folder}"):
        write_index(folder, _shards(folder))
        copy_side_files(source.path, folder, summary.options.trust_remote_code)
        quantization = _quantization_config(summary).to_dict()
        write_json(folder / "config.json", {**source.config, "quantization_config": quantization})
        write_json(folder / "plan.json", plan.to_dict())
        write_heatmap(plan, folder / "allocation.png")
        licences = [f.name for f in side_files(source.path) if "LICEN" in f.name.upper()]
        name = Path(summary.options.output).absolute().name
        licence = next(iter(licences), None)
        write_model_card(folder, name, report, plan, summary.sizes, licence)
    return report


def seal(folder: Path, report: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Hash the shards, which do not change any more, and write report.json."""
    write_manifest(folder, _shards(folder))
    report = {**report, "seconds": round(seconds, 1), "peak_rss_bytes": peak_rss_bytes()}
    with explain_os_errors(f"writing {folder}"):
        write_json(folder / "report.json", report)
    return report


def _shards(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.safetensors"))


def _quantization_config(summary: Summary) -> QuantizationConfig:
    plan, group = summary.plan, summary.plan.group_size
    rows = zip(plan.layers, plan.bits, plan.w2_bits or plan.bits, strict=True)
    return QuantizationConfig(
        group_size={"w13": group, "w2": group, "dense": group},
        expert_bits={
            layer: ("".join(map(str, w13)), "".join(map(str, w2))) for layer, w13, w2 in rows
        },
        dense_bits=plan.dense_bits,
        dense_modules=summary.model.architecture.dense if plan.dense_bits == DENSE_WIDTH else (),
        average_bits={name: round(value, 4) for name, value in summary.average_bits.items()},
        recipe=summary.recipe,
    )


def _report(folder: Path, summary: Summary) -> dict[str, Any]:
    """report.json, but for what is known last."""
    options, model, layers = summary.options, summary.model, summary.layers
    pairs = [pair for row in summary.plan.pairs() for pair in row]
    return {
        "schema_version": 1,
        "mcmoe_version": __version__,
        "model": options.model,
        "architecture": model.architecture.name,
        "average_bits": summary.average_bits,
        "matrices": {str(w): n for w, n in count_matrices(pairs).items()},
        "bytes": {
            "original": model.checkpoint.nbytes,
            "compressed": sum((folder / s).stat().st_size for s in _shards(folder)),
            "experts": summary.sizes.expert_bytes,
        },
        "device": str(model.device),
        "calibration": {
            "source": options.calibration,
            "samples": summary.windows[0],
            "sequence_length": summary.windows[1],
            "seed": options.seed,
        },
        "layers": layers,
        "starved_experts": {
            str(entry["layer"]): entry["experts"]["starved"]
            for entry in layers
            if entry.get("experts", {}).get("starved")
        },
        "sensitivity": summarize_costs(matrix_costs(summary.plan)),
        "recipe": summary.recipe,
        "plan": summary.plan.to_dict(),
    }


def count_sizes(model: Outline, plan: Plan) -> Sizes:
    """Bytes of the checkpoint that a plan leads to."""
    hidden, width, group = model.hidden_size, model.expert_width, plan.group_size
    expert_bytes = sum(
        2 * packing.packed_bytes(width, hidden, w13, group)
        + packing.packed_bytes(hidden, width, w2, group)
        for row in plan.pairs()
        for w13, w2 in row
    )
    dense: set[str] = set()
    if plan.dense_bits == DENSE_WIDTH:
        for layer in range(model.num_layers):
            dense |= set(model.architecture.dense_weights(layer))
    other_bytes = 0
    for name, info in model.checkpoint.tensors.items():
        if name in dense:
            rows, columns = info.shape
            other_bytes += rows * columns // 2 + rows * (columns // group) * 2
        elif not model.architecture.is_routed_expert(name):
            other_bytes += info.nbytes
    return Sizes(
        original_bytes=model.checkpoint.nbytes,
        expert_bytes=expert_bytes,
        other_bytes=other_bytes,
        expert_parameters=len(plan.layers) * model.num_experts * 3 * hidden * width,
        parameters=model.checkpoint.num_parameters,
    )


def require_free_space(work: WorkDirectory, total_bytes: int) -> None:
    written = sum(f.stat().st_size for f in work.checkpoint.glob("*.safetensors"))
    needed, free = total_bytes - written, shutil.disk_usage(work.path).free
    if free < needed:
        raise UserError(
            f"the disk of {work.path} has {size(free)} free, the checkpoint needs "
            f"{size(needed)}; make room, then add --resume"
        )


def move_into_place(source: Path, target: Path) -> None:
    """Rename a finished folder to its place; across file systems, copy beside it first."""
    with explain_os_errors(f"writing {target}"):
        if os.stat(source).st_dev != os.stat(target.absolute().parent).st_dev:
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            source = partial
        os.replace(source, target)
