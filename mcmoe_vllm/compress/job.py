"""What a job works on, opened and checked: everything that can be refused is refused before any
work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mcmoe_vllm import __version__
from mcmoe_vllm.checkpoint.files import Checkpoint, open_checkpoint, own_config, resolve_model
from mcmoe_vllm.checkpoint.fingerprint import weights_fingerprint
from mcmoe_vllm.checkpoint.format import FORMAT_VERSION
from mcmoe_vllm.compress.group_sizes import choose_group_sizes, quantized_columns
from mcmoe_vllm.compress.options import RESULT_FIELDS, QuantizeOptions, named_traits
from mcmoe_vllm.compress.workdirectory import (
    WorkDirectory,
    open_work_directory,
    read_job,
    require_startable,
)
from mcmoe_vllm.disk import read_json
from mcmoe_vllm.errors import UserError, count
from mcmoe_vllm.flags import changed_flags
from mcmoe_vllm.model.documents import Say
from mcmoe_vllm.model.moe_model import MoeModel, Outline, open_model
from mcmoe_vllm.model.text import (
    load_tokenizer,
    require_known_tokens,
    sample_windows,
    window_length,
)
from mcmoe_vllm.places import JOB_FILE, work_folder
from mcmoe_vllm.plan import Plan

MEASURE = "measure"  # a job of which nothing is kept
NOT_RESTORED = ("work_dir", "resume")  # options that say where a job works


def open_source(options: QuantizeOptions) -> tuple[MoeModel, QuantizeOptions]:
    """The original model to compress, and the options with every group size decided.

    Raises UserError for models that cannot be compressed with these options.
    """
    checkpoint = open_checkpoint(resolve_model(options.model, options.revision))
    if own_config(checkpoint) is not None:
        raise UserError(f"{options.model} is compressed already; give the original model")
    model = open_model(checkpoint, options.device, None, as_stored=True)
    columns = quantized_columns(model.outline, options.dense_bits, options.tensor_parallel)
    sizes = choose_group_sizes(options.group_sizes, list(columns))
    return model, replace(options, group_size=sizes)


def read_windows(
    options: QuantizeOptions, checkpoint: Checkpoint, config: Any, say: Say
) -> torch.Tensor:
    """Calibration tokens [S, L]; the first windows stand for all where fewer are enough.

    checkpoint: of the model, whose tokenizer it has; config: transformers' of it.
    Raises UserError for unusable text and for a tokenizer of another model.
    """
    path = checkpoint.path
    length = window_length(config, options.sequence_length)
    tokenizer = load_tokenizer(path, options.trust_remote_code)
    windows = sample_windows(
        options.calibration, tokenizer, options.samples, length, options.seed, say
    )
    require_known_tokens(windows, int(config.vocab_size), path)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.seed))
    return windows[order]


def require_plan_fits(plan: Plan, path: str | None, model: Outline) -> None:
    """Raises UserError if the plan of a file is not for this model."""
    wrong = [
        f"it is for {of_plan}, the model {verb} {of_model}"
        for of_plan, verb, of_model in (
            (plan.architecture, "is", model.layout.name),
            (f"layers {list(plan.layers)}", "has", f"layers {model.moe_layers}"),
            (f"{plan.num_experts} experts", "has", f"{model.num_experts} experts"),
        )
        if of_plan != of_model
    ]
    if wrong:
        raise UserError(f"{path} does not fit the model: {'; '.join(wrong)}")


def open_work(
    options: QuantizeOptions,
    checkpoint: Checkpoint,
    device: torch.device,
    windows: torch.Tensor,
    path: Path,
    command: str,
    asked: QuantizeOptions,
) -> WorkDirectory:
    """The job's folder, new or taken up again; its description is all that decides the result.

    asked: the options before the model or a given plan decided on some.
    """
    source = checkpoint.on_disk
    description = {
        "command": command,
        "mcmoe_version": __version__,
        "format_version": FORMAT_VERSION,
        "torch_version": torch.__version__,
        "device": device.type,
        "model_fingerprint": _fingerprint([source.config, weights_fingerprint(source)]),
        "calibration_fingerprint": _fingerprint(windows.tolist()),
        "plan": read_json(options.plan) if options.plan else None,
        "target_drop": options.target_drop,
        "trust_remote_code": options.trust_remote_code,
        **{name: getattr(options, name) for name in RESULT_FIELDS},
        **named_traits(options.traits),
    }
    kept = {n: v for n, v in changed_flags(asked).items() if n not in NOT_RESTORED}
    description, flags = json.loads(json.dumps([description, kept]))
    return open_work_directory(path, description, options.resume and command != MEASURE, flags)


def resumed_flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a command line that resumes a job: those that the job was started with, and
    those that were given again. `open_work` refuses what differs.

    Raises UserError if there is nothing to resume, and if the job runs code that came with its
    model while that is not asked for again: a work directory from elsewhere could start it.
    """
    path = work_folder(given["output"], given.get("work_dir"))
    require_startable(path, resume=True)
    if not (path / JOB_FILE).exists():
        raise UserError(
            f"the job in {path} was stopped before it kept anything: leave --resume out to begin "
            "again"
        )
    kept = read_job(path).flags
    if unknown := sorted(set(kept) - set(QuantizeOptions.__dataclass_fields__)):
        raise UserError(f"{path / JOB_FILE} holds {count(unknown, 'unknown option')}")
    if kept.get("trust_remote_code") and not given.get("trust_remote_code"):
        raise UserError(
            f"the job in {path} was begun with --trust-remote-code, which no file can stand for: "
            "add it to --resume if you trust the model's code"
        )
    return {**{n: tuple(v) if isinstance(v, list) else v for n, v in kept.items()}, **given}


def _fingerprint(value: Mapping[str, Any] | Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
