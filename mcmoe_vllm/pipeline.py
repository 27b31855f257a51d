"""The order of the steps: measure -> allocate -> quantize -> publish.

    plan(options)      model + text  -> significance of every layer -> widths       -> plan.json
    quantize(options)  the same, or a given plan -> GPTQ, packing   -> mcmoe checkpoint

Both walk the model one decoder layer at a time and leave what they finished in a work directory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils.hooks import RemovableHandle

from mcmoe_kernels import packing
from mcmoe_vllm import __version__, allocation, quantizer, report, significance, tuning
from mcmoe_vllm.checkpoint import (
    Checkpoint,
    copy_side_files,
    explain_os_errors,
    open_checkpoint,
    resolve_model,
    shard_name,
    side_files,
    write_index,
    write_shard,
)
from mcmoe_vllm.config import (
    CANDIDATE_BITS,
    DENSE_BITS,
    FORMAT_VERSION,
    GROUP_SIZES,
    Plan,
    QuantizationConfig,
    check_candidate_bits,
    read_json,
    write_json,
)
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.evaluation import LoadedModel, load_streamed, mean_divergences, window_length
from mcmoe_vllm.memory import peak_rss_bytes
from mcmoe_vllm.models import Architecture, find_architecture
from mcmoe_vllm.pruning import MAX_DROP
from mcmoe_vllm.pruning_calibration import PRUNING_WINDOWS, calibrate_pruning, store_table
from mcmoe_vllm.recipes import RECIPES, Recipe
from mcmoe_vllm.sensitivity import matrix_costs, summarize_costs
from mcmoe_vllm.streaming import Routing, StreamedModel, choose_device, experts_output
from mcmoe_vllm.text import DEFAULT_DATASET, load_tokenizer, sample_windows
from mcmoe_vllm.workdirectory import WorkDirectory, open_work_directory

DENSE_WIDTH = 4
DEVICE_BYTES = 3 << 30  # of tokens' states that stay on the device while their layer is measured
PROBE_TOKENS = 16384  # that tell what widths change and what a change costs the model
ROUTER = "mlp.gate"
RESULT_FIELDS = (  # what an interrupted job may not change, the recipe's traits apart
    "bits", "group_size", "dense_bits", "calibration", "samples",
    "sequence_length", "seed", "pins",
)  # fmt: skip
PLAN_TRAITS = (  # traits that a given plan has already decided
    "alpha", "beta", "gamma", "scope", "error_method", "error_refinements", "error_norm",
    "routing_score",
)  # fmt: skip
OVERRIDES = (  # traits with a flag of their own
    "alpha", "beta", "gamma", "scope", "method", "candidate_bits", "tuning_passes",
)  # fmt: skip


@dataclass(frozen=True)
class QuantizeOptions:
    """Everything that `mcmoe quantize` can be told; the names are those of its flags.

    model: a local folder or a Hub name; output: the folder (quantize) or plan file (plan) to
    write; bits: average width over expert weights; recipe: one or its name, None = the plan's or
    "best";
    scope, candidate_bits, method, alpha, beta, gamma, tuning_passes: traits of the recipe, None =
    as the recipe says;
    pins: "layers.0.*=3"; plan: a plan.json to use instead of measuring; target_drop: share of
    expert activations for online pruning, None = not calibrated; sequence_length: None =
    min(2048, the model's maximum).
    Raises UserError listing every value out of range.
    """

    model: str
    output: str
    bits: float = 2.5
    recipe: Recipe | str | None = None
    scope: str | None = None
    group_size: int = 128
    candidate_bits: tuple[int, ...] | None = None
    dense_bits: int = 4
    calibration: str = DEFAULT_DATASET
    samples: int = 128
    sequence_length: int | None = None
    method: str | None = None
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    tuning_passes: int | None = None
    pins: tuple[str, ...] = ()
    plan: str | None = None
    target_drop: float | None = None
    device: str = "auto"
    seed: int = 0
    work_dir: str | None = None
    resume: bool = False
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        allowed: list[tuple[str, Any, Sequence[Any]]] = [
            ("group_size", self.group_size, GROUP_SIZES),
            ("dense_bits", self.dense_bits, DENSE_BITS),
        ]
        if isinstance(self.recipe, str):
            allowed.append(("recipe", self.recipe, tuple(RECIPES)))
        wrong = [f"{n} is {v!r}, allowed are {list(a)}" for n, v, a in allowed if v not in a]
        wrong += check_candidate_bits(self.candidate_bits or (1,))
        if not wrong:
            wrong += self.traits.problems()
        if self.target_drop is not None and not 0 < self.target_drop <= MAX_DROP:
            wrong.append(f"target_drop is {self.target_drop}, allowed are shares up to {MAX_DROP}")
        if self.samples < 1:
            wrong.append(f"samples is {self.samples}, needs at least 1")
        if self.sequence_length is not None and self.sequence_length < 2:
            wrong.append(f"sequence_length is {self.sequence_length}, needs at least 2")
        if not math.isfinite(self.bits):
            wrong.append(f"bits is {self.bits}, needs a finite number")
        elif not wrong and self.plan is None:
            candidates = self.traits.candidate_bits
            low, high = min(candidates), max(candidates)
            if not low <= self.bits <= high:
                wrong.append(
                    f"bits is {self.bits}, the candidates {sorted(candidates)} allow "
                    f"{low} to {high}; choose other --candidate-bits out of {CANDIDATE_BITS}"
                )
        if wrong:
            raise UserError("\n".join(wrong))

    @property
    def traits(self) -> Recipe:
        """The recipe with what the options say otherwise."""
        given = {name: getattr(self, name) for name in OVERRIDES}
        changed = {name: value for name, value in given.items() if value is not None}
        recipe = self.recipe if isinstance(self.recipe, Recipe) else RECIPES[self.recipe or "best"]
        return replace(recipe, **changed)

    @property
    def is_uniform(self) -> bool:
        """Whether one width for all is asked for: nothing is measured then."""
        traits = self.traits
        several = traits.allocation == "sensitivity" and len(traits.candidate_bits) > 1
        return self.bits in traits.candidate_bits and not self.pins and not several


@dataclass(frozen=True)
class _Job:
    """What both commands work on."""

    options: QuantizeOptions
    checkpoint: Checkpoint
    architecture: Architecture
    model: StreamedModel
    moe_layers: list[int]
    num_experts: int
    windows: torch.Tensor
    progress: report.Progress

    @property
    def expert_width(self) -> int:
        return int(getattr(self.model.config, self.architecture.expert_width))

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    def read_expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 [2I, H] and w2 [H, I] of one expert, float32 on the device."""
        gate, up, down = self.architecture.expert_weights(layer, expert)
        weights = self.checkpoint.read_weights([gate, up, down])
        # To the device first: it converts faster, and half the bytes travel.
        w1, w3, w2 = (weights[name].to(self.model.device).float() for name in (gate, up, down))
        return torch.cat([w1, w3]), w2


@dataclass(frozen=True)
class QuantizedExpert:
    """w13 [2I, H] and w2 [H, I], each as a batch of one."""

    w13: quantizer.Quantized
    w2: quantizer.Quantized


def plan(options: QuantizeOptions) -> Plan:
    """Measure every layer, choose the widths, write them to `options.output` (plan.json).

    Raises UserError for anything that the user can mend.
    """
    output = Path(options.output)
    if output.is_dir():
        raise UserError(f"output {output} is a folder; name a file such as plan.json")
    require_parent(output)
    with report.Progress() as progress:
        job = _prepare(options, progress)
        work = _open_work(job, Path(options.work_dir or f"{options.output}.work"), "plan")
        result = _measure_and_allocate(job, work)
    with explain_os_errors(f"writing {output}"):
        write_json(output, result.to_dict())
    work.remove()
    report.print_plan(result, _size_table(job, result))
    return result


def measure(options: QuantizeOptions) -> list[significance.LayerSignificance]:
    """The significance of every layer at every candidate width; needs no solver, writes nothing.

    Raises UserError for anything that the user can mend.
    """
    with report.Progress() as progress, tempfile.TemporaryDirectory() as folder:
        job = _prepare(options, progress, allocates=False)
        work = _open_work(job, Path(folder), "measure")
        return _measure_layers(job, work, sorted(options.traits.candidate_bits), resumable=False)


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
    with report.Progress() as progress:
        given = None
        if options.plan is not None:
            given = Plan.from_dict(read_json(options.plan), options.plan)
            options = replace(
                options,
                bits=given.nominal_bits,
                candidate_bits=given.candidate_bits,
                group_size=given.group_size,
                dense_bits=given.dense_bits,
                recipe=options.recipe or _recipe_of(given),
            )
        job = _prepare(options, progress)
        if given is not None:
            _require_plan_fits(given, job)
        work = _open_work(job, Path(options.work_dir or f"{options.output}.work"), "quantize")
        chosen = given or _measure_and_allocate(job, work)
        sizes = _size_table(job, chosen)
        _require_free_space(work, sizes.total_bytes)
        layers = _quantize_layers(job, work, chosen)
        result = _publish(job, work, chosen, sizes, layers, started)
        if options.traits.tuning_passes:
            result["tuning"] = _tune(job, work)
            result["seconds"] = round(time.perf_counter() - started, 1)
            write_json(work.checkpoint / "report.json", result)
        if options.target_drop is not None:
            progress.say("calibrating online pruning on the compressed model")
            compressed = open_checkpoint(work.checkpoint)
            loaded = load_streamed(compressed, options.device)
            windows = job.windows[:PRUNING_WINDOWS]
            store_table(compressed, calibrate_pruning(loaded, windows, options.target_drop))
    _move(work.checkpoint, output)
    work.remove()
    report.print_plan(chosen, sizes)
    report.print_result(result, output)
    return result


def _prepare(options: QuantizeOptions, progress: report.Progress, allocates: bool = True) -> _Job:
    """Everything that can be refused is refused here, before any work."""
    checkpoint = open_checkpoint(resolve_model(options.model, options.revision))
    architecture = find_architecture(checkpoint.config)
    if "quantization_config" in checkpoint.config:
        method = checkpoint.config["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"{options.model} is already quantized ({method}); give the original 16-bit model"
        )
    device = choose_device(options.device)
    model = StreamedModel(
        checkpoint,
        architecture,
        device=device,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
    )
    moe_layers = architecture.moe_layers(checkpoint.tensors)
    if not moe_layers:
        raise UserError(
            f"{options.model} has no tensors {architecture.expert_prefix(0, 0)}.*: "
            "its experts are missing or stored in a layout that is not supported"
        )
    job = _Job(
        options=options,
        checkpoint=checkpoint,
        architecture=architecture,
        model=model,
        moe_layers=moe_layers,
        num_experts=int(getattr(model.config, architecture.num_experts)),
        windows=torch.empty(0),
        progress=progress,
    )
    _require_shapes(job)
    allocation.parse_pins(
        options.pins, moe_layers, job.num_experts, sorted(options.traits.candidate_bits)
    )
    if allocates and options.plan is None:
        _require_budget(job)
    length = window_length(checkpoint, options.sequence_length)
    tokenizer = load_tokenizer(checkpoint.path, options.trust_remote_code)
    progress.say(f"reading calibration text {options.calibration}")
    windows = sample_windows(options.calibration, tokenizer, options.samples, length, options.seed)
    # The first windows stand for all where fewer are enough.
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.seed))
    windows = windows[order]
    vocabulary = int(model.config.vocab_size)
    if int(windows.max()) >= vocabulary:
        raise UserError(
            f"the tokenizer in {checkpoint.path} gives token {int(windows.max())}, the model "
            f"knows {vocabulary}: tokenizer and model do not belong together"
        )
    return replace(job, windows=windows)


