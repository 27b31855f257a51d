"""vLLM's loaders of an mcmoe model: what they read is whole, and all of the model was filled.

`--load-format mcmoe` compares every tensor with the manifest's SHA-256 (docs/FORMAT.md) as well. A
rank reads only what it needs: with expert parallelism, experts of other ranks stay on the disk.
Under tensor parallelism each rank reads whole tensors, because the hash is of the whole.
"""

from __future__ import annotations

import copy
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from safetensors import safe_open
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import maybe_download_from_modelscope

from mcmoe_vllm.checkpoint.format import MANIFEST_FILE, QUANT_METHOD
from mcmoe_vllm.checkpoint.manifest import tensor_sha256
from mcmoe_vllm.checkpoint.side_files import HUB_IGNORED
from mcmoe_vllm.checkpoint.verification import names_by_shard
from mcmoe_vllm.disk import explain_os_errors
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.layout import Layout
from mcmoe_vllm.model.memory import peak_rss_bytes
from mcmoe_vllm.plugin.completeness import WholeFolder, open_whole, refuse_unfilled, refuse_wrong

logger = init_logger("vllm.mcmoe")

MIB = 1 << 20
_EXPERT = re.compile(r"(?:^|\.)layers\.(\d+)\..*\bexperts\.(\d+)\.(\w+)")
# Gate, up and down as a class of vLLM wants them of every folder, where it wants one name in one
# version and another in the next.
OWN_NAMES = {"GraniteMoeForCausalLM": ("w1", "w3", "w2")}
# (name, tensor) of a checkpoint, one after another
Weights = Iterator[tuple[str, torch.Tensor]]


class CheckedModelLoader(DefaultModelLoader):
    """vLLM's default loader, in whose place it is registered. Of an mcmoe model it finds out before
    and after it loads whether something is missing; any other model it loads as ever."""

    load_config: Any
    _checks = False  # whether it loads an mcmoe model
    _checked = False

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        super().load_weights(model, model_config)
        if self._checks and not self._checked:
            raise UserError(
                f"vLLM {vllm.__version__} does not tell what it loads, so that the model might be "
                "incomplete unnoticed: use vLLM 0.26 to 0.33"
            )

    def get_all_weights(self, model_config: ModelConfig, model: Any) -> Weights:
        """Checks at once, not with the first tensor: vLLM's reload_weights makes room between."""
        self._checks = is_mcmoe(model_config)
        if not self._checks:
            return super().get_all_weights(model_config, model)
        self.enable_weights_track = True
        weights = self.get_checked_weights(model_config, model)
        forget_packed_copies(model)
        return weights

    def get_checked_weights(self, model_config: ModelConfig, model: Any) -> Weights:
        """The tensors of an mcmoe model's folder, which is whole as far as headers tell."""
        folder = open_whole(find_folder(model_config, self.load_config), model)
        if self.load_config.load_format == "auto":
            # In a folder that holds a consolidated*.safetensors as well, "auto" would read that.
            self.load_config = copy.copy(self.load_config)
            self.load_config.load_format = "hf"
        return agree_on_names(super().get_all_weights(model_config, model), folder.layout, model)

    def track_weights_loading(
        self, model: Any, loaded_weights: set[str] | None, *args: Any, **kwargs: Any
    ) -> None:
        """What vLLM calls when all is loaded."""
        if not self._checks:
            super().track_weights_loading(model, loaded_weights, *args, **kwargs)
            return
        refuse_unfilled(model, loaded_weights)
        self._checked = True


class McmoeModelLoader(CheckedModelLoader):
    """vLLM's loader for the load format "mcmoe"; the weights equal those of its default loader."""

    def download_model(self, model_config: ModelConfig) -> None:
        find_folder(model_config, self.load_config)

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        start = time.perf_counter()
        super().load_weights(model, model_config)
        count = self._count
        if not count.finished:
            raise UserError(
                f"vLLM took {count.tensors + count.skipped} tensors of {model_config.model} and "
                "left the others, whose hashes are not checked"
            )
        logger.info(
            "mcmoe: read %d tensors, %.1f MiB in %.2f s, their %s are the manifest's%s, peak "
            "memory of the process %.0f MiB",
            count.tensors,
            count.bytes / MIB,
            time.perf_counter() - start,
            "SHA-256, dtypes and shapes" if self._uncovered is None else "SHA-256",
            f"; {count.skipped} of other ranks' experts are left to those" * bool(count.skipped),
            peak_rss_bytes() / MIB,
        )
        if self._uncovered is not None:
            logger.warning("mcmoe: %s", self._uncovered)

    def get_all_weights(self, model_config: ModelConfig, model: Any) -> Weights:
        if not is_mcmoe(model_config):
            raise UserError(
                f"{model_config.model} is not compressed, --load-format mcmoe reads nothing else: "
                "drop it, or name another format for a draft model in --speculative-config"
            )
        return super().get_all_weights(model_config, model)

    def get_checked_weights(self, model_config: ModelConfig, model: Any) -> Weights:
        """The same, each tensor by its hash."""
        folder = open_whole(find_folder(model_config, self.load_config), model)
        if folder.manifest is None:
            raise UserError(
                f"{folder.checkpoint.path} has no {MANIFEST_FILE}, which --load-format mcmoe "
                "checks tensors against. Drop --load-format to load the folder without, or "
                "compress the model again."
            )
        self._count, self._uncovered = ReadCount(), folder.manifest.uncovered
        self.counter_before_loading_weights = time.perf_counter()
        weights = read_verified(folder, remote_experts(folder.layout, model), self._count)
        return agree_on_names(weights, folder.layout, model)


