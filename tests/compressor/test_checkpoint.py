"""Checkpoints come from the internet and disks fill up: every damage has its sentence, and no
write leaves half a file."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcmoe_vllm.checkpoint import writing
from mcmoe_vllm.checkpoint.files import open_checkpoint, read_header, resolve_model
from mcmoe_vllm.checkpoint.format import INDEX_FILE, MANIFEST_FILE
from mcmoe_vllm.checkpoint.manifest import file_sha256, tensor_sha256, write_manifest
from mcmoe_vllm.checkpoint.writing import shard_name, write_index, write_shard
from mcmoe_vllm.errors import UserError

FIRST, SECOND = shard_name(1, 2), shard_name(2, 2)
TENSORS = {
    FIRST: {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)},
    SECOND: {"c": torch.tensor([[1, 2]], dtype=torch.uint8), "d": torch.tensor(3.0)},
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"architectures": ["MixtralForCausalLM"]}')
    for shard, tensors in TENSORS.items():
        write_shard(path / shard, tensors)
    write_index(path, TENSORS)
    write_manifest(path, TENSORS)
    return path


def edit_index(folder, edit):
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def write_raw(file, header, data=b""):
    """A safetensors file with any header: bytes, or an object to encode."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_reads_what_was_written(folder):
    found = open_checkpoint(folder)
    assert sorted(found.tensors) == ["a", "b", "c", "d"] and "a" in found and "x" not in found
    assert found.tensors["a"].shape == (2, 3) and found.tensors["a"].dtype == "F32"
    assert found.nbytes == 24 + 8 + 2 + 4 and found.num_parameters == 6 + 4 + 2 + 1
    tensors = found.read(["d", "a"])
    assert list(tensors) == ["d", "a"]
    assert torch.equal(tensors["a"], TENSORS[FIRST]["a"]) and tensors["d"].item() == 3


def test_reads_one_file_without_an_index(folder):
    for name in (INDEX_FILE, SECOND):
        (folder / name).unlink()
    assert sorted(open_checkpoint(folder).tensors) == ["a", "b"]
    (folder / FIRST).rename(folder / "model.safetensors")
    (folder / "extra.safetensors").write_bytes(b"not looked at")
    assert sorted(open_checkpoint(folder).tensors) == ["a", "b"]


def test_names_that_are_missing_are_listed_and_the_rest_counted(folder):
    found = open_checkpoint(folder)
    with pytest.raises(UserError, match="lacks 2 tensors: x, y$"):
        found.read(["x", "a", "y"])
    with pytest.raises(UserError, match="lacks 1 tensor: x$"):
        found.read(["x"])
    with pytest.raises(UserError, match="lacks 12 tensors: x0, .*, x9, and 2 more$"):
        found.read([f"x{i}" for i in range(12)])
    with pytest.raises(UserError, match="lacks 10 tensors: x0, .*, x9$"):
        found.read([f"x{i}" for i in range(10)])


# Folders and config.json


def test_not_a_folder(folder):
    for path in (folder / "config.json", folder / "gone"):
        with pytest.raises(UserError, match="is not a folder with a checkpoint"):
            open_checkpoint(path)
    with pytest.raises(UserError, match="is not a folder"):
        resolve_model(str(folder / "gone"))
    assert resolve_model(str(folder)) == folder
    with pytest.raises(UserError, match="revision is 'main', but .* is a local folder"):
        resolve_model(str(folder), "main")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json does not exist"),
        ("{'a': 1}", "config.json is not valid JSON"),
        ("[1]", "holds no JSON object"),
        ('{"architectures": "MixtralForCausalLM"}', "needs a list of names"),
        ('{"architectures": [["MixtralForCausalLM"]]}', "needs a list of names"),
    ],
)
def test_unusable_config(folder, content, message):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder)


def test_folder_without_weights(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / INDEX_FILE).unlink()
    with pytest.raises(UserError, match="has no safetensors files"):
        open_checkpoint(folder)


def test_pickled_weights_are_named_and_never_loaded(folder):
    class Bomb:
        def __reduce__(self):
            return (shutil.rmtree, (str(folder),))

    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / INDEX_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"only pickled weights .*pytorch_model.bin.* never loaded"):
        open_checkpoint(folder)
    assert folder.exists()