def _require_shapes(job: _Job) -> None:
    """Every matrix exists in the shape that config.json says, in whole groups of columns."""
    group_size, tensors = job.options.group_size, job.checkpoint.tensors
    hidden, width = job.hidden_size, job.expert_width
    wrong: list[str] = []
    for layer in job.moe_layers:
        for expert in range(job.num_experts):
            names = job.architecture.expert_weights(layer, expert)
            shapes = ((width, hidden), (width, hidden), (hidden, width))
            for name, shape in zip(names, shapes, strict=True):
                if name not in tensors:
                    wrong.append(f"{name} is missing")
                elif tensors[name].shape != shape:
                    wrong.append(
                        f"{name} is {list(tensors[name].shape)}, config says {list(shape)}"
                    )
    if wrong:
        raise UserError(f"{job.checkpoint.path} has unusable experts: {report.some(wrong)}")
    indivisible: dict[str, int] = {}
    if hidden % group_size:
        indivisible["the experts' gate and up projections (hidden size)"] = hidden
    if width % group_size:
        indivisible["the experts' down projections (expert width)"] = width
    if job.options.dense_bits == DENSE_WIDTH:
        for layer in range(job.model.num_layers):
            for group in job.architecture.dense_linears:
                for linear in group:
                    name = _dense_weight(job, layer, linear)
                    info = tensors.get(name)
                    if info is not None and info.shape[1] % group_size:
                        indivisible[name.removesuffix(".weight")] = info.shape[1]
    if indivisible:
        lines = "\n".join(f"  - {name}: {columns} columns" for name, columns in indivisible.items())
        fits = [g for g in GROUP_SIZES if all(c % g == 0 for c in indivisible.values())]
        experts_fit = not any("experts'" in name for name in indivisible)
        remedy = f"use --group-size {max(fits)}" if fits else "no group size fits this model"
        if experts_fit:
            remedy += " or --dense-bits 16"
        raise UserError(
            f"{len(indivisible)} kinds of columns are no multiple of the group size "
            f"{group_size}:\n{lines}\nRemedy: {remedy}"
        )