def forget_packed_copies(model: torch.nn.Module) -> None:
    """Before weights are loaded anew on a CPU: a head that is tied to the embedding computes from
    the embedding's weight, not from the copy of it that vLLM packs once and loads never again."""
    owners: dict[int, list[Any]] = {}
    for module in model.modules():
        if "weight" in module._parameters:
            owners.setdefault(id(module.weight), []).append(module)
    for modules in owners.values():
        for module in modules if len(modules) > 1 else ():
            if hasattr(module, "cpu_linear"):
                module.cpu_linear = torch.nn.functional.linear


def agree_on_names(weights: Weights, layout: Layout, model: torch.nn.Module) -> Weights:
    """Let vLLM's layers take gate, up and down of an expert as the folder calls them, and call them
    otherwise where the model's class asks for names of its own."""
    if layout.projections in (None, layout.skeleton.architecture.projections):
        # The class's own code loads these.
        return weights
    wanted = OWN_NAMES.get(type(model).__name__, layout.projections)
    for layer in model.modules():
        if hasattr(getattr(layer, "quant_method", None), "local"):
            names: Any = layer
            names.ckpt_gate_proj_name, names.ckpt_up_proj_name, names.ckpt_down_proj_name = wanted
    if wanted == layout.projections:
        return weights
    return _renamed(weights, layout, dict(zip(layout.projections, wanted, strict=True)))


def _renamed(weights: Weights, layout: Layout, names: Mapping[str, str]) -> Weights:
    for name, tensor in weights:
        match = _EXPERT.search(name) if layout.is_routed_expert(name) else None
        if match is not None:
            name = name[: match.start(3)] + names[match[3]] + name[match.end(3) :]
        yield name, tensor


def is_mcmoe(model_config: ModelConfig) -> bool:
    return str(model_config.quantization).lower() == QUANT_METHOD


def find_folder(model_config: ModelConfig, load_config: Any) -> Path:
    """The local folder of a model, which is downloaded if need be."""
    name, revision = model_config.model, model_config.revision
    name = maybe_download_from_modelscope(name, revision) or name
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    cache = load_config.download_dir
    return Path(
        snapshot_download(name, revision=revision, cache_dir=cache, ignore_patterns=HUB_IGNORED)
    )


@dataclass
class ReadCount:
    """What `read_verified` has read so far. finished: it came to its end and all was right."""

    tensors: int = 0
    bytes: int = 0
    skipped: int = 0
    finished: bool = False


def read_verified(
    folder: WholeFolder, is_remote: Callable[[str], bool], count: ReadCount
) -> Weights:
    """Yield (name, tensor) of every tensor whose hash is right, except those of remote experts.

    Raises UserError at the end, naming every tensor whose bytes have another hash.
    """
    checkpoint, manifest = folder.checkpoint, folder.manifest
    assert manifest is not None, "nothing to verify with"
    wrong = []
    for shard, names in names_by_shard(checkpoint).items():
        file = checkpoint.path / shard
        with explain_os_errors(f"reading {file}"), safe_open(file, framework="pt") as f:
            for name in names:
                if is_remote(name):
                    count.skipped += 1
                    continue
                tensor = f.get_tensor(name)
                count.tensors += 1
                count.bytes += tensor.nbytes
                if tensor_sha256(tensor) == manifest.tensors[name].sha256:
                    yield name, tensor
                else:
                    wrong.append(f"{name} has another SHA-256 (in {shard})")
    refuse_wrong(checkpoint, wrong)
    count.finished = True


def remote_experts(layout: Layout, model: torch.nn.Module) -> Callable[[str], bool]:
    """Whether a checkpoint name belongs to an expert that another rank holds."""
    held: dict[int, Mapping[int, int]] = {}
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "local") and hasattr(method, "layer_index"):
            held[method.layer_index] = method.local

    def is_remote(name: str) -> bool:
        match = _EXPERT.search(name) if layout.is_routed_expert(name) else None
        if match is None:
            return False
        layer, expert = int(match.group(1)), int(match.group(2))
        return layer in held and expert not in held[layer]

    return is_remote