# The index


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "3"])
def test_index_without_weight_map(folder, content):
    (folder / INDEX_FILE).write_text(content)
    with pytest.raises(UserError, match="has no weight_map"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "shard", ["../x", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a/../x", 5, None, ["x"]]
)
def test_index_that_points_outside_the_folder(folder, shard):
    # The target exists: it must be refused for its place, not for being absent.
    (folder.parent / "x").write_bytes((folder / FIRST).read_bytes())
    edit_index(folder, lambda index: index["weight_map"].update(a=shard))
    with pytest.raises(UserError, match="names files outside its folder: .*do not use"):
        open_checkpoint(folder)


def test_several_shards_without_index(folder):
    (folder / INDEX_FILE).unlink()
    with pytest.raises(UserError, match="2 safetensors files but no model.safetensors.index.json"):
        open_checkpoint(folder)


def test_missing_shard(folder):
    (folder / SECOND).unlink()
    with pytest.raises(UserError, match=f"lacks 1 shard: {SECOND}; download"):
        open_checkpoint(folder)


def test_tensor_in_two_shards(folder):
    write_shard(folder / SECOND, {**TENSORS[SECOND], "a": torch.zeros(2, 3)})
    with pytest.raises(UserError, match=rf"tensors twice: .*a \(in {FIRST} and {SECOND}\)"):
        open_checkpoint(folder)


def test_shard_under_anothers_name(folder):
    shutil.move(folder / FIRST, folder / "x")
    shutil.move(folder / SECOND, folder / FIRST)
    shutil.move(folder / "x", folder / SECOND)
    with pytest.raises(UserError, match="4 tensors: .*under another's name"):
        open_checkpoint(folder)
    shutil.copy(folder / FIRST, folder / SECOND)
    with pytest.raises(UserError, match="tensors twice"):
        open_checkpoint(folder)


def test_tensor_that_no_shard_holds(folder):
    edit_index(folder, lambda index: index["weight_map"].update(e=SECOND))
    with pytest.raises(UserError, match=r"not where it says: 1 tensor: e \(promised in"):
        open_checkpoint(folder)


# Damaged shards


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1, -10])
def test_truncated_shard(folder, keep):
    data = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(data[:keep])
    with pytest.raises(UserError, match=f"{FIRST}.*truncated"):
        open_checkpoint(folder)


def test_shard_with_bytes_too_many(folder):
    with (folder / FIRST).open("ab") as f:
        f.write(b"\0" * 8)
    with pytest.raises(UserError, match=f"{FIRST} is truncated or corrupted"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe garbage",
        b"{",
        b"[" * 100_000,
        [],
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]},
        },
        {"a": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}},
    ],
    ids=str,
)
def test_damaged_header(tmp_path, header):
    write_raw(tmp_path / "x.safetensors", header, b"\0" * 4)
    with pytest.raises(UserError, match=r"x\.safetensors is truncated or corrupted"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [0, 1 << 40, (1 << 64) - 1])
def test_header_of_impossible_length(tmp_path, length):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}" * 20)
    with pytest.raises(UserError, match=r"x\.safetensors is .*no safetensors file"):
        read_header(file)


def test_a_folder_in_a_shards_place(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read"):
        read_header(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("BOOL", [3], 3),
        ("U8", [3], 3),
        ("F8_E4M3", [2, 2], 4),
        ("BF16", [], 2),
        ("I32", [0, 4], 0),
        ("C64", [2], 16),
        ("F4", [6], 3),  # half a byte each
        ("F6_E2M3", [4], 3),
    ],
)
def test_bytes_of_a_tensor_follow_from_its_dtype(tmp_path, dtype, shape, nbytes):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}
    write_raw(tmp_path / "x.safetensors", {"a": entry}, b"\0" * nbytes)
    info = read_header(tmp_path / "x.safetensors")["a"]
    assert (info.dtype, info.shape, info.nbytes) == (dtype, tuple(shape), nbytes)


