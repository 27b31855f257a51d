"""The order of the steps: measure -> choose -> quantize -> finetune -> publish.

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

import torch

from mcmoe_vllm.allocate.budget import parse_pins
from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.compress.choose import allocate_sensitivity, measure_and_choose, require_budget
from mcmoe_vllm.compress.expected_loss import describe_costs
from mcmoe_vllm.compress.finetune import finetune
from mcmoe_vllm.compress.job import open_source, open_work, read_windows, require_plan_fits
from mcmoe_vllm.compress.measure import measure_layers
from mcmoe_vllm.compress.options import QuantizeOptions, recipe_of, require_undecided
from mcmoe_vllm.compress.publish import (
    Summary,
    count_sizes,
    move_into_place,
    require_free_space,
    seal,
    write_output,
)
from mcmoe_vllm.compress.quantize_layers import final_states, quantize_layers
from mcmoe_vllm.compress.significance import LayerSignificance
from mcmoe_vllm.compress.workdirectory import WorkDirectory
from mcmoe_vllm.disk import explain_os_errors, read_json, require_parent, write_json
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.moe_model import MoeModel, open_model
from mcmoe_vllm.plan import Plan
from mcmoe_vllm.pruning.calibration import (
    PRUNING_WINDOWS,
    calibrate_pruning,
    require_prunable,
    store_table,
)
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
        model, windows = _open(options, progress)
        work = _open_work(options, model, windows, "plan", progress)
        result = measure_and_choose(options, model, windows, work, progress)
    with explain_os_errors(f"writing {output}"):
        write_json(output, result.to_dict())
    work.remove()
    print_plan(result, count_sizes(model.outline, result))
    return result


def measure(options: QuantizeOptions) -> list[LayerSignificance]:
    """The significance of every layer at every candidate width; needs no solver, writes nothing.

    Raises UserError for anything that the user can mend.
    """
    with Progress() as progress, tempfile.TemporaryDirectory() as folder:
        model, windows = _open(options, progress, allocates=False)
        work = open_work(options, model.checkpoint, model.device, windows, Path(folder), "measure")
        traits = options.traits
        candidates = sorted(traits.candidate_bits)
        return measure_layers(
            model, windows, candidates, options.group_size, traits, work, progress, resumable=False
        )


def sweep(options: QuantizeOptions, budgets: Sequence[float]) -> list[tuple[float, float]]:
    """Average bits and the KL to the 16-bit model in nats that they are expected to cost before
    finetuning, from one measurement.

    Raises UserError for budgets out of range, and for a recipe that measures no KL.
    """
    traits = options.traits
    if options.pins:
        raise UserError("sweep chooses without pins; leave out --pin")
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
    given = None
    if options.plan is not None:
        given = Plan.from_dict(read_json(options.plan), options.plan)
        require_undecided(options, given)
        options = _with_plan(options, given)
    with Progress() as progress:
        model, windows = _open(options, progress)
        if given is not None:
            require_plan_fits(given, options.plan, model.outline)
        work = _open_work(options, model, windows, "quantize", progress)
        chosen = given or measure_and_choose(options, model, windows, work, progress)
        sizes = count_sizes(model.outline, chosen)
        require_free_space(work, sizes.total_bytes)
        layers = quantize_layers(model, windows, chosen, options.traits, work, progress)
        summary = Summary(options, model, windows.shape, chosen, sizes, layers)
        result = _finish(summary, windows, work, progress, started)
    move_into_place(work.checkpoint, output)
    work.remove()
    print_plan(chosen, sizes)
    costs = result["sensitivity"]
    print_result(result, output, None if costs is None else describe_costs(costs))
    return result


def _finish(
    summary: Summary,
    windows: torch.Tensor,
    work: WorkDirectory,
    progress: Progress,
    started: float,
) -> dict[str, Any]:
    """From quantized shards to a whole checkpoint: finetuned, calibrated, hashed."""
    options, folder = summary.options, work.checkpoint
    result = write_output(folder, summary)
    if options.traits.finetune_passes:
        states = final_states(work)
        result["finetuning"] = finetune(
            windows, states, options, summary.model.device, summary.model.dtype, work, progress.say
        )
    if options.target_drop is not None:
        progress.say("calibrating online pruning on the compressed model")
        compressed = open_checkpoint(folder)
        pruned = open_model(compressed, options.device)
        part = windows[:PRUNING_WINDOWS]
        table = calibrate_pruning(pruned, part, options.target_drop, progress=progress)
        store_table(compressed, table)
    progress.say("hashing")
    return seal(folder, result, time.perf_counter() - started)


def _open(
    options: QuantizeOptions, progress: Progress, allocates: bool = True
) -> tuple[MoeModel, torch.Tensor]:
    """The model and its calibration windows. allocates: whether the budget has to be possible."""
    model = open_source(options)
    candidates = sorted(options.traits.candidate_bits)
    parse_pins(options.pins, model.moe_layers, model.num_experts, candidates)
    if options.target_drop is not None:
        require_prunable(model)
    if allocates and options.plan is None:
        require_budget(options, model.moe_layers, model.num_experts)
    progress.say(f"reading calibration text {options.calibration}")
    windows = read_windows(options, model.checkpoint, model.config, progress.say)
    return model, windows


def _open_work(
    options: QuantizeOptions,
    model: MoeModel,
    windows: torch.Tensor,
    command: str,
    progress: Progress,
) -> WorkDirectory:
    path = Path(options.work_dir or f"{options.output}.work")
    work = open_work(options, model.checkpoint, model.device, windows, path, command)
    progress.say(f"work directory {path}")
    return work


def _with_plan(options: QuantizeOptions, given: Plan) -> QuantizeOptions:
    """The options with what a given plan has decided."""
    return replace(
        options,
        bits=given.nominal_bits,
        candidate_bits=given.candidate_bits,
        group_size=given.group_size,
        dense_bits=given.dense_bits,
        recipe=options.recipe or recipe_of(given),
    )
