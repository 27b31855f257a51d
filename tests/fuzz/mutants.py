"""A folder damaged in one way, chosen by a random generator: `mutate(folder, rng)`.

The kinds of damage are a table; each takes the folder and the generator, edits files, and says in a
line what it did. What they share is that a tool which reads the folder must survive them.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e-30, 1e300, float("inf"), float("nan"),
    2**31, 2**63, 2**70, -(2**63), "", "x", "0", "128", "NaN", "a\0b", "../x", "/etc/passwd",
    "\ud800", "\x1b[31mred", "[/bold]", "name" * 2000, [], {}, [[]], [None], {"a": {}}, [0] * 300,
    ["x"], "silu", "relu", "mcmoe", "float16", "int4",
)  # fmt: skip
RAW_VALUES = ("1e999", "9" * 5000, "[" * 20000 + "]" * 20000, "-Infinity", '"\\ud83d"', "1.", "'x'")
DTYPES = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64", "F8_E4M3", "X9")
ODD_NAMES = (
    "", "x", "model", "model.layers.0", "model.layers.x.mlp.gate.weight", "a/../b", "\x1b[2Jname",
    "n" * 300, "ключ", "lm_head.weight", "model.norm.weight", "model.layers.-1.mlp.gate.weight",
    "model.layers.0.block_sparse_moe.experts.0.w1.weight", "x.block_sparse_moe.experts.0.w1.weight",
    "model.layers.99999999999999999999.block_sparse_moe.experts.0.w1.weight_packed",
)  # fmt: skip

Mutation = Callable[[Path, Random], str]


def mutate(folder: Path, rng: Random, kinds: tuple[str, ...] = ()) -> str:
    """Damage a folder in one way and say how; kinds: names of MUTATIONS, by default any."""
    name = rng.choice(kinds or tuple(MUTATIONS))
    return f"{name}: {MUTATIONS[name](folder, rng)}"


# JSON files


def change_json(folder: Path, rng: Random) -> str:
    file = _json_file(folder, rng)
    value = json.loads(file.read_text(encoding="utf-8"))
    path = _place(value, rng)
    if not path:
        return _replace_text(file, json.dumps(rng.choice(ODD_VALUES)))
    *front, last = path
    inner = value
    for key in front:
        inner = inner[key]
    done = rng.choice(("set", "set", "set", "delete", "rename", "nudge", "raw"))
    before = inner[last]
    if done == "delete":
        del inner[last]
    elif done == "rename" and isinstance(inner, dict):
        inner[rng.choice((*ODD_NAMES, f"{last}_"))] = inner.pop(last)
    elif done == "nudge" and isinstance(before, int | float):
        inner[last] = before + rng.choice((-1, 1, 7)) if before is not True else 2
    elif done == "raw":
        inner[last] = "@@RAW@@"
        text = json.dumps(value).replace('"@@RAW@@"', rng.choice(RAW_VALUES))
        _replace_text(file, text)
        return f"{file.name} {_dotted(path)} raw"
    else:
        inner[last] = rng.choice(ODD_VALUES)
    _replace_text(file, json.dumps(value))
    return f"{file.name} {_dotted(path)} {done} (was {before!r:.40})"


def change_settings(folder: Path, rng: Random) -> str:
    """config.json alone, at its top and in quantization_config, where everything is decided."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    place = config
    if "quantization_config" in config and rng.random() < 0.5:
        place = config["quantization_config"]
    key = rng.choice(sorted(place))
    place[key] = rng.choice(ODD_VALUES)
    _replace_text(file, json.dumps(config))
    return f"config.json {key} = {place[key]!r:.60}"


def damage_text(folder: Path, rng: Random) -> str:
    file = _json_file(folder, rng)
    raw = bytearray(file.read_bytes())
    how = rng.choice(("cut", "flip", "bom", "append", "empty", "utf16", "repeat"))
    at = rng.randrange(len(raw))
    edits: dict[str, Callable[[], bytes]] = {
        "cut": lambda: bytes(raw[:at]),
        "flip": lambda: bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]),
        "bom": lambda: b"\xef\xbb\xbf" + raw,
        "append": lambda: raw + b"\0\xff",
        "empty": lambda: b"",
        "utf16": lambda: bytes(raw).decode().encode("utf-16"),
        "repeat": lambda: bytes(raw) * 2,
    }
    file.write_bytes(edits[how]())
    return f"{file.name} {how}"