def _require_budget(job: _Job) -> None:
    """The allocation must be possible before hours are spent on measuring it."""
    options = job.options
    if options.is_uniform:
        return
    candidates = sorted(options.traits.candidate_bits)
    shape = (len(job.moe_layers), job.num_experts, len(candidates))
    if options.traits.allocation == "pmq":
        _allocate(job, np.zeros(shape), candidates)
    else:
        pins = allocation.parse_pins(options.pins, job.moe_layers, job.num_experts, candidates)
        costs, widths = allocation.projection_costs(
            np.zeros((*shape, 2)), np.zeros(shape[0]), candidates
        )
        scope = _scope(options.traits)
        allocation.allocate_projections(
            costs, widths, options.bits, options.group_size, scope=scope, pins=pins
        )


def _scope(recipe: Recipe) -> allocation.Scope:
    return "global" if recipe.scope == "global" else "layer"


def _open_work(job: _Job, path: Path, command: str) -> WorkDirectory:
    options = job.options
    shards = {n: (t.shard, t.shape, t.dtype) for n, t in job.checkpoint.tensors.items()}
    description = {
        "command": command,
        "mcmoe_version": __version__,
        "format_version": FORMAT_VERSION,
        "torch_version": torch.__version__,
        "device": job.model.device.type,
        "threads": torch.get_num_threads(),
        "model": str(job.checkpoint.path.resolve()),
        "model_fingerprint": _fingerprint([job.checkpoint.config, shards]),
        "calibration_fingerprint": _fingerprint(job.windows.tolist()),
        "plan": read_json(options.plan) if options.plan else None,
        **{name: getattr(options, name) for name in RESULT_FIELDS},
        **_named_traits(options.traits),
    }
    description = json.loads(json.dumps(description))
    require_parent(path)
    work = open_work_directory(path, description, options.resume)
    job.progress.say(f"work directory {path}")
    return work


