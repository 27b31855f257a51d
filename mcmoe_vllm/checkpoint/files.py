"""Safetensors checkpoints: read lazily and warily, write atomically, with a hash of every tensor.

A checkpoint is a folder with config.json and safetensors shards, with or without
model.safetensors.index.json. Only headers are read until a tensor is asked for, and nothing is
ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mcmoe_vllm.checkpoint.format import (
    HUB_PATTERNS,
    INDEX_FILE,
    QUANT_METHOD,
    SINGLE_FILE,
    QuantizationConfig,
)
from mcmoe_vllm.disk import explain_os_errors, read_json
from mcmoe_vllm.errors import UserError, count

ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit


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
        tensors = self.read(names)
        broken = [n for n, t in tensors.items() if t.is_floating_point() and not _is_finite(t)]
        if broken:
            raise UserError(
                f"{self.path} has NaN or infinite weights in {count(broken, 'tensor')}; "
                "the checkpoint is damaged, download it again"
            )
        return tensors


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
        size = path.stat().st_size
        with path.open("rb") as f:
            prefix = f.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
                raise UserError(f"{path} is truncated or no safetensors file ({size} bytes)")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        tensors = {
            name: TensorInfo(
                path.name,
                str(entry["dtype"]),
                tuple(int(n) for n in entry["shape"]),
                int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
            )
            for name, entry in header.items()
        }
        spans = sorted(
            (int(e["data_offsets"][0]), int(e["data_offsets"][1]), name)
            for name, e in header.items()
        )
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e}") from None
    except UserError:
        raise
    except (
        AttributeError, ValueError, KeyError, IndexError, TypeError, ArithmeticError, RecursionError
    ) as e:  # fmt: skip
        raise UserError(f"{path} has a damaged safetensors header: {e}") from None
    damaged = [n for n, t in tensors.items() if not _has_its_size(t)]
    end = 0
    for start, stop, name in spans:
        if start != end:  # the format allows neither gaps nor overlaps
            damaged.append(name)
        end = stop
    if damaged:
        raise UserError(
            f"{path} has a damaged safetensors header: wrong places or sizes of "
            f"{count(sorted(set(damaged)), 'tensor')}; download it again"
        )
    if end != size - 8 - length:
        raise UserError(
            f"{path} holds {size - 8 - length} bytes of tensors, its header promises {end}: "
            "the file is truncated or corrupted; download it again"
        )
    return tensors


def resolve_model(model: str, revision: str | None = None) -> Path:
    """A local folder as it is, or a Hub repository's safetensors and side files downloaded.

    Raises UserError if it is neither, or the Hub cannot be reached.
    """
    if os.path.isdir(model):
        return Path(model)
    if os.path.exists(model) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"{model} is not a folder with a checkpoint")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS))
    except HFValidationError as e:
        raise UserError(f"{model} is neither a folder nor the name of a Hub model: {e}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"{model} is no local folder and could not be fetched from the Hugging Face Hub "
            f"({type(e).__name__}: {reason}); give a local folder, or check the name, the network "
            "and `hf auth login`"
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


def _has_its_size(info: TensorInfo) -> bool:
    """Whether a tensor takes as many bytes as dtype and shape say (rare dtypes are not checked)."""
    if min(info.shape, default=0) < 0 or info.nbytes < 0:
        return False
    itemsize = ITEM_SIZES.get(info.dtype)
    return itemsize is None or math.prod(info.shape) * itemsize == info.nbytes


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
            f"{checkpoint.path} was compressed by another tool (quant_method {method!r}, an mcmoe "
            f"checkpoint has {QUANT_METHOD!r}). Compress the original 16-bit model with: "
            "mcmoe quantize MODEL -o FOLDER"
        )
    try:
        return QuantizationConfig.from_dict(raw)
    except UserError as e:
        raise UserError(f"{checkpoint.path / 'config.json'}: {e}") from None
