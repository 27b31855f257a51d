"""Other weights have another fingerprint, the same weights the same one, wherever they lie."""

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from mcmoe_vllm.checkpoint import fingerprint
from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.checkpoint.fingerprint import weights_fingerprint
from mcmoe_vllm.checkpoint.writing import write_index, write_shard

TENSORS = {
    "large": torch.arange(6000.0).view(2, 3000),  # several blocks
    "norm": torch.ones(7, dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture(autouse=True)
def short_strides(monkeypatch):
    monkeypatch.setattr(fingerprint, "STRIDE", 4096)
    monkeypatch.setattr(fingerprint, "BLOCK", 16)


def save(folder, tensors, shards=1):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = sorted(tensors)
    files = [f"model-{i}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        write_shard(folder / file, {n: tensors[n] for n in names[i::shards]})
    write_index(folder, files)
    return folder


def of(folder):
    return weights_fingerprint(open_checkpoint(folder))


def test_where_and_when_weights_were_written_does_not_matter(tmp_path):
    first = save(tmp_path / "a", TENSORS)
    again = shutil.copytree(first, tmp_path / "b", copy_function=shutil.copyfile)
    os.utime(again / "model-0.safetensors", (1, 1))
    assert of(first) == of(again) == of(save(tmp_path / "c", TENSORS, shards=2))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("large", lambda t: t * 1.5),
        ("large", lambda t: torch.cat([t[:1], t[1:] + 1])),  # its second half
        ("large", lambda t: t.view(3, 2000)),
        ("norm", lambda t: t.to(torch.float16)),
        ("norm", lambda t: torch.cat([t[:6], t[:1] + 1])),  # its last value
        ("scalar", lambda t: t + 1),
        ("empty", lambda t: torch.zeros(0, 5)),
    ],
)
def test_a_tensor_that_changed_is_seen(tmp_path, name, change):
    before = of(save(tmp_path / "a", TENSORS))
    assert of(save(tmp_path / "b", {**TENSORS, name: change(TENSORS[name])})) != before


def test_names_count(tmp_path):
    before = of(save(tmp_path / "a", {"x": TENSORS["large"], "y": TENSORS["large"] + 1}))
    assert of(save(tmp_path / "b", {"y": TENSORS["large"], "x": TENSORS["large"] + 1})) != before


def test_little_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "STRIDE", 1 << 20)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"t": torch.zeros(8 << 20, dtype=torch.uint8)}, folder / "model.safetensors")
    read, pread = [], os.pread
    monkeypatch.setattr(
        os, "pread", lambda f, length, offset: read.append(length) or pread(f, length, offset)
    )
    of(folder)
    assert len(read) == 8 + 1 and sum(read) == 9 * 16
