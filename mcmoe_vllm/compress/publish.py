"""The output folder: everything besides the layers' shards, and its move into place."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcmoe_kernels.formats import packing
from mcmoe_vllm import __version__
from mcmoe_vllm.checkpoint.format import DENSE_WIDTH, QuantizationConfig
from mcmoe_vllm.checkpoint.sizes import Sizes, size
from mcmoe_vllm.checkpoint.writing import copy_side_files, shard_name, side_files, write_index
from mcmoe_vllm.compress.expected_loss import matrix_costs, summarize_costs
from mcmoe_vllm.compress.options import PLAN_TRAITS, named_traits
from mcmoe_vllm.compress.workdirectory import WorkDirectory
from mcmoe_vllm.disk import explain_os_errors, write_json
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.architectures import dense_weight
from mcmoe_vllm.model.memory import peak_rss_bytes
from mcmoe_vllm.plan import Plan
from mcmoe_vllm.report.card import write_model_card
from mcmoe_vllm.report.plots import write_heatmap

if TYPE_CHECKING:
    from mcmoe_vllm.compress.job import Job


def publish(
    job: Job,
    work: WorkDirectory,
    chosen: Plan,
    sizes: Sizes,
    layers: list[dict[str, Any]],
    started: float,
) -> dict[str, Any]:
    """Everything of the output folder besides the layers' shards."""
    folder, options = work.checkpoint, job.options
    shards = [shard_name(i + 1, job.model.num_layers + 1) for i in range(job.model.num_layers + 1)]
    job.progress.say("hashing and writing the index")
    write_index(folder, shards)
    average = {
        "nominal": chosen.nominal_bits,
        "codes": chosen.average_bits(),
        "experts": sizes.expert_bits,
        "model": sizes.model_bits,
    }
    group = chosen.group_size
    known = (*PLAN_TRAITS, "solver", "pins", "calibration", "samples", "sequence_length", "seed")
    decided = {n: chosen.options[n] for n in known if chosen.options.get(n) is not None}
    recipe = {**named_traits(options.traits), **decided, "mcmoe_version": __version__}
    quantization = QuantizationConfig(
        group_size={"w13": group, "w2": group, "dense": group},
        expert_bits={
            layer: ("".join(map(str, w13)), "".join(map(str, w2)))
            for layer, w13, w2 in zip(
                chosen.layers, chosen.bits, chosen.w2_bits or chosen.bits, strict=True
            )
        },
        dense_bits=chosen.dense_bits,
        dense_modules=job.architecture.dense if chosen.dense_bits == DENSE_WIDTH else (),
        average_bits={name: round(value, 4) for name, value in average.items()},
        recipe=recipe,
    )
    result = {
        "schema_version": 1,
        "mcmoe_version": __version__,
        "model": options.model,
        "architecture": job.architecture.name,
        "average_bits": average,
        "bytes": {
            "original": job.checkpoint.nbytes,
            "compressed": sum((folder / s).stat().st_size for s in shards),
            "experts": sizes.expert_bytes,
        },
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "device": str(job.model.device),
        "calibration": {
            "source": options.calibration,
            "samples": job.windows.shape[0],
            "sequence_length": job.windows.shape[1],
            "seed": options.seed,
        },
        "layers": layers,
        "starved_experts": {
            str(entry["layer"]): entry["experts"]["starved"]
            for entry in layers
            if entry.get("experts", {}).get("starved")
        },
        "sensitivity": summarize_costs(matrix_costs(chosen)),
        "recipe": recipe,
        "plan": chosen.to_dict(),
    }
    with explain_os_errors(f"writing {folder}"):
        copy_side_files(job.checkpoint.path, folder, options.trust_remote_code)
        write_json(
            folder / "config.json",
            {**job.checkpoint.config, "quantization_config": quantization.to_dict()},
        )
        write_json(folder / "plan.json", chosen.to_dict())
        write_json(folder / "report.json", result)
        write_heatmap(chosen, folder / "allocation.png")
        licences = [f.name for f in side_files(job.checkpoint.path) if "LICEN" in f.name.upper()]
        write_model_card(folder, result, chosen, sizes, bool(licences))
    return result


def size_table(job: Job, chosen: Plan) -> Sizes:
    hidden, width, group = job.hidden_size, job.expert_width, chosen.group_size
    expert_bytes = sum(
        2 * packing.packed_bytes(width, hidden, w13, group)
        + packing.packed_bytes(hidden, width, w2, group)
        for row in chosen.pairs()
        for w13, w2 in row
    )
    expert_parameters = len(chosen.layers) * job.num_experts * 3 * hidden * width
    other_bytes = 0
    dense = {
        dense_weight(job, layer, name)
        for layer in range(job.model.num_layers)
        for group_ in job.architecture.dense_linears
        for name in group_
        if chosen.dense_bits == DENSE_WIDTH
    }
    for name, info in job.checkpoint.tensors.items():
        if name in dense:
            rows, columns = info.shape
            other_bytes += rows * columns // 2 + rows * (columns // group) * 2
        elif not job.architecture.is_routed_expert(name):
            other_bytes += info.nbytes
    return Sizes(
        original_bytes=job.checkpoint.nbytes,
        expert_bytes=expert_bytes,
        other_bytes=other_bytes,
        expert_parameters=expert_parameters,
        parameters=job.checkpoint.num_parameters,
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
