"""The order of the steps: measure -> allocate -> quantize -> publish.

    plan(options)      model + text  -> significance of every layer -> widths       -> plan.json
    quantize(options)  the same, or a given plan -> GPTQ, packing   -> mcmoe checkpoint

Both walk the model one decoder layer at a time and leave what they finished in a work directory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.compress.choose import allocate_sensitivity, measure_and_allocate
from mcmoe_vllm.compress.finetune import finetune
from mcmoe_vllm.compress.job import open_work, prepare, require_plan_fits
from mcmoe_vllm.compress.measure import measure_layers
from mcmoe_vllm.compress.options import QuantizeOptions, recipe_of
from mcmoe_vllm.compress.publish import move_into_place, publish, require_free_space, size_table
from mcmoe_vllm.compress.quantize_layers import quantize_layers
from mcmoe_vllm.compress.significance import LayerSignificance
from mcmoe_vllm.disk import explain_os_errors, read_json, require_parent, write_json
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.loaded import load_streamed
from mcmoe_vllm.plan import Plan
from mcmoe_vllm.pruning.calibration import PRUNING_WINDOWS, calibrate_pruning, store_table
from mcmoe_vllm.report.progress import Progress
from mcmoe_vllm.report.tables import print_plan, print_result


def plan(options: QuantizeOptions) -> Plan:
    """Measure every layer, choose the widths, write them to `options.output` (plan.json).

    Raises UserError for anything that the user can mend.
    """
    output = Path(options.output)
    if output.is_dir():
        raise UserError(f"output {output} is a folder; name a file such as plan.json")
    require_parent(output)
    with Progress() as progress:
        job = prepare(options, progress)
        work = open_work(job, Path(options.work_dir or f"{options.output}.work"), "plan")
        result = measure_and_allocate(job, work)
    with explain_os_errors(f"writing {output}"):
        write_json(output, result.to_dict())
    work.remove()
    print_plan(result, size_table(job, result))
    return result


def measure(options: QuantizeOptions) -> list[LayerSignificance]:
    """The significance of every layer at every candidate width; needs no solver, writes nothing.

    Raises UserError for anything that the user can mend.
    """
    with Progress() as progress, tempfile.TemporaryDirectory() as folder:
        job = prepare(options, progress, allocates=False)
        work = open_work(job, Path(folder), "measure")
        return measure_layers(job, work, sorted(options.traits.candidate_bits), resumable=False)


def sweep(options: QuantizeOptions, budgets: Sequence[float]) -> list[tuple[float, float]]:
    """Average bits and the KL to the 16-bit model in nats that they are expected to cost before
    tuning, from one measurement.

    Raises UserError for budgets out of range, and for a recipe that measures no KL.
    """
    traits = options.traits
    if traits.allocation != "sensitivity":
        raise UserError(f"recipe {traits.name} measures no KL to sweep; use --recipe best")
    candidates = sorted(traits.candidate_bits)
    wrong = [bits for bits in budgets if not candidates[0] <= bits <= candidates[-1]]
    if wrong:
        raise UserError(
            f"sweep holds {wrong}, the candidates allow {candidates[0]} to {candidates[-1]}"
        )
    measured = measure(options)
    return [
        (bits, allocate_sensitivity(measured, candidates, bits, options.group_size, traits)[2])
        for bits in budgets
    ]


def quantize(options: QuantizeOptions) -> dict[str, Any]:
    """Compress a checkpoint into `options.output`; returns what report.json holds.

    Raises UserError for anything that the user can mend. The output folder appears whole or not
    at all.
    """
    started = time.perf_counter()
    output = Path(options.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} exists and is not empty; choose another folder")
    require_parent(output)
    with Progress() as progress:
        given = None
        if options.plan is not None:
            given = Plan.from_dict(read_json(options.plan), options.plan)
            options = replace(
                options,
                bits=given.nominal_bits,
                candidate_bits=given.candidate_bits,
                group_size=given.group_size,
                dense_bits=given.dense_bits,
                recipe=options.recipe or recipe_of(given),
            )
        job = prepare(options, progress)
        if given is not None:
            require_plan_fits(given, job)
        work = open_work(job, Path(options.work_dir or f"{options.output}.work"), "quantize")
        chosen = given or measure_and_allocate(job, work)
        sizes = size_table(job, chosen)
        require_free_space(work, sizes.total_bytes)
        layers = quantize_layers(job, work, chosen)
        result = publish(job, work, chosen, sizes, layers, started)
        if options.traits.tuning_passes:
            result["tuning"] = finetune(job, work)
            result["seconds"] = round(time.perf_counter() - started, 1)
            write_json(work.checkpoint / "report.json", result)
        if options.target_drop is not None:
            progress.say("calibrating online pruning on the compressed model")
            compressed = open_checkpoint(work.checkpoint)
            loaded = load_streamed(compressed, options.device)
            windows = job.windows[:PRUNING_WINDOWS]
            store_table(compressed, calibrate_pruning(loaded, windows, options.target_drop))
    move_into_place(work.checkpoint, output)
    work.remove()
    print_plan(chosen, sizes)
    print_result(result, output)
    return result
