"""`--load-format mcmoe`: read a checkpoint, checking every tensor against its manifest.

The manifest (docs/FORMAT.md) names every tensor with the SHA-256 of its bytes. A rank reads only
what it needs: with expert parallelism, experts of other ranks stay on the disk. Under tensor
parallelism each rank reads whole tensors, because the hash is of the whole.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from mcmoe_vllm.checkpoint.files import Checkpoint, open_checkpoint
from mcmoe_vllm.checkpoint.format import MANIFEST_FILE
from mcmoe_vllm.checkpoint.manifest import read_manifest, tensor_sha256
from mcmoe_vllm.checkpoint.side_files import HUB_IGNORED
from mcmoe_vllm.disk import explain_os_errors
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.memory import peak_rss_bytes

logger = init_logger("vllm.mcmoe")

REMEDY = (
    "The folder is damaged or was changed after mcmoe wrote it: copy or compress it again. "
    "Without --load-format mcmoe vLLM would load it unchecked."
)
SHOWN = 8
MIB = 1 << 20
_EXPERT = re.compile(r"\.layers\.(\d+)\..*\bexperts\.(\d+)\.")


class McmoeModelLoader(BaseModelLoader):
    """vLLM's loader for the load format "mcmoe"; the weights equal those of its default loader."""

    def download_model(self, model_config: ModelConfig) -> None:
        self._folder(model_config)

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        start, count = time.perf_counter(), ReadCount()
        checkpoint = open_checkpoint(self._folder(model_config))
        hashes = read_hashes(checkpoint)
        model.load_weights(read_verified(checkpoint, hashes, remote_experts(model), count))
        logger.info(
            "mcmoe: read %d tensors, %.1f MiB in %.2f s, all hashes right, %d skipped as other "
            "ranks' experts, peak memory of the process %.0f MiB",
            count.tensors,
            count.bytes / MIB,
            time.perf_counter() - start,
            count.skipped,
            peak_rss_bytes() / MIB,
        )

    def _folder(self, model_config: ModelConfig) -> Path:
        if os.path.isdir(model_config.model):
            return Path(model_config.model)
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                model_config.model,
                revision=model_config.revision,
                cache_dir=self.load_config.download_dir,
                ignore_patterns=HUB_IGNORED,
            )
        )


@dataclass
class ReadCount:
    """What `read_verified` has read so far."""

    tensors: int = 0
    bytes: int = 0
    skipped: int = 0


def read_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor name -> SHA-256, from the manifest.

    Raises UserError for a manifest that is missing, newer or no manifest, and for tensors that
    only one of manifest and shards names.
    """
    file = checkpoint.path / MANIFEST_FILE
    if not file.is_file():
        raise UserError(
            f"{checkpoint.path} has no {MANIFEST_FILE}, which --load-format mcmoe checks tensors "
            f"against. Drop --load-format to load the folder unchecked, or compress the model "
            f"again."
        )
    hashes: dict[str, str] = read_manifest(checkpoint.path)["tensors"]
    _refuse(
        checkpoint,
        [
            *(f"{n}: in the manifest, in no shard" for n in hashes if n not in checkpoint),
            *(
                f"{n}: in a shard, not in the manifest"
                for n in checkpoint.names()
                if n not in hashes
            ),
        ],
    )
    return hashes


def read_verified(
    checkpoint: Checkpoint,
    hashes: Mapping[str, str],
    is_remote: Callable[[str], bool],
    count: ReadCount,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every tensor whose hash is right, except those of remote experts.

    Raises UserError at the end, naming every tensor whose bytes have another hash.
    """
    by_shard: dict[str, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        by_shard.setdefault(info.shard, []).append(name)
    wrong = []
    for shard, names in by_shard.items():
        file = checkpoint.path / shard
        with explain_os_errors(f"reading {file}"), safe_open(file, framework="pt") as f:
            for name in names:
                if is_remote(name):
                    count.skipped += 1
                    continue
                tensor = f.get_tensor(name)
                count.tensors += 1
                count.bytes += tensor.nbytes
                if tensor_sha256(tensor) == hashes[name]:
                    yield name, tensor
                else:
                    wrong.append(f"{name} in {shard}: the SHA-256 of its bytes is another one")
    _refuse(checkpoint, wrong)


def remote_experts(model: torch.nn.Module) -> Callable[[str], bool]:
    """Whether a checkpoint name belongs to an expert that another rank holds."""
    held: dict[int, Mapping[int, int]] = {}
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "local") and hasattr(method, "layer_index"):
            held[method.layer_index] = method.local

    def is_remote(name: str) -> bool:
        match = _EXPERT.search(name)
        if match is None:
            return False
        layer, expert = int(match.group(1)), int(match.group(2))
        return layer in held and expert not in held[layer]

    return is_remote


def _refuse(checkpoint: Checkpoint, wrong: list[str]) -> None:
    """Raise UserError if anything is wrong, listing it."""
    if not wrong:
        return
    shown = "".join(f"\n  - {line}" for line in wrong[:SHOWN])
    rest = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    raise UserError(
        f"{checkpoint.path}: {len(wrong)} tensor(s) are not what {MANIFEST_FILE} says:{shown}{rest}"
        f"\n{REMEDY}"
    )
