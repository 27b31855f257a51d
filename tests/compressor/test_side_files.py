"""Whatever a tokenizer or an engine needs travels along, and nothing else."""

import os
from fnmatch import fnmatchcase

import pytest

from mcmoe_vllm.checkpoint import side_files
from mcmoe_vllm.checkpoint.format import INDEX_FILE, MANIFEST_FILE
from mcmoe_vllm.checkpoint.side_files import HUB_IGNORED, copy_side_files, find_side_files
from mcmoe_vllm.errors import UserError

SIDE = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
    "tokenizer.model", "tokenizer.model.v3", "tekken.json", "merges.txt", "vocab.bpe",
    "qwen.tiktoken", "spiece.model.v7m1", "LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md",
    "vocabulary", "emoji.trie",  # of a tokenizer that nobody has heard of
    "additional_chat_templates/tool_use.jinja", "a/b/c/deep.txt", "assets/config.json",
)  # fmt: skip
WEIGHTS = (
    "pytorch_model.bin", "model.pt", "x.pth", "y.ckpt", "z.pkl", "model.gguf", "MODEL.GGUF",
    "onnx/model.onnx", "onnx/model.onnx_data", "tf_model.h5", "flax_model.msgpack",
    "consolidated.safetensors", "original/consolidated.00.pth", "original/other.safetensors",
)  # fmt: skip
NOT_SIDE = (
    *WEIGHTS, "other.safetensors", "README.md", "config.json", "plan.json", "report.json",
    "allocation.png", MANIFEST_FILE, INDEX_FILE, "pytorch_model.bin.index.json", ".gitattributes",
    ".hidden.json", ".git/config", ".cache/huggingface/tokenizer.json.metadata",
    "plan.json.work/job.json", "a/b/c/d/too_deep.txt",
)  # fmt: skip
CODE = ("modeling.py", "kernels/cuda.so")


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "model", (*SIDE, *NOT_SIDE, *CODE))


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_everything_but_weights_and_own_files_is_copied(folder, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    copied = copy_side_files(folder, target)
    assert set(copied.names) == set(SIDE) and copied.left_out == ()
    found = {f.relative_to(target).as_posix() for f in target.rglob("*") if f.is_file()}
    assert found == set(SIDE)
    assert all((target / name).read_text() == name for name in SIDE)
    assert set(find_side_files(folder, trust_remote_code=True).names) == {*SIDE, *CODE}


def test_the_hub_gives_what_is_copied_and_the_shards():
    def fetched(name):
        return not any(fnmatchcase(name, pattern) for pattern in HUB_IGNORED)

    assert all(fetched(n) for n in (*SIDE, *CODE, "config.json", INDEX_FILE, "model.safetensors"))
    ignored = [name for name in WEIGHTS if name != "MODEL.GGUF"]  # patterns have one case
    assert not any(fetched(n) for n in (*ignored, ".gitattributes", ".git/config"))


def test_copying_to_a_missing_folder_is_one_sentence(folder):
    with pytest.raises(UserError, match="copying the tokenizer's files to .* failed"):
        copy_side_files(folder, folder / "gone")


def test_links_are_followed_inside_the_folder_alone(tmp_path):
    folder = fill(tmp_path / "model", ["tokenizer.json"])
    fill(tmp_path, ["secret", "model-2/notes", "blobs/x"])
    (folder / "vocab.json").symlink_to("tokenizer.json")
    assert find_side_files(folder).names == ("tokenizer.json", "vocab.json")
    strange = {
        "LICENSE": tmp_path / "secret",
        "notes.txt": "../secret",
        "brother": "../model-2/notes",  # whose path begins like the folder's
        "hop": "way/secret",  # by way of a link to a folder
        "way": "..",
        "nowhere": "absent",
        "self": "self",
        "device": "/dev/null",
        "blob": "../blobs/x",  # no Hub cache: there is no snapshots/ above
    }
    for name, target in strange.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    (folder / "weights.bin").symlink_to("../secret")  # never copied
    with pytest.raises(UserError, match="cp -L") as error:
        find_side_files(folder)
    lines = {line.removeprefix("  - ") for line in str(error.value).splitlines()[1:-1]}
    assert lines == {*strange, "pipe"}


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    cache = fill(tmp_path / "models--a--b", ["blobs/1f", "refs/main"])
    snapshot = fill(cache / "snapshots" / "0ab", ["tokenizer.json"])
    (snapshot / "vocab.json").symlink_to("../../blobs/1f")
    (snapshot / "folder").mkdir()
    (snapshot / "folder" / "x").symlink_to("../../../blobs/1f")
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        assert find_side_files(folder).names == ("tokenizer.json", "vocab.json", "folder/x")
    (snapshot / "other").symlink_to("../../refs/main")
    with pytest.raises(UserError, match="other"):
        find_side_files(snapshot)


def test_what_cannot_be_read_is_said(tmp_path, monkeypatch):
    folder = fill(tmp_path, ["a.json", "b.json", "c/d"])
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "b.json")
    with pytest.raises(UserError, match="not readable: \n  - b.json"):
        find_side_files(folder)
    monkeypatch.undo()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("c"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="c cannot be read: Permission denied"):
        find_side_files(folder)


def test_large_and_many_files_are_left_out_by_name(tmp_path, monkeypatch):
    folder = fill(tmp_path, ["a.json", "b.unknown", "c/d", "c/e", "z.json"])
    os.truncate(folder / "b.unknown", side_files.MOST_BYTES + 1)
    found = find_side_files(folder)
    assert found.names == ("a.json", "z.json", "c/d", "c/e") and found.left_out == ("b.unknown",)
    monkeypatch.setattr(side_files, "MOST_FILES", 2)
    found = find_side_files(folder)
    assert found.names == ("a.json", "z.json") and found.left_out == ("b.unknown", "c/d", "c/e")
    monkeypatch.setattr(side_files, "MOST_BYTES_IN_ALL", 6)
    assert find_side_files(folder).names == ("a.json",)
