"""The output folder: everything besides the layers' shards, and its move into place."""

from __future__ import annotations

import errno
import filecmp
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mcmoe_kernels.formats import packing
from mcmoe_vllm import __version__
from mcmoe_vllm.checkpoint.format import DENSE_WIDTH, QuantizationConfig
from mcmoe_vllm.checkpoint.manifest import write_manifest
from mcmoe_vllm.checkpoint.side_files import copy_side_files
from mcmoe_vllm.checkpoint.sizes import Sizes, size
from mcmoe_vllm.checkpoint.writing import write_index
from mcmoe_vllm.compress.expected_loss import matrix_costs, summarize_costs
from mcmoe_vllm.compress.measure import PROBE_TOKENS
from mcmoe_vllm.compress.options import PLAN_TRAITS, QuantizeOptions, named_traits
from mcmoe_vllm.compress.workdirectory import WorkDirectory
from mcmoe_vllm.disk import explain_os_errors, flush_folder, is_partial, replacing, write_json
from mcmoe_vllm.errors import UserError, count
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
        copied = copy_side_files(source.path, folder, summary.options.trust_remote_code)
        quantization = _quantization_config(summary).to_dict()
        write_json(folder / "config.json", {**source.config, "quantization_config": quantization})
        write_json(folder / "plan.json", plan.to_dict())
        write_heatmap(plan, folder / "allocation.png")
        licences = [name for name in copied.names if "LICEN" in name.upper() and "/" not in name]
        name = Path(summary.options.output).absolute().name
        licence = next(iter(licences), None)
        write_model_card(folder, name, report, plan, summary.sizes, licence)
    return {**report, "left_out": list(copied.left_out)}


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
    plan = summary.plan
    dense = summary.model.layout.dense if plan.dense_bits == DENSE_WIDTH else ()
    rows = zip(plan.layers, plan.bits, plan.w2_bits or plan.bits, strict=True)
    return QuantizationConfig(
        group_size=plan.group_size,
        expert_bits={
            layer: ("".join(map(str, w13)), "".join(map(str, w2))) for layer, w13, w2 in rows
        },
        dense_bits=plan.dense_bits if dense else 16,  # a family may have no linear to take
        dense_modules=dense,
        average_bits={name: round(value, 4) for name, value in summary.average_bits.items()},
        recipe=summary.recipe,
        format_version=summary.model.layout.format_version,
    )


