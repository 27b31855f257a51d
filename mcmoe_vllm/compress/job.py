"""What a job works on, and everything that is refused before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mcmoe_vllm import __version__
from mcmoe_vllm.allocate.budget import parse_pins
from mcmoe_vllm.checkpoint.files import Checkpoint, open_checkpoint, resolve_model
from mcmoe_vllm.checkpoint.format import DENSE_WIDTH, FORMAT_VERSION, GROUP_SIZES
from mcmoe_vllm.compress.choose import require_budget
from mcmoe_vllm.compress.options import RESULT_FIELDS, QuantizeOptions, named_traits
from mcmoe_vllm.compress.workdirectory import WorkDirectory, open_work_directory
from mcmoe_vllm.disk import read_json, require_parent
from mcmoe_vllm.errors import UserError, some
from mcmoe_vllm.model.architectures import Architecture, dense_weight, find_architecture
from mcmoe_vllm.model.streaming import StreamedModel, choose_device
from mcmoe_vllm.model.text import load_tokenizer, sample_windows, window_length
from mcmoe_vllm.plan import Plan
from mcmoe_vllm.report.progress import Progress


@dataclass(frozen=True)
class Job:
    """What both commands work on."""

    options: QuantizeOptions
    checkpoint: Checkpoint
    architecture: Architecture
    model: StreamedModel
    moe_layers: list[int]
    num_experts: int
    windows: torch.Tensor
    progress: Progress

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


def prepare(options: QuantizeOptions, progress: Progress, allocates: bool = True) -> Job:
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
    job = Job(
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
    parse_pins(options.pins, moe_layers, job.num_experts, sorted(options.traits.candidate_bits))
    if allocates and options.plan is None:
        require_budget(job)
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


def _require_shapes(job: Job) -> None:
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
        raise UserError(f"{job.checkpoint.path} has unusable experts: {some(wrong)}")
    indivisible: dict[str, int] = {}
    if hidden % group_size:
        indivisible["the experts' gate and up projections (hidden size)"] = hidden
    if width % group_size:
        indivisible["the experts' down projections (expert width)"] = width
    if job.options.dense_bits == DENSE_WIDTH:
        for layer in range(job.model.num_layers):
            for group in job.architecture.dense_linears:
                for linear in group:
                    name = dense_weight(job, layer, linear)
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


def open_work(job: Job, path: Path, command: str) -> WorkDirectory:
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
        **named_traits(options.traits),
    }
    description = json.loads(json.dumps(description))
    require_parent(path)
    work = open_work_directory(path, description, options.resume)
    job.progress.say(f"work directory {path}")
    return work


def require_plan_fits(given: Plan, job: Job) -> None:
    wrong = []
    if given.architecture != job.architecture.name:
        wrong.append(f"it is for {given.architecture}, the model is {job.architecture.name}")
    if list(given.layers) != job.moe_layers:
        wrong.append(f"it is for layers {list(given.layers)}, the model has {job.moe_layers}")
    if given.num_experts != job.num_experts:
        wrong.append(f"it is for {given.num_experts} experts, the model has {job.num_experts}")
    if wrong:
        raise UserError(f"{job.options.plan} does not fit the model: {'; '.join(wrong)}")


def _fingerprint(value: Mapping[str, Any] | Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