def test_opening_reads_headers_alone(tmp_path):
    nbytes = 1 << 36  # of holes: reading them would take minutes and 64 GiB
    entry = {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}
    write_raw(tmp_path / "model.safetensors", {"a": entry})
    with (tmp_path / "model.safetensors").open("r+b") as f:
        f.truncate(f.seek(0, os.SEEK_END) + nbytes)
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).nbytes == nbytes


def test_unknown_dtype_is_refused(folder):
    entry = {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}
    write_raw(folder / "model.safetensors", {"a": entry}, b"\0" * 4)
    (folder / INDEX_FILE).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is .*unknown variant `X9`"):
        open_checkpoint(folder)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_shards_have_the_mode_that_the_user_set(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_shard(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite(folder, value, dtype):
    bad = torch.ones(2, 3, dtype=dtype)
    bad[1, 2] = value
    write_shard(folder / FIRST, {"a": bad, "b": bad.flatten().clone()})
    found = open_checkpoint(folder)
    with pytest.raises(UserError, match="NaN or infinite weights in 2 tensors: a, b"):
        found.read_weights(["a", "b", "c"])
    assert not torch.isfinite(found.read(["a"])["a"]).all()
    assert found.read_weights(["c"])["c"].tolist() == [[1, 2]]


# Writing


def test_shards_are_readable_by_all_and_leave_nothing_beside(tmp_path):
    file = tmp_path / FIRST
    write_shard(file, {"t": torch.arange(6).view(2, 3).t()})  # not contiguous
    assert torch.equal(load_file(file)["t"], torch.arange(6).view(2, 3).t())
    assert file.stat().st_mode & 0o777 == 0o644
    assert [f.name for f in tmp_path.iterdir()] == [FIRST]


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "over an older file"])
def test_full_disk_leaves_no_half_file(tmp_path, monkeypatch, earlier):
    file = tmp_path / FIRST
    if earlier:
        write_shard(file, {"a": torch.zeros(1)})

    def fail(tensors, path, metadata):
        path.write_bytes(b"half of i")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(writing, "save_file", fail)
    with pytest.raises(UserError, match=rf"writing .*{FIRST} failed: No space left on device"):
        write_shard(file, {"a": torch.ones(1)})
    assert [f.name for f in tmp_path.iterdir()] == [FIRST] * earlier
    if earlier:
        assert load_file(file)["a"].item() == 0


def test_failure_before_the_rename_leaves_no_file(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="Input/output error"):
        write_shard(tmp_path / FIRST, {"a": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_writing_into_a_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="writing .* failed"):
        write_shard(tmp_path / "gone" / FIRST, {"a": torch.ones(1)})


def test_index_and_manifest_hold_true_hashes(folder):
    index = json.loads((folder / INDEX_FILE).read_text())
    assert index["weight_map"] == {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}
    assert index["metadata"]["total_size"] == 24 + 8 + 2 + 4
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert manifest["format_version"] == 2
    for shard in TENSORS:
        data = (folder / shard).read_bytes()
        assert manifest["shards"][shard] == {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    # Of the bytes in the file, found without safetensors.
    data = (folder / FIRST).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    start, end = json.loads(data[8 : 8 + length])["b"]["data_offsets"]
    expected = hashlib.sha256(data[8 + length + start : 8 + length + end]).hexdigest()
    assert manifest["tensors"]["b"] == {"dtype": "BF16", "shape": [4], "sha256": expected}
    assert manifest["tensors"]["d"]["shape"] == []
    assert sorted(manifest["tensors"]) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.int32, torch.bool])
def test_tensor_hash_is_that_of_the_stored_bytes(tmp_path, shape, dtype):
    tensor = torch.ones(shape, dtype=dtype)
    save_file({"t": tensor}, tmp_path / "t.safetensors")
    stored = (tmp_path / "t.safetensors").read_bytes()
    size = tensor.numel() * tensor.element_size()
    data = stored[len(stored) - size :]
    assert tensor_sha256(tensor) == hashlib.sha256(data).hexdigest()
    assert file_sha256(tmp_path / "t.safetensors") == hashlib.sha256(stored).hexdigest()
