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
from mcmoe_vllm.checkpoint.files import Checkpoint, open_checkpoint
from mcmoe_vllm.checkpoint.side_files import find_side_files
from mcmoe_vllm.compress.choose import allocate_sensitivity, measure_and_choose, require_budget
from mcmoe_vllm.compress.expected_loss import describe_costs
from mcmoe_vllm.compress.finetune import finetune
from mcmoe_vllm.compress.job import (
    MEASURE,
    open_source,
    open_work,
    read_windows,
    require_plan_fits,
)
from mcmoe_vllm.compress.measure import measure_layers
from mcmoe_vllm.compress.options import QuantizeOptions, recipe_of, require_undecided
from mcmoe_vllm.compress.publish import (
    Summary,
    count_sizes,
    move_into_place,
    needed_bytes,
    require_free_space,
    seal,
    write_output,
)
from mcmoe_vllm.compress.quantize_layers import final_states, quantize_layers
from mcmoe_vllm.compress.significance import LayerSignificance
from mcmoe_vllm.compress.workdirectory import WorkDirectory, moved_into, require_startable
from mcmoe_vllm.disk import explain_os_errors, read_json, write_json
from mcmoe_vllm.errors import UserError, count
from mcmoe_vllm.model.architectures import why_unsure
from mcmoe_vllm.model.moe_model import MoeModel, open_model
from mcmoe_vllm.places import output_folder, require_apart, require_result, work_folder
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
    require_result(options.output, options.calibration, options.plan)
    folder = work_folder(options.output, options.work_dir)
    require_startable(folder, options.resume)
    require_apart(Path(options.output).absolute(), folder)
    with Progress() as progress:
        asked = options
        model, options, windows = _open(options, progress)
        _, states = needed_bytes(model.outline, model.dtype, windows, options, None)
        require_free_space(folder, states, folder, 0)
        with _open_work(options, model, windows, folder, "plan", progress, asked) as work:
            result = measure_and_choose(options, model, windows, work, progress)
            with explain_os_errors(f"writing {options.output}"):
                write_json(options.output, result.to_dict())
            _remove(work, progress)
    print_plan(result, count_sizes(model.outline, result))
    return result


def measure(options: QuantizeOptions) -> list[LayerSignificance]:
    """The significance of every layer at every candidate width; needs no solver, writes nothing.

    Raises UserError for anything that the user can mend.
    """
    return _measure(options)[0]


def _measure(asked: QuantizeOptions) -> tuple[list[LayerSignificance], QuantizeOptions]:
    """`measure`, and the options with group sizes that fit the model."""
    with Progress() as progress, tempfile.TemporaryDirectory() as folder:
        model, options, windows = _open(asked, progress, allocates=False)
        traits = options.traits
        candidates = sorted(traits.candidate_bits)
        place = Path(folder) / "work"
        with open_work(
            options, model.checkpoint, model.device, windows, place, MEASURE, asked
        ) as work:
            return measure_layers(
                model, windows, candidates, options.group_sizes, traits, work, progress,
                resumable=False,
            ), options  # fmt: skip


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
    measured, options = _measure(options)
    return [
        (bits, allocate_sensitivity(measured, candidates, bits, options.group_sizes, traits)[2])
        for bits in budgets
    ]


def quantize(options: QuantizeOptions) -> dict[str, Any]:
    """Compress a checkpoint into `options.output`; returns what report.json holds.

    Raises UserError for anything that the user can mend. The output folder appears whole; one that
    exists is filled at the end, config.json last.
    """
    started = time.perf_counter()
    asked, given = options, None
    folder = work_folder(options.output, options.work_dir)
    output = _output(options.output, folder)
    require_startable(folder, options.resume)
    if options.plan is not None:
        given = Plan.from_dict(read_json(options.plan), options.plan)
        require_undecided(options, given)
        options = _with_plan(options, given)
    with Progress() as progress:
        model, options = _open_model(options, progress)
        require_apart(output, folder, model.checkpoint.path)
        _announce_left_out(model.checkpoint.path, options, progress)
        if given is not None:
            require_plan_fits(given, options.plan, model.outline)
        windows = _read_text(options, model.checkpoint, model.config, progress)
        needed = needed_bytes(model.outline, model.dtype, windows, options, given)
        require_free_space(folder, sum(needed), output, needed[0])
        with _open_work(options, model, windows, folder, "quantize", progress, asked) as work:
            if work.job.moving is None:
                _compress(options, model, windows, given, work, progress, started)
            move_into_place(work, output)
            _remove(work, progress)
    result, made = read_json(output / "report.json"), read_json(output / "plan.json")
    chosen = Plan.from_dict(made, str(output / "plan.json"))
    print_plan(chosen, count_sizes(model.outline, chosen))
    costs = result["sensitivity"]
    print_result(result, Path(options.output), None if costs is None else describe_costs(costs))
    return result


