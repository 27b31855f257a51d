"""Safetensors checkpoints, opened and read: lazily, and warily.

A checkpoint is a folder with config.json and safetensors shards, with or without
model.safetensors.index.json. Only headers are read until a tensor is asked for, and nothing is
ever unpickled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mcmoe_vllm.checkpoint.format import (
    INDEX_FILE,
    QUANT_METHOD,
    SINGLE_FILE,
    QuantizationConfig,
)
from mcmoe_vllm.checkpoint.side_files import HUB_IGNORED
from mcmoe_vllm.disk import explain_os_errors, read_json
from mcmoe_vllm.errors import UserError, count, reason_of


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor; nbytes is its size in the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder: its config.json and the header of every shard."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(t.shape).numel() for t in self.tensors.values())

    @property
    def on_disk(self) -> Checkpoint:
        """The checkpoint as it is stored; another one only for a view of it."""
        return self

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self.tensors if name.startswith(prefix)]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors in memory of their own (nothing stays mapped).

        Raises UserError listing names that the checkpoint lacks.
        """
        names = list(names)
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise UserError(f"{self.path} lacks {count(missing, 'tensor')}")
        by_shard: dict[str, list[str]] = {}
        for name in names:
            by_shard.setdefault(self.tensors[name].shard, []).append(name)
        found: dict[str, torch.Tensor] = {}
        for shard, members in by_shard.items():
            file = self.path / shard
            with explain_os_errors(f"reading {file}"), safe_open(file, framework="pt") as f:
                for name in members:
                    found[name] = f.get_tensor(name).clone()
        return {name: found[name] for name in names}

    def read_weights(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """`read`, refusing weights that hold NaN or infinity (UserError lists them all)."""
        return self.require_finite(self.read(names))

    def require_finite(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors, if none holds NaN or infinity. Raises UserError listing those that do."""
        broken = [n for n, t in tensors.items() if t.is_floating_point() and not _is_finite(t)]
        if broken:
            raise UserError(
                f"{self.path} has NaN or infinite weights in {count(broken, 'tensor')}; "
                "the checkpoint is damaged, download it again"
            )
        return tensors

    def read_slice(self, name: str, index: int) -> torch.Tensor:
        """`tensor[index]` alone, in memory of its own. Raises UserError for NaN and infinity."""
        file = self.path / self.tensors[name].shard
        with explain_os_errors(f"reading {file}"), safe_open(file, framework="pt") as f:
            found = f.get_slice(name)[index].clone()
        return self.require_finite({f"{name}[{index}]": found}).popitem()[1]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a local checkpoint folder and check it as far as headers tell.

    Raises UserError for a missing folder or config.json, an index that names files outside the
    folder, missing, truncated or damaged shards, tensors that the index promises and no shard
    holds, and tensors that two shards hold.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder with a checkpoint")
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{path / 'config.json'} holds no JSON object")
    names = config.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(
            f"{path / 'config.json'} has architectures {names!r}, needs a list of names"
        )
    weight_map = _read_weight_map(path)
    shards = sorted(set(weight_map.values())) if weight_map else _loose_shards(path)
    absent = [s for s in shards if not (path / s).is_file()]
    if absent:
        raise UserError(f"{path} lacks {count(absent, 'shard')}; download the checkpoint again")
    tensors: dict[str, TensorInfo] = {}
    twice = []
    for shard in shards:
        for name, info in read_header(path / shard).items():
            if name in tensors:
                twice.append(f"{name} (in {tensors[name].shard} and {shard})")
            tensors[name] = info
    if twice:
        raise UserError(
            f"{path} holds tensors twice: {count(twice, 'tensor')}; remove the duplicate shard"
        )
    misplaced = [
        f"{name} (promised in {shard})"
        for name, shard in weight_map.items()
        if name not in tensors or tensors[name].shard != shard
    ]
    if misplaced:
        raise UserError(
            f"{path / INDEX_FILE} names tensors that are not where it says: "
            f"{count(misplaced, 'tensor')}; a shard is corrupted or stands under another's name"
        )
    return Checkpoint(path, config, tensors)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file says it holds.

    Raises UserError if the header is damaged or the file is shorter or longer than it says.
    """
    try:
        # The framework only matters to tensors, which are not asked for: of all, numpy maps least.
        with safe_open(path, framework="np") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            return {
                name: _describe(path.name, part.get_dtype(), part.get_shape())
                for name, part in slices.items()
            }
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e}") from None
    except SafetensorError as e:
        raise UserError(
            f"{path} is truncated or corrupted, or no safetensors file ({e}); download it again"
        ) from None


def resolve_model(model: str, revision: str | None = None) -> Path:
    """A local folder as it is, or a Hub repository's safetensors and side files downloaded.

    Raises UserError if it is neither, or the Hub cannot be reached, and for a revision of a folder.
    """
    if os.path.isdir(model):
        if revision is not None:
            raise UserError(
                f"revision is {revision!r}, but {model} is a local folder, which has none"
            )
        return Path(model)
    if os.path.exists(model) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"{model} is not a folder with a checkpoint")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=HUB_IGNORED))
    except HFValidationError as e:
        raise UserError(f"{model} is neither a folder nor the name of a Hub model: {e}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise UserError(
            f"{model} is no local folder and could not be fetched from the Hugging Face Hub "
            f"({type(e).__name__}: {reason_of(e)}); give a local folder, or check the name, the "
            "network and `hf auth login`"
        ) from None


