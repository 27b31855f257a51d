"""A compressed folder damaged in chosen ways, each at a place that decides what is served.

`DAMAGES` is the table: name -> what edits the folder. What a damage "signs" is recorded in the
manifest as it lies there, as if the fault were of whoever wrote the folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mcmoe_vllm.checkpoint.format import INDEX_FILE, MANIFEST_FILE
from mcmoe_vllm.checkpoint.manifest import write_manifest
from mcmoe_vllm.checkpoint.writing import shard_name
from tests.fuzz.mutants import make_index, split_shard, write_tensors
from tests.helpers.checkpoints import make_checkpoint

Damage = Callable[[Path], object]
Tensors = dict[str, tuple[dict[str, Any], bytes]]

SOUND, PRUNED, FLIPPED = "sound", "a sound pruning table", "a bit of a shard"
WIDTHS = "3210"  # of the experts, the last of them dropped
NORM = "layers.1.input_layernorm.weight"
ROUTER = "layers.1.block_sparse_moe.gate.weight"
EMBEDDING = "embed_tokens.weight"
CODES = "layers.1.self_attn.o_proj.qweight"
SCALES = "layers.1.self_attn.o_proj.scales"
EXPERT_CODES = "layers.1.block_sparse_moe.experts.0.w1.weight_packed"
EXPERT_SCALES = "layers.1.block_sparse_moe.experts.0.w1.weight_scale"
RATIO = 1.0  # of a token's largest weight: all others are dropped
LARGER = 4 << 7  # added to a word of scale and zero: 16 times the scale


def make_folder(folder: Path) -> Path:
    """A small compressed Mixtral whose experts decide much: what is outside the layers, and each
    layer, in a shard."""
    make_checkpoint(folder, "mixtral", WIDTHS)
    (whole,) = folder.glob("*.safetensors")
    parts: dict[str, Tensors] = {}
    for name, (entry, data) in split_shard(whole).items():
        if name.endswith(".weight_scale"):
            data = (np.frombuffer(data, np.int16) + np.int16(LARGER)).tobytes()
        part = name.split(".")[2] if ".layers." in name else ""
        parts.setdefault(part, {})[name] = entry, data
    whole.unlink()
    for number, part in enumerate(sorted(parts), 1):
        write_tensors(folder / shard_name(number, len(parts)), parts[part])
    make_index(folder)
    _sign(folder)
    return folder


# config.json


def put(key: str, value: Any) -> Damage:
    return _config(lambda config, _: config.__setitem__(key, value))


def put_setting(key: str, value: Any) -> Damage:
    """In quantization_config."""
    return _config(lambda _, settings: settings.__setitem__(key, value))


def more(key: str, number: int) -> Damage:
    return _config(lambda config, _: config.__setitem__(key, config[key] + number))


def put_group_size(group: str, size: int) -> Damage:
    return _config(lambda _, settings: settings["group_size"].__setitem__(group, size))


def put_pruning(**changed: Any) -> Damage:
    def change(_: Any, settings: dict[str, Any]) -> None:
        layers = [int(layer) for layer in settings["expert_bits"]]
        settings["pruning"] = {
            "rule": "sensitivity",
            "target_drop": 0.15,
            "layers": layers,
            "ratios": {"0.15": [RATIO] * len(layers)},
            "renormalize": False,
            **changed,
        }

    return _config(change)


def change_widths(change: Callable[[dict[str, list[str]]], object]) -> Damage:
    return _config(lambda _, settings: change(settings["expert_bits"]))


def _config(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Damage:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        change(config, config["quantization_config"])
        file.write_text(json.dumps(config))

    return apply


# Tensors


def change_tensor(
    name: str, change: Callable[[Tensors, str], object], signed: bool = False
) -> Damage:
    """name: the end of it."""

    def apply(folder: Path) -> None:
        for shard in sorted(folder.glob("*.safetensors")):
            tensors = split_shard(shard)
            found = [n for n in tensors if n.endswith(name)]
            if found:
                change(tensors, found[0])
                write_tensors(shard, tensors)
                make_index(folder)
                if signed:
                    _sign(folder)
                return
        raise AssertionError(f"no tensor {name}")

    return apply


signed_tensor = partial(change_tensor, signed=True)


def drop(tensors: Tensors, name: str) -> None:
    del tensors[name]


def add(tensors: Tensors, name: str) -> None:
    tensors[f"{name}.more"] = tensors[name]


def as_dtype(dtype: str) -> Callable[[Tensors, str], None]:
    """Only its name: the bytes stay."""

    def change(tensors: Tensors, name: str) -> None:
        entry, data = tensors[name]
        tensors[name] = {**entry, "dtype": dtype}, data

    return change


def transpose(tensors: Tensors, name: str) -> None:
    """Only the shape in the header: the bytes stay."""
    entry, data = tensors[name]
    tensors[name] = {**entry, "shape": entry["shape"][::-1]}, data


def fill(word: int, words: int | None = None) -> Callable[[Tensors, str], None]:
    """With a word of 16 bits, the first `words` or all."""

    def change(tensors: Tensors, name: str) -> None:
        entry, data = tensors[name]
        count = len(data) // 2 if words is None else words
        tensors[name] = entry, word.to_bytes(2, "little") * count + data[2 * count :]

    return change


# Files


def cut_shard(folder: Path) -> None:
    shard = _shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-1000])


def flip_bit(folder: Path) -> None:
    shard = _shards(folder)[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def drop_shard(folder: Path) -> None:
    _shards(folder)[1].unlink()


def put_index(shard: Callable[[Path], str]) -> Damage:
    """The index says that the first tensor lies in another file."""

    def apply(folder: Path) -> None:
        file = folder / INDEX_FILE
        index = json.loads(file.read_text())
        index["weight_map"][next(iter(index["weight_map"]))] = shard(folder)
        file.write_text(json.dumps(index))

    return apply


def drop_file(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def add_stray(folder: Path) -> None:
    """A file that the index does not name, with other values of tensors that it does."""
    tensors = split_shard(_shards(folder)[0])
    zeros = {name: (entry, bytes(len(data))) for name, (entry, data) in tensors.items()}
    write_tensors(folder / "stray.safetensors", zeros)


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def _sign(folder: Path) -> None:
    write_manifest(folder, [shard.name for shard in _shards(folder)])


def _digit(number: int, digit: str) -> Damage:
    """The width of an expert of layer 1."""
    rows = [WIDTHS[:number] + digit + WIDTHS[number + 1 :]] * 2
    return change_widths(lambda widths: widths.__setitem__("1", rows))


DAMAGES: dict[str, Damage] = {
    SOUND: lambda folder: None,
    PRUNED: put_pruning(),
    "norm as F16": change_tensor(NORM, as_dtype("F16")),
    "codes as F32, signed": signed_tensor(CODES, as_dtype("F32")),
    "router as F16": change_tensor(ROUTER, as_dtype("F16")),
    "codes as F32": change_tensor(CODES, as_dtype("F32")),
    "scales as BF16": change_tensor(SCALES, as_dtype("BF16")),
    "expert scales as U16": change_tensor(EXPERT_SCALES, as_dtype("U16")),
    "router transposed": change_tensor(ROUTER, transpose),
    "expert codes transposed, signed": signed_tensor(EXPERT_CODES, transpose),
    "norm missing": change_tensor(NORM, drop),
    "norm missing, signed": signed_tensor(NORM, drop),
    "router missing, signed": signed_tensor(ROUTER, drop),
    "codes missing, signed": signed_tensor(CODES, drop),
    "scales missing, signed": signed_tensor(SCALES, drop),
    "embedding missing, signed": signed_tensor(EMBEDDING, drop),
    "head missing, signed": signed_tensor("lm_head.weight", drop),
    "expert codes missing, signed": signed_tensor(EXPERT_CODES, drop),
    "expert scales missing, signed": signed_tensor(EXPERT_SCALES, drop),
    "a tensor too many, signed": signed_tensor(NORM, add),
    "norm NaN": change_tensor(NORM, fill(0x7FC0)),
    "norm NaN, signed": signed_tensor(NORM, fill(0x7FC0, 1)),
    "scales NaN, signed": signed_tensor(SCALES, fill(0x7E00, 1)),
    "scales negative, signed": signed_tensor(SCALES, fill(0xBC00, 1)),
    "expert zeros out of range, signed": signed_tensor(EXPERT_SCALES, fill(0xFA00, 4)),
    FLIPPED: flip_bit,
    "a shard cut": cut_shard,
    "a shard absent": drop_shard,
    "index names ../x": put_index(lambda _: "../x.safetensors"),
    "index names /etc/passwd": put_index(lambda _: "/etc/passwd"),
    "index names another shard": put_index(lambda folder: _shards(folder)[1].name),
    "index absent": drop_file(INDEX_FILE),
    "manifest absent": drop_file(MANIFEST_FILE),
    "stray file": add_stray,
    "stray file, index absent": both(add_stray, drop_file(INDEX_FILE)),
    "an expert's width 0": _digit(1, "0"),
    "an expert's width another": _digit(1, "1"),
    "a dropped expert's width 2": _digit(3, "2"),
    "widths lack a layer": change_widths(lambda widths: widths.pop("1")),
    "widths of a layer more": change_widths(lambda widths: widths.update({"2": widths["1"]})),
    "widths of an expert less": change_widths(
        lambda widths: widths.update({k: [row[:-1] for row in v] for k, v in widths.items()})
    ),
    "dense_bits 16": both(put_setting("dense_bits", 16), put_setting("dense_modules", [])),
    "dense_modules other": put_setting("dense_modules", ["mlp"]),
    "group size of linears": put_group_size("dense", 64),
    "group size of experts": put_group_size("w13", 64),
    "format_version 1": put_setting("format_version", 1),
    "a layer less": more("num_hidden_layers", -1),
    "a layer more": more("num_hidden_layers", 1),
    "an expert more": more("num_local_experts", 1),
    "hidden_size twice": _config(lambda c, _: c.update(hidden_size=2 * c["hidden_size"])),
    "heads twice": _config(
        lambda c, _: c.update(num_attention_heads=2 * c["num_attention_heads"], head_dim=None)
    ),
    "rms_norm_eps NaN": put("rms_norm_eps", float("nan")),
    "vocab_size less": more("vocab_size", -8),
    "head tied": put("tie_word_embeddings", True),
    "activation other": put("hidden_act", "relu"),
    "pruning renormalizes 'no'": put_pruning(renormalize="no"),
    "pruning of layer infinity": put_pruning(layers=[float("inf"), 1]),
    "pruning of a layer twice": put_pruning(layers=[0, 1, 1], ratios={"0.15": [RATIO] * 3}),
    "quantization_config a list": put("quantization_config", []),
    "quantization_config a text": put("quantization_config", "mcmoe"),
}


def damaged(sound: Path, folder: Path, name: str) -> Path:
    """A copy of a folder, damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    DAMAGES[name](folder)
    return folder
