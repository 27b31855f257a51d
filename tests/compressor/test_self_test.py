"""`mcmoe doctor --self-test` says what holds for a folder: a sound one, then damaged ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mcmoe_vllm import self_test
from mcmoe_vllm.checkpoint.format import MANIFEST_FILE
from mcmoe_vllm.checkpoint.manifest import write_manifest
from mcmoe_vllm.checkpoint.writing import write_index, write_shard
from mcmoe_vllm.cli import main
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.compress.pipeline import quantize
from mcmoe_vllm.disk import read_json, write_json
from mcmoe_vllm.self_test import run_self_test


@pytest.fixture(scope="module")
def sound(tiny_models, calibration_text, once):
    def make(folder):
        quantize(
            QuantizeOptions(
                model=str(tiny_models("qwen2_moe")), output=str(folder), bits=2, group_size=32,
                calibration=str(calibration_text), recipe="paper", method="rtn", samples=2,
                sequence_length=32,
            )
        )  # fmt: skip

    return once("self-test", make)


@pytest.fixture
def folder(sound, tmp_path, monkeypatch):
    monkeypatch.setattr(self_test, "run_doctor", lambda names: [])  # which imports vLLM
    return Path(shutil.copytree(sound, tmp_path / "models" / "model"))


def rows(folder):
    return {f.name: (f.status, f.detail) for f in run_self_test(folder)}


def test_a_sound_folder(folder):
    found = rows(folder)
    assert list(found) == [check.name for check in self_test.CHECKS]
    assert {name for name, (status, _) in found.items() if status != "ok"} == {"chat template"}
    assert "--chat-template FILE" in found["chat template"][1]
    assert "2 layers x 6 experts" in found["tensors"][1]
    assert "nothing is pruned" in found["pruning"][1]
    # An expert has 128 columns in groups of 32, a shared one 256, there are 4 heads.
    assert "--tensor-parallel-size 1, 2, 4; with 8: 4 attention heads" in found["ranks"][1]


def edit_config(folder, **settings):
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, **settings})


def edit_quantization(folder, **settings):
    config = read_json(folder / "config.json")
    edit_config(folder, quantization_config={**config["quantization_config"], **settings})


def edit_tensors(folder, change):
    """Change the tensors of the last shard; index and manifest then agree with them."""
    shards = sorted(f.name for f in folder.glob("*.safetensors"))
    tensors = load_file(folder / shards[-1])
    change(tensors)
    write_shard(folder / shards[-1], tensors)
    write_index(folder, shards)
    write_manifest(folder, shards)


def flip(folder):
    shard = sorted(folder.glob("*.safetensors"))[-1]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)


def cut(folder):
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])


def put_nan(tensors):
    name = next(n for n in tensors if n.endswith("layernorm.weight"))
    tensors[name][3] = torch.nan


def add_token(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)


DAMAGES = {  # what is done -> the row that says so, how, and what it says
    "cut": (cut, "files", "error", "truncated or corrupted"),
    "strange index": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "y"}}'),
        "files", "error", "y",
    ),
    "no mcmoe": (lambda f: edit_config(f, quantization_config=None), "settings", "error", "mcmoe"),
    "newer": (lambda f: edit_quantization(f, format_version=99), "settings", "error", "upgrade"),
    "no architecture": (
        lambda f: edit_config(f, architectures=["Llama4ForCausalLM"]),
        "architecture", "error", "not supported yet",
    ),
    "activation": (
        lambda f: edit_config(f, hidden_act="gelu"), "architecture", "error", "computes silu"
    ),
    "norm gone": (
        lambda f: edit_tensors(f, lambda t: t.pop(min(t))), "tensors", "error", "is missing"
    ),
    "flipped": (flip, "hashes and scales", "error", "SHA-256"),
    "no manifest": (lambda f: (f / MANIFEST_FILE).unlink(), "manifest", "error", "again"),
    "NaN": (lambda f: edit_tensors(f, put_nan), "numbers", "error", "NaN"),
    "pruning": (
        lambda f: edit_quantization(f, pruning={"rule": "x"}),
        "settings", "error", "layers is missing",
    ),
    "no tokenizer": (
        lambda f: [g.unlink() for g in f.glob("tokenizer*")], "tokenizer", "error", "copy"
    ),
    "tokens": (add_token, "tokenizer", "warning", "8193 tokens, the model knows 8192"),
    "template": (
        lambda f: (f / "chat_template.jinja").write_text("{{ 1 / 0 }}"),
        "chat template", "error", "--chat-template FILE",
    ),
    "dangling": (
        lambda f: (f / "x.json").symlink_to("nowhere"), "links", "error", "1 link: x.json",
    ),
    "outside": (
        lambda f: (f / "x.json").symlink_to("/etc/hostname"), "links", "warning", "cp -rL"
    ),
    "unfinished": (
        lambda f: f.with_name("model.work").mkdir(), "leftovers", "warning", "--resume"
    ),
    "partial": (
        lambda f: (f / ".config.json.0a.partial").touch(), "leftovers", "warning", "remove it"
    ),
    "group size": (
        lambda f: edit_quantization(f, group_size={"w13": 128, "w2": 128, "dense": 128}),
        "ranks", "ok", "--tensor-parallel-size 1; with 2:",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_in_its_row(folder, damage):
    spoil, name, status, words = DAMAGES[damage]
    spoil(folder)
    found = rows(folder)
    assert found[name][0] == status and words in found[name][1], found[name]
    assert all("\n" not in detail for _, detail in found.values())


def test_what_depends_on_a_failed_check_is_not_asked(folder):
    cut(folder)
    found = rows(folder)
    assert [name for name, (_, said) in found.items() if "not asked" in said] == [
        "settings", "architecture", "tensors", "hashes and scales", "numbers", "pruning",
        "tokenizer", "chat template", "ranks", "memory",
    ]  # fmt: skip
    assert found["links"][0] == found["leftovers"][0] == "ok"


def test_files_of_the_hubs_cache_are_links(folder, tmp_path):
    cached = tmp_path / "models--a--b"
    snapshot = cached / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    folder.rename(cached / "blobs")
    for file in (cached / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    status, said = rows(snapshot)["links"]
    assert status == "ok" and "none leads out" in said


def test_a_chat_template_that_works(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert rows(folder)["chat template"] == ("ok", "a message becomes 2 characters")


def test_too_little_memory(folder, monkeypatch):
    monkeypatch.setattr(self_test, "_available_memory", lambda: 1000)
    status, said = rows(folder)["memory"]
    assert status == "warning" and "1000 B of main memory are free" in said


def test_too_little_memory_of_a_gpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    needed = self_test.Folder(folder).checkpoint.nbytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (needed * (i + 1), needed * 9))
    status, said = rows(folder)["memory"]
    assert status == "warning" and "--tensor-parallel-size, 2 or more" in said


@pytest.mark.parametrize(("spoil", "code"), [(lambda folder: None, 0), (cut, 1)])
def test_exit_code(folder, capsys, spoil, code):
    spoil(folder)
    assert main(["doctor", "--self-test", str(folder)]) == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(self_test.CHECKS) and ("error" in lines[0]) == bool(code)


def test_what_is_no_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text(json.dumps({}))
    for path in (tmp_path / "absent", tmp_path / "file"):
        assert main(["doctor", "--self-test", str(path)]) == 2
        assert f"{path} is not a folder" in capsys.readouterr().err