def replace_file(folder: Path, rng: Random) -> str:
    """Something that is no file in a file's place."""
    file = folder / rng.choice(sorted(f.name for f in folder.iterdir() if f.is_file()))
    file.unlink()
    kinds: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "folder": lambda: file.mkdir(),
        "fifo": lambda: os.mkfifo(file),
        "loop": lambda: file.symlink_to(file.name),
        "zero": lambda: file.symlink_to("/dev/zero"),
        "dangling": lambda: file.symlink_to("/nowhere/at/all"),
        "outside": lambda: file.symlink_to(folder.parent / "secret"),
        "unreadable": lambda: (file.write_text("{}"), file.chmod(0)),
    }
    kind = rng.choice(sorted(kinds))
    kinds[kind]()
    return f"{file.name} -> {kind}"


# Shards


def change_header(folder: Path, rng: Random) -> str:
    """The header of a shard says something else of the same bytes."""
    shard = _shard(folder, rng)
    header, data = read_shard(shard)
    name = rng.choice(sorted(header))
    entry = header[name]
    how = rng.choice(
        ("dtype", "shape", "offsets", "rename", "type", "extra", "delete", "same place")
    )
    if how == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif how == "shape":
        entry["shape"] = _odd_shape(list(entry["shape"]), rng)
    elif how == "offsets":
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = [begin + rng.choice((-1, 1, 2**40)), rng.choice((0, 2**63, end))]
    elif how == "rename":
        header[rng.choice(ODD_NAMES)] = header.pop(name)
    elif how == "type":
        entry[rng.choice(sorted(entry))] = rng.choice(ODD_VALUES)
    elif how == "extra":
        header["__metadata__"] = rng.choice(({"format": 3}, [], {"format": "np"}, "x"))
    elif how == "delete":
        del header[name]
    else:
        header[f"{name}.copy"] = entry
    write_shard(shard, header, data)
    return f"{shard.name} {name} {how} {header.get(name)!r:.90}"


def damage_bytes(folder: Path, rng: Random) -> str:
    shard = _shard(folder, rng)
    raw = bytearray(shard.read_bytes())
    how = rng.choice(("flip", "flip", "cut", "append", "length", "nan", "zeros"))
    at = rng.randrange(len(raw))
    if how == "flip":
        raw[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        raw = raw[:at]
    elif how == "append":
        raw += bytes(rng.randrange(1, 99))
    elif how == "length":
        raw[:8] = struct.pack("<Q", rng.choice((0, 1, 2**32, 2**63, len(raw))))
    else:
        at = max(at, struct.unpack("<Q", raw[:8])[0] + 8)
        raw[at : at + 64] = (b"\xc0\x7f" * 32 if how == "nan" else bytes(64))[
            : len(raw[at : at + 64])
        ]
    shard.write_bytes(raw)
    return f"{shard.name} {how} at {at}"


def drop_tensor(folder: Path, rng: Random) -> str:
    """A tensor less, or one more, with headers and index that agree."""
    shard = _shard(folder, rng)
    tensors = split_shard(shard)
    name = rng.choice(sorted(tensors))
    how = rng.choice(("drop", "drop", "add", "rename", "other dtype", "other shape"))
    entry, data = tensors[name]
    if how == "drop":
        del tensors[name]
    elif how == "add":
        tensors[rng.choice((f"{name}_scale_inv", f"{name}2", *ODD_NAMES))] = (entry, data)
    elif how == "rename":
        tensors[rng.choice(ODD_NAMES)] = tensors.pop(name)
    elif how == "other dtype":
        same = [d for d in DTYPES[:-1] if d[-2:] == entry["dtype"][-2:] and d != entry["dtype"]]
        tensors[name] = ({**entry, "dtype": rng.choice(same or ["F32"])}, data)
    else:
        tensors[name] = ({**entry, "shape": entry["shape"][::-1]}, data)
    write_tensors(shard, tensors)
    make_index(folder)
    return f"{shard.name} {name} {how}, index agrees"


MUTATIONS: dict[str, Mutation] = {
    "json": change_json,
    "settings": change_settings,
    "text": damage_text,
    "file": replace_file,
    "header": change_header,
    "bytes": damage_bytes,
    "tensor": drop_tensor,
}


def mutate_text(file: Path, rng: Random) -> str:
    """Damage a .jsonl text."""
    lines = file.read_bytes().splitlines()
    words = b"word " * 300
    odd = (
        b'{"text": "\\ud800 ' + words + b'"}', b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}",
        b'{"text": 3}', b"null", b'"x"', b"{}", b"", b"\xff\xfe", b'{"text": ""}', b"\0" * 10,
        b'{"text": "' + b"a" * 20_000 + b'"}', b'{"text": "' + b" " * 20_000 + b'"}',
        b'{"text": "\\u0000\\u001b[31m' + words + b'"}', b'{"text": "x", "text": 1}',
    )  # fmt: skip
    line = rng.choice(odd)
    lines[rng.randrange(len(lines))] = line
    kept = lines[: rng.choice((1, 2, len(lines)))]
    file.write_bytes(b"\n".join(kept))
    return f"{line!r:.60} among {len(kept)} lines"


