"""Whether a checkpoint is whole, and whether the model that vLLM built was filled from it.

Before a tensor is read, the folder's headers are compared with its config.json and its manifest;
afterwards, what the model says that it loaded with all its parameters. Experts and int4 linears
count for themselves, since many tensors fill a parameter of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger

from mcmoe_vllm.checkpoint.files import Checkpoint, open_checkpoint, read_config
from mcmoe_vllm.checkpoint.format import MANIFEST_FILE
from mcmoe_vllm.checkpoint.manifest import Manifest, read_manifest
from mcmoe_vllm.checkpoint.verification import wrong_headers
from mcmoe_vllm.errors import UserError, count, some
from mcmoe_vllm.model.agreement import open_layout
from mcmoe_vllm.model.layout import Layout

logger = init_logger("vllm.mcmoe")

REMEDY = "The folder is damaged or was changed after mcmoe wrote it: copy or compress it again."
SHOWN = 8
# What decides how tensors are stored; the other fields of quantization_config do not.
DECISIVE = ("format_version", "group_size", "expert_bits", "dense_bits", "dense_modules")


@dataclass(frozen=True)
class WholeFolder:
    """A folder that is whole as far as headers tell. manifest: None if it has none."""

    checkpoint: Checkpoint
    layout: Layout
    manifest: Manifest | None


def open_whole(folder: Path, model: torch.nn.Module) -> WholeFolder:
    """Open the folder that a model is loaded from.

    Raises UserError for what `open_checkpoint` refuses, for tensors that are missing, too many, or
    of another dtype or shape than config.json or the manifest says, and for a folder that was
    compressed in another way than the model is built for.
    """
    checkpoint = open_checkpoint(folder)
    quantization = read_config(checkpoint)
    layout = open_layout(checkpoint, quantization)
    manifest = read_manifest(folder) if (folder / MANIFEST_FILE).is_file() else None
    refuse_wrong(checkpoint, wrong_headers(checkpoint, manifest))
    differing = {
        name
        for launch in _launches(model)
        for name in DECISIVE
        if getattr(quantization, name) != getattr(launch.config, name)
    }
    if differing:
        raise UserError(
            f"{folder} was compressed in another way than the model that vLLM has built: "
            f"{', '.join(sorted(differing))} differ in quantization_config. Start vLLM with this "
            "folder instead"
        )
    return WholeFolder(checkpoint, layout, manifest)


def refuse_unfilled(model: torch.nn.Module, loaded: set[str] | None) -> None:
    """loaded: parameters that the model's `load_weights` says it has filled, or None if it does not
    say. Raises UserError listing all that it has not, or that hold NaN or infinity."""
    if loaded is None:
        logger.warning(
            "mcmoe: %s does not say what it loads, so that nobody checks that all of it was filled "
            "but experts and int4 linears",
            type(model).__name__,
        )
        return
    counted = set(_counted(model))
    own = [(n, p) for n, p in model.named_parameters() if n not in counted and p.numel()]
    # One parameter may stand in several places, and be loaded under the name of another.
    places = model.named_parameters(remove_duplicate=False)
    filled = {id(parameter) for name, parameter in places if name in loaded}
    missing = [name for name, parameter in own if id(parameter) not in filled]
    broken = [name for name, parameter in own if not _is_finite(parameter.data)]
    if broken and not missing:
        raise UserError(
            f"the checkpoint has NaN or infinite weights in {count(broken, 'parameter')}: it is "
            "damaged, copy or compress it again"
        )
    if missing:
        raise UserError(
            f"the checkpoint does not fill {count(missing, 'parameter')} of "
            f"{type(model).__name__}: it is incomplete, or its config.json (or --hf-overrides, "
            "--convert) asks for more than it holds. `mcmoe inspect --check FOLDER` lists what is "
            "there"
        )


def refuse_wrong(checkpoint: Checkpoint, wrong: list[str]) -> None:
    """Raise UserError if anything is wrong, listing it."""
    if wrong:
        raise UserError(
            f"{checkpoint.path}: {len(wrong)} tensor(s) are not what {MANIFEST_FILE} or "
            f"config.json says:{some(wrong, SHOWN)}\n{REMEDY}"
        )


def _launches(model: torch.nn.Module) -> list[Any]:
    """What the model's layers were built with; nothing where none of them is this plugin's."""
    return list({id(method.launch): method.launch for _, method in _own_methods(model)}.values())


def _counted(model: torch.nn.Module) -> Iterator[str]:
    for prefix, method in _own_methods(model):
        for name in method.counted:
            yield f"{prefix}.{name}" if prefix else name


def _own_methods(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Name of every module that this plugin computes, and its method."""
    for prefix, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if hasattr(method, "counted"):
            yield prefix, method


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    # One pass without a copy; a NaN is the least and the greatest of all.
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