def _read_weight_map(path: Path) -> dict[str, str]:
    if not (path / INDEX_FILE).exists():
        return {}
    index = read_json(path / INDEX_FILE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path / INDEX_FILE} has no weight_map")
    outside = sorted(
        {
            str(shard)
            for shard in weight_map.values()
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", "..")
        }
    )
    if outside:
        raise UserError(
            f"{path / INDEX_FILE} names files outside its folder: {count(outside, 'file')}; "
            "do not use this checkpoint"
        )
    return weight_map


def _loose_shards(path: Path) -> list[str]:
    if (path / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    found = sorted(f.name for f in path.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise UserError(
            f"{path} has {len(found)} safetensors files but no {INDEX_FILE}; "
            "download the checkpoint again"
        )
    pickled = [f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickled:
        raise UserError(
            f"{path} holds only pickled weights ({count(sorted(pickled), 'file')}), which are "
            "never loaded; convert it to safetensors first"
        )
    raise UserError(f"{path} has no safetensors files")


def _describe(shard: str, dtype: str, shape: Sequence[int]) -> TensorInfo:
    # The name of a dtype begins with its bits: F32, BF16, F8_E4M3, U8.
    bits = 8 if dtype == "BOOL" else int(dtype.partition("_")[0].lstrip("BCFIU"))
    return TensorInfo(shard, dtype, tuple(shape), math.prod(shape) * bits // 8)


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.numel():
        return True
    # One pass, unlike that of isfinite; a NaN is the least and the greatest of all.
    wide = tensor.float() if tensor.itemsize == 1 else tensor
    return bool(torch.isfinite(torch.stack(torch.aminmax(wide))).all())


def read_config(checkpoint: Checkpoint) -> QuantizationConfig:
    raw = checkpoint.config.get("quantization_config")
    if raw is None:
        raise UserError(
            f"{checkpoint.path} is not compressed: its config.json has no quantization_config. "
            f"Compress it with: mcmoe quantize {checkpoint.path} -o FOLDER"
        )
    method = raw.get("quant_method") if isinstance(raw, dict) else None
    if isinstance(method, str) and method != QUANT_METHOD:
        raise UserError(
            f"{checkpoint.path} was quantized by another tool (quant_method {method!r}, an mcmoe "
            f"checkpoint has {QUANT_METHOD!r}). Compress the original model with: "
            "mcmoe quantize MODEL -o FOLDER"
        )
    try:
        return QuantizationConfig.from_dict(raw)
    except UserError as e:
        raise UserError(f"{checkpoint.path / 'config.json'}: {e}") from None


def own_config(checkpoint: Checkpoint) -> QuantizationConfig | None:
    """`quantization_config` of a checkpoint that mcmoe made; None for a 16-bit model and for what
    another tool made. Raises UserError for what is none of these."""
    raw = checkpoint.config.get("quantization_config")
    method = raw.get("quant_method") if isinstance(raw, dict) else None
    if raw is None or (isinstance(method, str) and method != QUANT_METHOD):
        return None
    return read_config(checkpoint)
