"""Safetensors checkpoints: read lazily and warily, write atomically, with a hash of every tensor.

A checkpoint is a folder with config.json and safetensors shards, with or without
model.safetensors.index.json. Only headers are read until a tensor is asked for, and nothing is
ever unpickled.
"""

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mcmoe_kernels import packing
from mcmoe_vllm.config import read_json, write_json
from mcmoe_vllm.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MANIFEST_FILE = "mcmoe_manifest.json"
MANIFEST_VERSION = 1
ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit

# Side files that make a folder usable by tokenizers, engines and lawyers.
SIDE_FILE_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
SIDE_FILE_STEMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
OWN_FILES = ("config.json", INDEX_FILE, MANIFEST_FILE, "report.json", "plan.json")
HUB_PATTERNS = ["*.safetensors", *(f"*{s}" for s in SIDE_FILE_SUFFIXES), "LICENSE*", "NOTICE*"]


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
            raise UserError(f"{self.path} lacks {_some(missing)}")
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
                f"{self.path} has NaN or infinite weights in {_some(broken)}; "
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
        raise UserError(f"{path} lacks {_some(absent, 'shard')}; download the checkpoint again")
    tensors: dict[str, TensorInfo] = {}
    twice = []
    for shard in shards:
        for name, info in read_header(path / shard).items():
            if name in tensors:
                twice.append(f"{name} (in {tensors[name].shard} and {shard})")
            tensors[name] = info
    if twice:
        raise UserError(f"{path} holds tensors twice: {_some(twice)}; remove the duplicate shard")
    misplaced = [
        f"{name} (promised in {shard})"
        for name, shard in weight_map.items()
        if name not in tensors or tensors[name].shard != shard
    ]
    if misplaced:
        raise UserError(
            f"{path / INDEX_FILE} names tensors that are not where it says: {_some(misplaced)}; "
            "a shard is corrupted or stands under another's name"
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
            f"{_some(sorted(set(damaged)))}; download it again"
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


def side_files(path: Path, trust_remote_code: bool = False) -> list[Path]:
    """The files of a checkpoint folder, besides weights and config, that a copy needs."""
    return sorted(
        f
        for f in path.iterdir()
        if f.is_file()
        and not f.name.startswith(".")
        and f.name not in OWN_FILES
        and not f.name.endswith(".index.json")
        and (
            f.suffix in SIDE_FILE_SUFFIXES
            or f.name.split(".")[0].upper() in SIDE_FILE_STEMS
            or (trust_remote_code and f.suffix == ".py")
        )
    )


@contextmanager
def explain_os_errors(action: str) -> Iterator[None]:
    """Turn a full disk or a refused write into one sentence (UserError)."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{action} failed: {e.strerror or e} ({e.filename or 'no file'})") from e
    except Exception as e:  # safetensors reports I/O errors through its own class
        if type(e).__name__ == "SafetensorError":
            raise UserError(f"{action} failed: {e}") from e
        raise


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file beside `path`, flush it to the disk and rename."""
    temporary = path.with_name(f".{path.name}.partial")
    with explain_os_errors(f"writing {path}"):
        save_file(
            {name: t.contiguous() for name, t in tensors.items()},
            temporary,
            metadata={"format": "pt"},
        )
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes as safetensors stores them."""
    flat = tensor.detach().contiguous().cpu().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def shard_name(index: int, count: int) -> str:
    """`model-00001-of-00033.safetensors`, index from 1."""
    return f"model-{index:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, shards: Iterable[str]) -> None:
    """Write the weight index and the hash manifest of finished shards."""
    weight_map: dict[str, str] = {}
    tensor_hashes: dict[str, str] = {}
    shard_hashes: dict[str, dict[str, Any]] = {}
    total = 0
    for shard in shards:
        file = folder / shard
        shard_hashes[shard] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        with safe_open(file, framework="pt") as f:
            for name in sorted(f.keys()):
                tensor = f.get_tensor(name)
                weight_map[name] = shard
                tensor_hashes[name] = tensor_sha256(tensor)
                total += tensor.numel() * tensor.element_size()
    with explain_os_errors(f"writing {folder / INDEX_FILE}"):
        write_json(
            folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
        write_json(
            folder / MANIFEST_FILE,
            {
                "format_version": MANIFEST_VERSION,
                "shards": shard_hashes,
                "tensors": tensor_hashes,
            },
        )


def stored_scale(tensor: torch.Tensor, bits: int, name: str) -> torch.Tensor:
    """An expert's weight_scale as format version 2 stores it: int16 [N, K/G].

    tensor: that, or the float16 [N, 2*K/G] of version 1. Raises UserError, naming the tensor, for
    what does not fit into version 2.
    """
    if tensor.dtype != torch.float16:
        return tensor
    try:
        return packing.upgrade_scale(tensor, bits)
    except ValueError as e:
        raise UserError(
            f"{name} of format version 1 cannot be read: {e}. Compress the model again."
        ) from None


def read_manifest(path: Path) -> dict[str, Any]:
    """A folder's hash manifest: {"shards": {file: {"bytes", "sha256"}}, "tensors": {name: sha256}}.

    Raises UserError if it is missing, of a newer version, or of another structure.
    """
    file = path / MANIFEST_FILE
    manifest = read_json(file)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version > MANIFEST_VERSION:
        raise UserError(
            f"{file} has format_version {version}, this mcmoe-vllm reads up to "
            f"{MANIFEST_VERSION}: upgrade with pip install -U mcmoe-vllm"
        )
    sound = (
        version == MANIFEST_VERSION
        and isinstance(manifest.get("shards"), dict)
        and isinstance(manifest.get("tensors"), dict)
        and all(
            isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry)
            for entry in manifest["shards"].values()
        )
    )
    if not sound:
        raise UserError(f"{file} is no manifest of hashes; download the checkpoint again")
    return manifest


def copy_side_files(source: Path, target: Path, trust_remote_code: bool = False) -> list[str]:
    """Copy tokenizer, generation config, chat template and licence files; their names."""
    files = side_files(source, trust_remote_code)
    with explain_os_errors(f"copying the tokenizer's files to {target}"):
        for file in files:
            shutil.copyfile(file, target / file.name)
    return [f.name for f in files]


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
            f"{path / INDEX_FILE} names files outside its folder: {_some(outside)}; "
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
            f"{path} holds only pickled weights ({_some(sorted(pickled))}), which are never "
            "loaded; convert it to safetensors first"
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


def _some(names: list[str], noun: str = "tensor") -> str:
    """`3 tensors: a, b, c`: all of a short list, the first ten of a long one."""
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"{len(names)} {noun}{'s' * (len(names) != 1)}: {shown}"