def _compress(
    options: QuantizeOptions,
    model: MoeModel,
    windows: torch.Tensor,
    given: Plan | None,
    work: WorkDirectory,
    progress: Progress,
    started: float,
) -> None:
    """From the model to a whole checkpoint in the work directory."""
    chosen = given or measure_and_choose(options, model, windows, work, progress)
    needed = needed_bytes(model.outline, model.dtype, windows, options, chosen)
    require_free_space(work.path, sum(needed), work.path, 0)
    layers = quantize_layers(model, windows, chosen, options.traits, work, progress)
    sizes = count_sizes(model.outline, chosen)
    summary = Summary(options, model, windows.shape, chosen, sizes, layers)
    folder = work.checkpoint
    result = {**write_output(folder, summary), "threads": list(work.job.threads)}
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
    seal(folder, result, time.perf_counter() - started)


def _output(name: str, folder: Path) -> Path:
    """The output folder of a job that works in `folder`, checked: it may hold that, and what the
    job moved there before it was stopped."""
    own = list(moved_into(output := Path(name).resolve(), folder))
    return output_folder(name, [*own, *([folder.name] if folder.parent == output else [])])


def _open(
    options: QuantizeOptions, progress: Progress, allocates: bool = True
) -> tuple[MoeModel, QuantizeOptions, torch.Tensor]:
    """The model, the options with all that it decides, and its calibration windows. allocates:
    whether the budget has to be possible."""
    model, options = _open_model(options, progress, allocates)
    return model, options, _read_text(options, model.checkpoint, model.config, progress)


def _open_model(
    options: QuantizeOptions, progress: Progress, allocates: bool = True
) -> tuple[MoeModel, QuantizeOptions]:
    model, options = open_source(options)
    if unsure := why_unsure(model.name):
        progress.say(unsure)
    candidates = sorted(options.traits.candidate_bits)
    parse_pins(options.pins, model.moe_layers, model.num_experts, candidates)
    if options.target_drop is not None:
        require_prunable(model)
    if allocates and options.plan is None:
        require_budget(options, model.moe_layers, model.num_experts)
    return model, options


def _read_text(
    options: QuantizeOptions, checkpoint: Checkpoint, config: Any, progress: Progress
) -> torch.Tensor:
    progress.say(f"reading calibration text {options.calibration}")
    return read_windows(options, checkpoint, config, progress.say)


def _announce_left_out(source: Path, options: QuantizeOptions, progress: Progress) -> None:
    found = find_side_files(source, options.trust_remote_code)
    if found.left_out:
        progress.say(
            f"not copied along, too large or too many: {count(found.left_out, 'file')}; "
            "if a tokenizer needs them, copy them by hand"
        )


def _open_work(
    options: QuantizeOptions,
    model: MoeModel,
    windows: torch.Tensor,
    folder: Path,
    command: str,
    progress: Progress,
    asked: QuantizeOptions,
) -> WorkDirectory:
    work = open_work(options, model.checkpoint, model.device, windows, folder, command, asked)
    for note in (f"work directory {folder}", *work.notes):
        progress.say(note)
    return work


def _remove(work: WorkDirectory, progress: Progress) -> None:
    if kept := work.remove():
        progress.say(f"{work.path} stays, it holds what the job did not make: {', '.join(kept)}")


def _with_plan(options: QuantizeOptions, given: Plan) -> QuantizeOptions:
    """The options with what a given plan has decided."""
    return replace(
        options,
        bits=given.nominal_bits,
        candidate_bits=given.candidate_bits,
        group_size=dict(given.group_size),
        dense_bits=given.dense_bits,
        recipe=options.recipe or recipe_of(given),
    )