def _measure_and_allocate(job: _Job, work: WorkDirectory) -> Plan:
    plan_file = work.path / "plan.json"
    if plan_file.exists():
        return Plan.from_dict(read_json(plan_file), str(plan_file))
    options = job.options
    candidates = sorted(options.traits.candidate_bits)
    measured = _measure_layers(job, work, [] if options.is_uniform else candidates)
    factors = allocation.Factors(
        frequency=np.array([m.frequency for m in measured]),
        routing_weight=np.array([m.routing_weight for m in measured]),
        reconstruction_error=np.array([m.reconstruction_error for m in measured]),
        candidate_bits=tuple(candidates),
        layers=tuple(job.moe_layers),
    )
    traits = options.traits
    w2_bits: tuple[tuple[int, ...], ...] = ()
    if options.is_uniform:
        costs = np.zeros((len(measured), job.num_experts, len(candidates)))
        chosen = allocation.uniform_allocation(costs, candidates, options.bits)
        bits, solver, objective = chosen.bits, chosen.solver, chosen.objective
    elif traits.allocation == "sensitivity":
        pins = allocation.parse_pins(options.pins, job.moe_layers, job.num_experts, candidates)
        bits, w2_bits, objective = allocate_sensitivity(
            measured, candidates, options.bits, options.group_size, traits, pins
        )
        solver = "knapsack"
    else:
        costs = allocation.expert_costs(
            factors, alpha=traits.alpha, beta=traits.beta, gamma=traits.gamma
        )
        chosen = _allocate(job, costs, candidates)
        bits, solver, objective = chosen.bits, chosen.solver, chosen.objective
    result = Plan(
        model=options.model,
        architecture=job.architecture.name,
        layers=tuple(job.moe_layers),
        bits=bits,
        w2_bits=w2_bits,
        candidate_bits=tuple(candidates),
        group_size=options.group_size,
        dense_bits=options.dense_bits,
        nominal_bits=options.bits,
        options={
            **{name: getattr(options, name) for name in RESULT_FIELDS if name != "bits"},
            **_named_traits(options.traits),
            "sequence_length": job.windows.shape[1],
            "solver": solver,
            "objective": objective,
            "significance": [asdict(m) for m in measured],
        },
    )
    with explain_os_errors(f"writing {plan_file}"):
        write_json(plan_file, result.to_dict())
    # As read back, so that a resumed job and this one hold the same values.
    return Plan.from_dict(read_json(plan_file), str(plan_file))


def allocate_sensitivity(
    measured: Sequence[significance.LayerSignificance],
    candidates: Sequence[int],
    bits: float,
    group_size: int,
    recipe: Recipe,
    pins: Mapping[tuple[int, int], int] | None = None,
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...], float]:
    """Widths of w13 and of w2, a row for every layer of experts, and the KL in nats that they are
    expected to cost."""
    costs, widths = allocation.projection_costs(
        np.array([m.projection_errors for m in measured]),
        np.array([m.sensitivity for m in measured]),
        candidates,
    )
    pairs, objective = allocation.allocate_projections(
        costs, widths, bits, group_size, scope=_scope(recipe), pins=pins
    )
    w13, w2 = (tuple(tuple(pair[i] for pair in row) for row in pairs) for i in (0, 1))
    return w13, w2, objective


def _allocate(job: _Job, costs: np.ndarray, candidates: Sequence[int]) -> allocation.Allocation:
    options = job.options
    scope = _scope(options.traits)
    budget, floors = allocation.budget_for_bits(
        options.bits, job.num_experts, len(job.moe_layers), candidates, scope
    )
    return allocation.allocate_bits(
        costs,
        candidates,
        scope=scope,
        **{f"{'total' if scope == 'global' else 'layer'}_budget": budget},  # type: ignore[arg-type]
        pins=allocation.parse_pins(options.pins, job.moe_layers, job.num_experts, candidates),
        floors=floors,
    )


