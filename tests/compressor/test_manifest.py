"""The manifest: what it records, what of it is believed, and what headers are held against."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.checkpoint.format import MANIFEST_FILE
from mcmoe_vllm.checkpoint.manifest import RecordedTensor, read_manifest, write_manifest
from mcmoe_vllm.checkpoint.verification import wrong_headers
from mcmoe_vllm.cli import main
from mcmoe_vllm.disk import read_json, write_json
from mcmoe_vllm.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
SHARD = "model-00001-of-00001.safetensors"
NORM, SCALES = "model.norm.weight", "model.layers.0.self_attn.o_proj.scales"


@pytest.fixture
def folder(tmp_path):
    """The golden checkpoint, whose manifest is of version 1, with one of version 2."""
    copy = tmp_path / "model"
    shutil.copytree(GOLDEN / "format_v2", copy)
    write_manifest(copy, [SHARD])
    return copy


def relabel(folder, name, **changes):
    """Change what the header says of a tensor, not its bytes."""
    raw = (folder / SHARD).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header[name] |= changes
    text = json.dumps(header).encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def wrong(folder, manifest=True):
    return wrong_headers(open_checkpoint(folder), read_manifest(folder) if manifest else None)


def edit(folder, change):
    content = read_json(folder / MANIFEST_FILE)
    change(content)
    write_json(folder / MANIFEST_FILE, content)


def test_version_2_is_written_as_it_always_was(folder):
    assert (folder / MANIFEST_FILE).read_bytes() == (GOLDEN / "manifest_v2.json").read_bytes()


def test_both_versions_are_read(folder):
    old, new = read_manifest(GOLDEN / "format_v2"), read_manifest(folder)
    assert (old.version, new.version) == (1, 2) and old.shards == new.shards
    assert new.tensors[NORM] == RecordedTensor(old.tensors[NORM].sha256, "BF16", (64,))
    assert old.tensors[NORM].dtype is None and old.tensors.keys() == new.tensors.keys()
    assert new.uncovered is None and "no tensor's dtype and shape" in old.uncovered


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(tensors=[]),
        lambda m: m.pop("shards"),
        lambda m: m["shards"].update({SHARD: 3}),
        lambda m: m["shards"][SHARD].update(bytes="5"),
        lambda m: m["shards"][SHARD].update(bytes=True),
        lambda m: m["shards"][SHARD].update(sha256="0"),
        lambda m: m["tensors"].update({NORM: "0" * 64}),  # as in version 1
        lambda m: m["tensors"][NORM].update(sha256="G" * 64),
        lambda m: m["tensors"][NORM].update(dtype=None),
        lambda m: m["tensors"][NORM].update(shape=64),
        lambda m: m["tensors"][NORM].update(shape=[-64]),
        lambda m: m["tensors"][NORM].update(shape=[64.0]),
        lambda m: m["tensors"][NORM].pop("shape"),
        lambda m: m["tensors"][NORM].update(more=1),
    ],
)
def test_a_manifest_of_another_structure_is_refused(folder, change):
    edit(folder, change)
    with pytest.raises(UserError, match="is no manifest of version 2"):
        read_manifest(folder)


@pytest.mark.parametrize("version", [None, 0, 3, True, "2", 2.0])
def test_a_manifest_of_another_version_is_refused(folder, version):
    edit(folder, lambda m: m.update(format_version=version))
    with pytest.raises(UserError, match="format_version"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (NORM, {"dtype": "F16"}),
        (SCALES, {"dtype": "BF16"}),
        (NORM, {"shape": [8, 8]}),
        ("model.embed_tokens.weight", {"shape": [64, 8]}),  # as many numbers, of other tokens
    ],
)
def test_the_same_bytes_under_another_header_are_told(folder, name, changes):
    assert wrong(folder) == []
    relabel(folder, name, **changes)
    (line,) = wrong(folder)
    assert line.startswith(f"{name} is") and f"{MANIFEST_FILE} says" in line


@pytest.mark.parametrize("recorded", ["version 1", "none"])
@pytest.mark.parametrize(
    ("told", "dtype", "said"),
    [
        ("bfloat16", "F16", "config.json says BF16"),
        ("torch.float16", "F16", None),  # and then all others are wrong
        (None, "F16", "most others are BF16"),
        ("float32", "F16", "most others are BF16"),
        ("bfloat16", "I16", "config.json says BF16"),
    ],
)
def test_without_a_record_there_is_one_16_bit_dtype(folder, recorded, told, dtype, said):
    shutil.copyfile(GOLDEN / "format_v2" / MANIFEST_FILE, folder / MANIFEST_FILE)
    config = read_json(folder / "config.json")
    del config["dtype"]
    write_json(folder / "config.json", {**config, "torch_dtype": told} if told else config)
    relabel(folder, NORM, dtype=dtype)
    found = wrong(folder, manifest=recorded == "version 1")
    if said is None:
        assert len(found) > 1 and not any(line.startswith(NORM) for line in found)
    else:
        assert found == [f"{NORM} is {dtype}, {said}"]


def test_a_float32_router_is_no_offender(folder):
    relabel(folder, NORM, dtype="F32", shape=[32])
    assert wrong(folder, manifest=False) == []


def test_inspect_says_what_version_1_leaves_open(folder, capsys):
    assert main(["inspect", str(folder), "--check", "--json"]) == 0
    assert capsys.readouterr().err == "all checks passed\n"
    assert main(["inspect", str(GOLDEN / "format_v2"), "--check", "--json"]) == 0
    said = capsys.readouterr().err
    assert "not checked: mcmoe_manifest.json is of version 1" in said
