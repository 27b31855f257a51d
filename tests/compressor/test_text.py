"""Calibration and evaluation text: what is refused, and which windows are taken."""

import json
from pathlib import Path

import pytest
import torch

from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.text import (
    encode_documents,
    load_tokenizer,
    read_documents,
    sample_windows,
    strided_windows,
)

MODEL = Path(__file__).parents[2] / "examples" / "mixtral-6m"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """Forty documents that say their own number over and over, so that no two windows agree."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    documents = [f"Document {i}: " + " ".join(f"{i}x{j}" for j in range(20)) for i in range(40)]
    file.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return str(file)


def documents(path):
    return list(read_documents(str(path)))


def test_documents_end_with_the_end_token(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two", "url": "x"}\n')
    assert documents(file) == ["one", "", "two"]
    ids = encode_documents(documents(file), tokenizer)
    assert ids.count(tokenizer.eos_token_id) == 2 and ids[-1] == tokenizer.eos_token_id
    plain = tmp_path / "a.txt"
    plain.write_text("one\n\ntwo")
    assert documents(plain) == ["one\n\ntwo"]


def test_encoding_stops_after_the_document_that_reaches_the_limit(tokenizer):
    first = encode_documents(["some words here"], tokenizer)
    assert encode_documents(["some words here", "more"], tokenizer, limit=1) == first


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n \n"], ids=["nothing", "blank"])
def test_empty_text_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is empty"):
        documents(tmp_path / name)


def test_text_of_empty_documents_is_too_short(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": ""}\n' * 3)
    with pytest.raises(UserError, match="its 0 tokens fill 0 windows of 8"):
        sample_windows(str(file), tokenizer, 1, 8, seed=0)


def test_short_text_is_refused_with_its_numbers(text_file, tokenizer):
    tokens = len(encode_documents(documents(text_file), tokenizer))
    fit = tokens // 64
    with pytest.raises(UserError) as e:
        sample_windows(text_file, tokenizer, fit + 1, 64, seed=0)
    for part in (f"{tokens} tokens", f"fill {fit} windows of 64", f"--samples {fit}"):
        assert part in str(e.value)
    with pytest.raises(UserError, match=f"{tokens} tokens fill 0 windows .* at least 2"):
        strided_windows(text_file, tokenizer, 4, tokens + 1)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_is_not_utf8_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"is not UTF-8 \(byte 13.*iconv"):
        documents(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', "line 4 is not valid JSON"),
        ('{"content": "b"}', 'line 4 has no string field "text"'),
        ('{"text": 5}', 'line 4 has no string field "text"'),
        ('["text"]', 'line 4 has no string field "text"'),
    ],
)
def test_malformed_lines_are_refused_with_the_line_of_the_file(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n\n\n' + line + '\n{"text": "c"}\n')  # blank lines count
    with pytest.raises(UserError, match=message):
        documents(file)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.txt", "./gone", "folder"])
def test_missing_files_are_refused_without_the_network(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="is not a file; give a .jsonl or .txt file"):
        documents(name)


def test_samples_depend_on_the_seed_alone(text_file, tokenizer):
    first = sample_windows(text_file, tokenizer, 5, 32, seed=1)
    assert first.shape == (5, 32) and first.dtype == torch.int64
    assert torch.equal(first, sample_windows(text_file, tokenizer, 5, 32, seed=1))
    assert not torch.equal(first, sample_windows(text_file, tokenizer, 5, 32, seed=2))


def test_samples_are_disjoint_windows_in_order(text_file, tokenizer):
    ids = encode_documents(documents(text_file), tokenizer)
    fit = len(ids) // 32
    table = torch.tensor(ids[: fit * 32]).view(fit, 32)
    windows = sample_windows(text_file, tokenizer, fit - 3, 32, seed=0)
    places = [(table == w).all(1).nonzero().flatten().tolist() for w in windows]
    assert all(len(p) == 1 for p in places)  # the text has no two equal windows
    assert [p[0] for p in places] == sorted({p[0] for p in places})
    everything = sample_windows(text_file, tokenizer, fit, 32, seed=0)
    assert torch.equal(everything, table)


@pytest.mark.parametrize("asked", [2, 7, 1000])
def test_strided_windows_cover_the_whole_file(text_file, tokenizer, asked):
    ids = encode_documents(documents(text_file), tokenizer)
    fit = len(ids) // 32
    table = torch.tensor(ids[: fit * 32]).view(fit, 32)
    windows = strided_windows(text_file, tokenizer, asked, 32)
    assert windows.shape == (min(asked, fit), 32)
    places = [int((table == w).all(1).nonzero()) for w in windows]
    strides = [b - a for a, b in zip(places, [*places[1:], fit], strict=True)]
    assert places[0] == 0 and max(strides) - min(strides) <= 1 and min(strides) >= 1


def test_folder_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no usable tokenizer"):
        load_tokenizer(tmp_path)