def _measure_layers(
    job: _Job, work: WorkDirectory, candidates: Sequence[int], *, resumable: bool = True
) -> list[significance.LayerSignificance]:
    """The significance of every layer, on the unquantized model."""
    options, model = job.options, job.model
    traits = options.traits
    blocks = [b.cpu() for b in model.embed(job.windows)]
    probing = traits.allocation == "sensitivity" and len(candidates) > 0
    probe = min(range(len(candidates)), key=lambda c: abs(candidates[c] - 2)) if probing else None
    per_block = blocks[0].shape[0] * blocks[0].shape[1]
    probe_blocks = min(len(blocks), -(-PROBE_TOKENS // per_block)) if probing else 0
    probe_tokens = sum(b.shape[0] * b.shape[1] for b in blocks[:probe_blocks])
    start, kept = work.load_hidden("measure") or (0, blocks)
    # Behind the blocks: for every layer so far the first of them as they are after a change of
    # its experts' output.
    blocks, probes = kept[: len(blocks)], kept[len(blocks) :]
    job.progress.start("measuring", model.num_layers, start)
    for index in range(start, model.num_layers):
        layer = model.load_layer(index)
        probes = _run_exact(job, layer, index, probes).outputs if probes else []
        outputs, routing = _run_blocks(model, layer, index, blocks)
        if routing is not None:
            scores = _softmax_scores(layer, routing) if traits.routing_score == "softmax" else None
            measured, experts_output, change = significance.measure_layer(
                index,
                routing,
                lambda expert, i=index: job.read_expert(i, expert),  # type: ignore[misc]
                job.num_experts,
                candidates,
                options.group_size,
                model.activation(),
                traits,
                scores=scores,
                window=job.windows.shape[1],
                probe=probe,
                probe_tokens=probe_tokens if probing else None,
            )
            outputs = _add(outputs, experts_output)
            if probing:
                probes += _to_main_memory(_add(outputs[:probe_blocks], change))
            saved = {**asdict(measured), "probe_change": float(change.double().square().sum())}
            work.save_layer("significance", index, saved)
            job.progress.layer_done(index, report.describe_measurement(measured))
        else:
            job.progress.layer_done(index, "dense layer, nothing to measure")
        blocks = _to_main_memory(outputs)
        del outputs, routing
        model.release_layer(index)
        if resumable:
            work.save_hidden("measure", index + 1, [*blocks, *probes])
    found = [work.load_layer("significance", i) for i in job.moe_layers]
    changes = [layer.pop("probe_change") for layer in found]
    if probing:
        loaded = LoadedModel(model, job.architecture, None, job.num_experts)
        others = [probes[i : i + probe_blocks] for i in range(0, len(probes), probe_blocks)]
        divergences = mean_divergences(loaded, blocks[:probe_blocks], others)
        for layer_, kl, change_ in zip(found, divergences, changes, strict=True):
            layer_["sensitivity"] = kl / max(change_, 1e-30)
    return [significance.LayerSignificance(**layer) for layer in found]


def _quantize_layers(job: _Job, work: WorkDirectory, chosen: Plan) -> list[dict[str, Any]]:
    """Quantize and write layer after layer, each calibrated on what the quantized layers before
    it put out."""
    model, traits = job.model, job.options.traits
    shards = model.num_layers + 1
    outside = [n for n in job.checkpoint.tensors if not n.startswith("model.layers.")]
    first = work.checkpoint / shard_name(1, shards)
    if not first.exists():
        write_shard(first, job.checkpoint.read_weights(outside))
    blocks = [b.cpu() for b in model.embed(job.windows)]
    exact_targets = traits.exact_targets and traits.sequential
    follows_exact = not traits.sequential or exact_targets or traits.tuning_passes > 0
    start, kept = work.load_hidden("quantize") or (0, blocks)
    # Behind the blocks, where they differ: what the 16-bit model gives the layer.
    blocks, exact = kept[: len(blocks)], kept[len(blocks) :] or kept
    job.progress.start("quantizing", model.num_layers, start)
    for index in range(start, model.num_layers):
        began = time.perf_counter()
        layer = model.load_layer(index)
        tensors = job.checkpoint.read_weights(model.parameter_names(index))
        lost: dict[str, Any] = {}
        groups = _dense_groups(job, layer) if chosen.dense_bits == DENSE_WIDTH else []
        observed = [group[0] for group in groups] if exact_targets else None
        given = _run_exact(job, layer, index, exact, observed) if follows_exact else None
        exact, wanted = given.outputs if given else [], given if exact_targets else None
        if chosen.dense_bits == DENSE_WIDTH:
            lost["dense"] = _quantize_dense(job, layer, index, blocks, tensors, groups, wanted)
        if traits.router_bits != 16 and index in job.moe_layers:
            lost["router"] = _quantize_router(job, layer, index, blocks, tensors)
        routed = wanted.routed if wanted else None
        del given, wanted  # what the linears are given is as large as the states themselves
        outputs, routing = _run_blocks(model, layer, index, blocks)
        if routing is not None:
            bits = chosen.pairs()[job.moe_layers.index(index)]
            lost["experts"], experts = _quantize_experts(job, index, routing, bits, routed)
            _store_experts(job, index, experts, bits, tensors)
            outputs = _add(outputs, _routed_output(job, routing, experts))
        blocks = _to_main_memory(outputs) if traits.sequential else exact
        del outputs, routing, routed
        model.release_layer(index)
        write_shard(work.checkpoint / shard_name(index + 2, shards), tensors)
        del tensors
        summary = {"layer": index, "seconds": round(time.perf_counter() - began, 3), **lost}
        summary["peak_rss_bytes"] = peak_rss_bytes()
        work.save_layer("layers", index, summary)
        both = [*blocks, *exact] if traits.sequential else blocks
        work.save_hidden("quantize", index + 1, both)
        job.progress.layer_done(index, report.describe_layer(summary))
    return [work.load_layer("layers", i) for i in range(model.num_layers)]


@dataclass(frozen=True)
class _ExactLayer:
    """A layer of the 16-bit model on the calibration text. outputs: blocks [B, L, H], in main
    memory; where `_run_blocks` keeps states: inputs, what the observed linears are given, rows
    [B * L, K] of each block, and routed, what the routed experts are given, [T, H], None for a
    dense layer or if nothing is observed."""

    outputs: list[torch.Tensor]
    inputs: dict[str, list[torch.Tensor]]
    routed: torch.Tensor | None


def _run_exact(
    job: _Job,
    layer: torch.nn.Module,
    index: int,
    blocks: list[torch.Tensor],
    observed: Sequence[str] | None = None,
) -> _ExactLayer:
    """Blocks of the 16-bit model's states through a layer that is not quantized yet. Without
    `observed`, outputs are all that is kept."""
    model = job.model
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in observed or ()}
    kept = _place_of(model, blocks)
    with _observing(layer, list(inputs), lambda name, rows: inputs[name].append(rows.to(kept))):
        outputs, routing = _run_blocks(model, layer, index, blocks)
    if routing is None:
        return _ExactLayer(_to_main_memory(outputs), inputs, None)

    def read(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        w13, w2 = job.read_expert(index, expert)
        return w13.to(model.dtype), w2.to(model.dtype)

    changes = experts_output(routing, read, job.num_experts, model.activation())
    outputs = _to_main_memory(_add(outputs, changes))
    return _ExactLayer(outputs, inputs, None if observed is None else routing.hidden)


@contextmanager
def _observing(
    layer: torch.nn.Module, names: Sequence[str], see: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """While the layer runs, show what its linears are given: `see(name, rows)`, rows [T, K]."""

    def observe(name: str) -> RemovableHandle:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            see(name, arguments[0].detach().reshape(-1, arguments[0].shape[-1]))

        return layer.get_submodule(name).register_forward_pre_hook(hook)

    hooks = [observe(name) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _dense_groups(job: _Job, layer: torch.nn.Module) -> list[list[str]]:
    """The linears of a layer that become int4, grouped by the input that they share."""
    groups = (
        [name for name in group if _has_module(layer, name)]
        for group in job.architecture.dense_linears
    )
    return [group for group in groups if group]


def _quantize_dense(
    job: _Job,
    layer: torch.nn.Module,
    index: int,
    blocks: list[torch.Tensor],
    tensors: dict[str, torch.Tensor],
    groups: list[list[str]],
    wanted: _ExactLayer | None,
) -> dict[str, Any]:
    """Attention and shared experts to symmetric int4, in the layer and in `tensors`. wanted: whose
    outputs they are fitted to, each group after those before it are quantized."""
    traits = job.options.traits
    result: dict[str, Any] = {}
    for together in [groups] if wanted is None else [[group] for group in groups]:
        names = [group[0] for group in together]
        hessians = _input_grams(job, layer, index, blocks, names, wanted)
        for group in together:
            hessian, cross = hessians[group[0]]
            for name in group:
                linear: Any = layer.get_submodule(name)
                weight = linear.weight.detach().float().unsqueeze(0)
                if cross is not None:
                    damping = quantizer.DENSE_DAMPING
                    weight = quantizer.answer_inputs(weight, hessian, cross, damping)
                q = quantizer.quantize(
                    weight,
                    hessian,
                    DENSE_WIDTH,
                    job.options.group_size,
                    method=traits.method,
                    symmetric=True,
                    recipe=traits,
                )
                linear.weight.data = q.dequantize()[0].to(linear.weight.dtype)
                stored = _dense_weight(job, index, name)
                del tensors[stored]
                prefix = stored.removesuffix("weight")
                tensors[prefix + "qweight"] = packing.pack_int4_linear(q.codes[0].cpu())
                tensors[prefix + "scales"] = q.scale[0].t().to(torch.float16).cpu().contiguous()
                result[name] = {
                    "error": quantizer.relative_error(weight, hessian, q.error),
                    "rounding_kept": int((~q.gptq_kept).sum()),
                }
    return result


def _quantize_router(
    job: _Job,
    layer: torch.nn.Module,
    index: int,
    blocks: list[torch.Tensor],
    tensors: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """The router to the recipe's bits, in the layer and in `tensors`: dequantized in the
    checkpoint's own dtype, which the format wants of a router."""
    traits = job.options.traits
    router: Any = layer.get_submodule(ROUTER)
    stored = _dense_weight(job, index, ROUTER)
    weight = router.weight.detach().float().unsqueeze(0)
    hessian, _ = _input_grams(job, layer, index, blocks, [ROUTER], None)[ROUTER]
    q = quantizer.quantize(
        weight,
        hessian,
        traits.router_bits,
        job.options.group_size,
        method=traits.method,
        recipe=traits,
    )
    tensors[stored] = q.dequantize()[0].to(tensors[stored].dtype).cpu()
    router.weight.data = tensors[stored].to(router.weight)
    return {"bits": traits.router_bits, "error": quantizer.relative_error(weight, hessian, q.error)}


class _Seen(Exception):
    """All that was looked for in a layer has been seen."""


def _input_grams(
    job: _Job,
    layer: torch.nn.Module,
    index: int,
    blocks: list[torch.Tensor],
    names: Sequence[str],
    wanted: _ExactLayer | None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """X^T X and Y^T X [1, K, K] of what each of the layer's linears is given, X, and what the
    16-bit model gives it, Y; None without `wanted`."""
    found: dict[str, list[torch.Tensor]] = {}
    seen: list[str] = []

    def see(name: str, rows: torch.Tensor) -> None:
        products = [significance.gram(rows)]
        if wanted is not None:
            exact = wanted.inputs[name][seen.count(name)].to(rows.device)
            products.append(significance.gram(rows, exact))
        if name in found:
            products = [a + b for a, b in zip(found[name], products, strict=True)]
        found[name] = products
        seen.append(name)
        if len(seen) % len(names) == 0:
            raise _Seen

    with _observing(layer, names, see):
        for block in blocks:
            with suppress(_Seen):
                job.model.run_layer(layer, index, block.to(job.model.device))
    return {
        name: (products[0].unsqueeze(0), products[1].unsqueeze(0) if wanted else None)
        for name, products in found.items()
    }


def _quantize_experts(
    job: _Job,
    index: int,
    routing: Routing,
    bits: Sequence[tuple[int, int]],
    exact: torch.Tensor | None,
) -> tuple[dict[str, Any], dict[int, QuantizedExpert]]:
    """All routed experts of a layer at their widths (w13, w2), dropped ones left out. exact: what
    the 16-bit model gives them, [T, H], where that is what their outputs are fitted to."""
    options, activation = job.options, job.model.activation()
    traits = options.traits
    found: dict[int, QuantizedExpert] = {}
    error = signal = 0.0
    rounding_kept = matrices = 0
    damping = 0.0
    quantize = partial(
        quantizer.quantize, group_size=options.group_size, method=traits.method, recipe=traits
    )
    kept = [e for e in range(job.num_experts) if bits[e][0]]
    share = partial(significance.shared_gram, routing, traits.shared_tokens, job.model.device)
    shared, shared_cross = share(), None if exact is None else share(exact)
    for chunk in significance.expert_chunks(len(kept), job.hidden_size, job.expert_width):
        experts = [kept[i] for i in chunk]
        pairs = [job.read_expert(index, e) for e in experts]
        w13, w2 = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
        del pairs
        weighting = traits.hessian_weighting
        hessian13 = significance.input_hessians(routing, experts, weighting, shared)
        widths = torch.tensor([bits[e] for e in experts], device=w13.device).unbind(1)
        wanted13 = w13
        if shared_cross is not None:
            cross13 = significance.input_hessians(routing, experts, weighting, shared_cross, exact)
            w13 = quantizer.answer_inputs(w13, hessian13, cross13)
            del cross13
        q13 = quantize(w13, hessian13, widths[0], splits=2)
        given = q13.dequantize() if traits.answers else wanted13
        hessian2, cross = significance.inner_hessians(
            routing, experts, given, wanted13, activation, weighting, exact
        )
        if traits.answers:
            w2 = quantizer.answer_inputs(w2, hessian2, cross)
        q2 = quantize(w2, hessian2, widths[1], splits=1)
        for weight, hessian, q in ((w13, hessian13, q13), (w2, hessian2, q2)):
            error += float(q.error.sum())
            signal += float(((weight.float() @ hessian) * weight).sum())
            rounding_kept += int((~q.gptq_kept).sum())
            matrices += q.gptq_kept.numel()
            damping = max(damping, float(q.damping.max()))
        del hessian13, hessian2, cross, given, wanted13, w13, w2
        for position, expert in enumerate(experts):
            found[expert] = QuantizedExpert(q13.matrix(position), q2.matrix(position))
    tokens = significance.count_tokens(routing, job.num_experts)
    return {
        "bits": [list(pair) for pair in bits],
        "error": math.sqrt(max(error, 0.0) / signal) if signal else 0.0,
        "rounding_kept": rounding_kept,
        "matrices": matrices,
        "damping": damping,
        "tokens": tokens,
        "starved": significance.starved_experts(tokens),
    }, found


def _tune(job: _Job, work: WorkDirectory) -> dict[str, Any]:
    """Tune the finished checkpoint in its place; the mean KL before and after, and its seconds.

    What changed is kept in a file of its own first, so that a job killed while it rewrites shards
    tunes nothing twice.
    """
    traits, folder = job.options.traits, work.checkpoint
    kept = work.path / "tuned.safetensors"
    summary = work.path / "tuned.json"
    if not summary.exists():
        began = time.perf_counter()
        found = work.load_hidden("quantize")
        assert found is not None
        compressed = open_checkpoint(folder)
        tuned = tuning.tune_model(
            load_streamed(compressed, str(job.model.device), job.model.dtype),
            job.windows,
            found[1][-len(found[1]) // 2 :] if traits.sequential else found[1],
            passes=traits.tuning_passes,
            rate=traits.tuning_rate,
            seed=job.options.seed,
            report=lambda step, steps, loss: job.progress.say(
                f"tuning step {step}/{steps}: KL {loss:.4f}"
            ),
        )
        dtypes = compressed.read(list(tuned.tensors)) if tuned.tensors else {}
        write_shard(kept, {n: t.to(dtypes[n].dtype) for n, t in tuned.tensors.items()})
        seconds = round(time.perf_counter() - began, 3)
        write_json(summary, {"before": tuned.before, "after": tuned.after, "seconds": seconds})
    changed = load_file(kept)
    compressed = open_checkpoint(folder)
    by_shard: dict[str, list[str]] = {}
    for name, info in compressed.tensors.items():
        by_shard.setdefault(Path(info.shard).name, []).append(name)
    for shard, names in by_shard.items():
        if set(names) & set(changed):
            tensors = compressed.read(names)
            write_shard(folder / shard, {n: changed.get(n, t) for n, t in tensors.items()})
    write_index(folder, sorted(by_shard))
    return dict(read_json(summary))


def _store_experts(
    job: _Job,
    index: int,
    experts: Mapping[int, QuantizedExpert],
    bits: Sequence[tuple[int, int]],
    tensors: dict[str, torch.Tensor],
) -> None:
    """The experts' packed codes, scales and zeros into `tensors`."""
    for expert, matrices in experts.items():
        half = matrices.w13.codes.shape[1] // 2
        parts = (
            matrices.w13.select(slice(0, half)),
            matrices.w13.select(slice(half, None)),
            matrices.w2,
        )
        names = job.architecture.expert_weights(index, expert)
        w13, w2 = bits[expert]
        for name, part, width in zip(names, parts, (w13, w13, w2), strict=True):
            prefix = name.removesuffix("weight")
            tensors[prefix + "weight_packed"] = packing.pack(part.codes[0], width).cpu()
            tensors[prefix + "weight_scale"] = packing.pack_scale(
                part.scale[0], part.zero[0], width
            ).cpu()


def _routed_output(
    job: _Job, routing: Routing, experts: Mapping[int, QuantizedExpert]
) -> torch.Tensor:
    """What the quantized experts put out, [T, H]."""

    def dequantize(expert: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        if expert not in experts:
            return None
        pair = (experts[expert].w13, experts[expert].w2)
        w13, w2 = (q.dequantize()[0].to(job.model.dtype) for q in pair)
        return w13, w2

    return experts_output(routing, dequantize, job.num_experts, job.model.activation())


def _publish(
    job: _Job,
    work: WorkDirectory,
    chosen: Plan,
    sizes: report.Sizes,
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
    recipe = {**_named_traits(options.traits), **decided, "mcmoe_version": __version__}
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
        report.write_heatmap(chosen, folder / "allocation.png")
        licences = [f.name for f in side_files(job.checkpoint.path) if "LICEN" in f.name.upper()]
        report.write_model_card(folder, result, chosen, sizes, bool(licences))
    return result


def _size_table(job: _Job, chosen: Plan) -> report.Sizes:
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
        _dense_weight(job, layer, name)
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
    return report.Sizes(
        original_bytes=job.checkpoint.nbytes,
        expert_bytes=expert_bytes,
        other_bytes=other_bytes,
        expert_parameters=expert_parameters,
        parameters=job.checkpoint.num_parameters,
    )


def _run_blocks(
    model: StreamedModel, layer: torch.nn.Module, index: int, blocks: list[torch.Tensor]
) -> tuple[list[torch.Tensor], Routing | None]:
    """All blocks through a layer, and the routing of all their tokens, kept in `_place_of` them."""
    outputs, routings = [], []
    kept = _place_of(model, blocks)
    for block in blocks:
        output, routing = model.run_layer(layer, index, block.to(model.device))
        outputs.append(output.to(kept))
        if routing is not None:
            routings.append(
                Routing(routing.hidden.to(kept), routing.ids.to(kept), routing.weights.to(kept))
            )
    return outputs, significance.concatenate(routings) if routings else None


def _place_of(model: StreamedModel, blocks: list[torch.Tensor]) -> torch.device:
    """Where tokens' states are kept while their layer is worked on: the device if they are not too
    large for it, else main memory."""
    small = sum(b.nbytes for b in blocks) <= DEVICE_BYTES
    return model.device if small else torch.device("cpu")


def _add(blocks: list[torch.Tensor], rows: torch.Tensor) -> list[torch.Tensor]:
    """Blocks [B, L, H] plus the matching rows of [T, H]."""
    parts = rows.split([b.shape[0] * b.shape[1] for b in blocks])
    return [b + p.view_as(b).to(b) for b, p in zip(blocks, parts, strict=True)]


def _to_main_memory(blocks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of blocks that are on a GPU, by way of one page-locked block: several times as fast as
    straight into memory that nothing has touched yet."""
    if not blocks[0].is_cuda:
        return blocks
    largest = max(blocks, key=lambda b: b.numel())
    staging = torch.empty_like(largest, device="cpu", pin_memory=True).flatten()
    return [staging[: b.numel()].view_as(b).copy_(b).clone() for b in blocks]


def _named_traits(recipe: Recipe) -> dict[str, Any]:
    """A recipe's traits with its name as "recipe"."""
    traits = recipe.to_dict()
    return {"recipe": traits.pop("name"), **traits}


def _recipe_of(plan: Plan) -> str | None:
    """The name of the recipe that a plan was made by, if it is known here."""
    name = plan.options.get("recipe")
    return name if name in RECIPES else None


def _softmax_scores(layer: torch.nn.Module, routing: Routing) -> torch.Tensor:
    """The routed experts' shares of the softmax over all experts, float32 [T, k]."""
    router: Any = layer.get_submodule(ROUTER)
    weight = router.weight.float()
    parts = [
        hidden.to(weight)
        .matmul(weight.t())
        .softmax(-1)
        .gather(1, ids.to(weight.device))
        .to(ids.device)
        for hidden, ids in zip(
            routing.hidden.split(significance.ROWS),
            routing.ids.split(significance.ROWS),
            strict=True,
        )
    ]
    return torch.cat(parts)


def _dense_weight(job: _Job, layer: int, linear: str) -> str:
    """Checkpoint name of a dense linear's weight; `linear` is transformers' name in the layer."""
    return _stored_name(job, layer, f"{linear}.weight")


def _stored_name(job: _Job, layer: int, parameter: str) -> str:
    """Checkpoint name of a layer's parameter; `parameter` is transformers' name in the layer."""
    on_disk = parameter.replace("mlp.", f"{job.architecture.block}.", 1)
    return f"model.layers.{layer}.{on_disk}"


def _has_module(layer: torch.nn.Module, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True


def _require_plan_fits(given: Plan, job: _Job) -> None:
    wrong = []
    if given.architecture != job.architecture.name:
        wrong.append(f"it is for {given.architecture}, the model is {job.architecture.name}")
    if list(given.layers) != job.moe_layers:
        wrong.append(f"it is for layers {list(given.layers)}, the model has {job.moe_layers}")
    if given.num_experts != job.num_experts:
        wrong.append(f"it is for {given.num_experts} experts, the model has {job.num_experts}")
    if wrong:
        raise UserError(f"{job.options.plan} does not fit the model: {'; '.join(wrong)}")


def _require_free_space(work: WorkDirectory, total_bytes: int) -> None:
    written = sum(f.stat().st_size for f in work.checkpoint.glob("*.safetensors"))
    needed, free = total_bytes - written, shutil.disk_usage(work.path).free
    if free < needed:
        raise UserError(
            f"the disk of {work.path} has {report.size(free)} free, the checkpoint needs "
            f"{report.size(needed)}; make room, then add --resume"
        )


def require_parent(path: Path) -> None:
    """Raises UserError if no file can be made in the folder of `path`."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{parent}, the folder for {path.name}, does not exist; create it first")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent}, the folder for {path.name}, is not writable")


def _move(source: Path, target: Path) -> None:
    """Rename a finished folder to its place; across file systems, copy beside it first."""
    with explain_os_errors(f"writing {target}"):
        if os.stat(source).st_dev != os.stat(target.absolute().parent).st_dev:
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            source = partial
        os.replace(source, target)


def _fingerprint(value: Mapping[str, Any] | Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