def _report(folder: Path, summary: Summary) -> dict[str, Any]:
    """report.json, but for what is known last."""
    options, model, layers = summary.options, summary.model, summary.layers
    pairs = [pair for row in summary.plan.pairs() for pair in row]
    return {
        "schema_version": 1,
        "mcmoe_version": __version__,
        "model": options.model,
        "architecture": model.name,
        "average_bits": summary.average_bits,
        "matrices": {str(w): n for w, n in count_matrices(pairs).items()},
        "bytes": {
            "original": model.checkpoint.on_disk.nbytes,
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
        2 * packing.packed_bytes(width, hidden, w13, group["w13"])
        + packing.packed_bytes(hidden, width, w2, group["w2"])
        for row in plan.pairs()
        for w13, w2 in row
    )
    return Sizes(
        original_bytes=model.checkpoint.on_disk.nbytes,
        expert_bytes=expert_bytes,
        other_bytes=_other_bytes(model, plan.dense_bits, group["dense"]),
        expert_parameters=len(plan.layers) * model.num_experts * 3 * hidden * width,
        parameters=model.checkpoint.num_parameters,
    )


def _other_bytes(model: Outline, dense_bits: int, group_size: int) -> int:
    """Bytes of what is no expert."""
    dense: set[str] = set()
    if dense_bits == DENSE_WIDTH:
        for layer in range(model.num_layers):
            dense |= set(model.layout.dense_weights(layer))
    total = 0
    for name, info in model.checkpoint.tensors.items():
        if name in dense:
            rows, columns = info.shape
            total += rows * columns // 2 + rows * (columns // group_size) * 2
        elif not model.layout.is_routed_expert(name):
            total += info.nbytes
    return total


def needed_bytes(
    outline: Outline,
    dtype: torch.dtype,
    windows: torch.Tensor,
    options: QuantizeOptions,
    plan: Plan | None,
) -> tuple[int, int]:
    """Bytes of the checkpoint, and of the states that are kept on the way; as far as the options
    tell as long as there is no plan. dtype: of the states; windows: tokens [S, L]."""
    hidden = outline.hidden_size
    of_token = hidden * dtype.itemsize
    states = 2 * windows.numel() * of_token  # of both models
    if plan is not None:
        return count_sizes(outline, plan).total_bytes, 2 * states  # of a layer and of the next
    probes = len(outline.moe_layers) * min(PROBE_TOKENS, windows.numel()) * of_token
    weights = len(outline.moe_layers) * outline.num_experts * 3 * hidden * outline.expert_width
    group = options.group_sizes
    overhead = 16 * (2 / group["w13"] + 1 / group["w2"]) / 3
    expert_bytes = int(weights * (options.bits + overhead) / 8)
    other_bytes = _other_bytes(outline, options.dense_bits, group["dense"])
    return expert_bytes + other_bytes, 2 * max(states, states // 2 + probes)


def require_free_space(folder: Path, needed: int, output: Path, output_bytes: int) -> None:
    """Raises UserError if a job's folder, or its output on another disk, will not have room."""
    needs = [(folder, needed - _written(folder))]
    if _disk(output) != _disk(folder):
        needs.append((output, output_bytes))
    for path, least in needs:
        free = shutil.disk_usage(_existing(path)).free
        if free < least:
            raise UserError(
                f"the disk of {path} has {size(free)} free, the job needs {size(least)}; make "
                "room, or choose another disk with --output or --work-dir"
            )


def _written(folder: Path) -> int:
    files = (f for pattern in ("checkpoint/*", "hidden/*") for f in folder.glob(pattern))
    return sum(file.stat().st_size for file in files)


def _existing(path: Path) -> Path:
    return path if path.exists() else path.parent


def _disk(path: Path) -> int:
    return _existing(path).stat().st_dev


def move_into_place(work: WorkDirectory, output: Path) -> None:
    """The finished checkpoint, from the work directory to the output folder.

    One that does not exist appears at once, if it is on the same disk. Else it is filled file by
    file, config.json last: a folder without that is no model to anybody, and the job that left it
    can be resumed. What lies in the folder and is not the job's is never touched.
    """
    if work.job.moving is None:
        found = (file for file in work.checkpoint.rglob("*") if file.is_file())
        names = sorted(file.relative_to(work.checkpoint).as_posix() for file in found)
        work.note_moving(output, sorted(names, key=lambda name: name == "config.json"))
    job = work.job
    if job.moving != str(output):
        raise UserError(
            f"the output was being moved to {job.moving} when the job was stopped; give that as "
            "--output again"
        )
    with explain_os_errors(f"writing {output}"):
        if not output.exists() and not _move(work.checkpoint, output):
            output.mkdir()
        if work.checkpoint.exists():
            _fill(work.checkpoint, output, job.files)
        if lost := [name for name in job.files if not (output / name).exists()]:
            raise UserError(f"{output} lacks {count(lost, 'file')} that the job had moved there")
        flush_folder(output)
        flush_folder(output.parent)


def _fill(source: Path, output: Path, names: Sequence[str]) -> None:
    for name in names:
        file, target = source / name, output / name
        if not file.exists():
            continue  # moved before the job was stopped
        target.parent.mkdir(parents=True, exist_ok=True)
        for other in target.parent.iterdir():
            if is_partial(other.name, target.name):
                other.unlink()  # half copied before the job was stopped
        if target.exists():
            if not filecmp.cmp(file, target, shallow=False):
                raise UserError(f"{target} is there already; remove it, then add --resume")
            file.unlink()  # copied before the job was stopped
            continue
        if not _move(file, target):
            with replacing(target) as partial:
                shutil.copyfile(file, partial)
            file.unlink()
    for folder in sorted((f for f in source.rglob("*") if f.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def _move(source: Path, target: Path) -> bool:
    """Rename; whether it could be, as on one disk."""
    try:
        source.rename(target)
    except OSError as e:
        if e.errno != errno.EXDEV:
            raise
        return False
    return True