# How a shard is taken apart and written


def read_shard(shard: Path) -> tuple[dict[str, Any], bytes]:
    raw = shard.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, raw[8 + length :]


def write_shard(shard: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_tensors(shard: Path, tensors: dict[str, tuple[dict[str, Any], bytes]]) -> None:
    header, blob = {}, b""
    for name, (entry, data) in tensors.items():
        header[name] = {**entry, "data_offsets": [len(blob), len(blob) + len(data)]}
        blob += data
    write_shard(shard, header, blob)


def make_index(folder: Path) -> None:
    """The index that the shards' headers lead to."""
    weight_map, total = {}, 0
    for shard in sorted(folder.glob("*.safetensors")):
        header, data = read_shard(shard)
        weight_map |= dict.fromkeys(header, shard.name)
        total += len(data)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def split_shard(shard: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    header, data = read_shard(shard)
    return {n: (e, data[slice(*e["data_offsets"])]) for n, e in header.items()}


def _shard(folder: Path, rng: Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _json_file(folder: Path, rng: Random) -> Path:
    """Large tables are rarely read; what decides is read first, so it is damaged more often."""
    names = sorted(f.name for f in folder.glob("*.json"))
    likely = [n for n in ("config.json", "mcmoe_manifest.json", "plan.json") if n in names]
    return folder / rng.choice(likely if rng.random() < 0.5 else names)


def _replace_text(file: Path, text: str) -> str:
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    return f"{file.name} = {text[:40]}"


def _place(value: Any, rng: Random) -> list[Any]:
    """A path to somewhere in a JSON value."""
    path: list[Any] = []
    while isinstance(value, dict | list) and value and (not path or rng.random() < 0.7):
        key = rng.choice(sorted(value)) if isinstance(value, dict) else rng.randrange(len(value))
        path.append(key)
        value = value[key]
    return path


def _dotted(path: list[Any]) -> str:
    return ".".join(str(key)[:40] for key in path)


def _odd_shape(shape: list[int], rng: Random) -> list[Any]:
    def choices() -> Iterator[list[Any]]:
        yield shape[::-1]
        yield [*shape, 1]
        yield shape[:-1]
        yield [2**70]
        yield [-1, *shape]
        yield [0]
        yield [str(n) for n in shape]
        yield [n + 0.5 for n in shape]
        yield [n * 2 for n in shape[:1]] + [n // 2 for n in shape[1:2]] + shape[2:]

    return rng.choice(list(choices()))
