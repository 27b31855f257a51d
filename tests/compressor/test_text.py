"""Calibration and evaluation text: what is refused, and which windows are taken."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.documents import read_documents
from mcmoe_vllm.model.text import (
    LONGEST_RUN,
    cut_long_runs,
    encode_documents,
    load_tokenizer,
    require_known_tokens,
    sample_windows,
    strided_windows,
    window_length,
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


RECORDS = [{"text": "one"}, {"text": "two\nlines", "url": "x"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.JsonLines", "a.json", "a.txt", "a"]
)
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"], ids=["plain", "mark", "blank"])
def test_json_lines_are_read_whatever_the_file_is_called(tmp_path, name, start):
    (tmp_path / name).write_text(start + LINES, encoding="utf-8")
    assert documents(tmp_path / name) == ["one", "two\nlines"]


@pytest.mark.parametrize("records", [RECORDS, ["one", "two\nlines"]])
@pytest.mark.parametrize("start", ["", "\ufeff", " \n"], ids=["plain", "mark", "blank"])
def test_a_json_list_is_read(tmp_path, records, start):
    (tmp_path / "a.Json").write_text(start + json.dumps(records, indent=1), encoding="utf-8")
    assert documents(tmp_path / "a.Json") == ["one", "two\nlines"]


def test_prose_about_json_is_plain(tmp_path):
    for text in ('{"text" is a key', '{"url": "x"}\n{"text": "y"}', "[1]", '{"text": 1}'):
        (tmp_path / "a.md").write_text(text)
        assert documents(tmp_path / "a.md") == [text]
    (tmp_path / "a.txt").write_text("\ufeffone\n", encoding="utf-8")
    assert documents(tmp_path / "a.txt") == ["one\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\none\n", "comma- or tab-separated values, which is not read"),
        ("a.TSV", b"text\none\n", "separated values"),
        ("a.jsonl.gz", b"", "compressed by gzip"),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0), "compressed by gzip, .* gunzip"),
        ("a.txt", bz2.compress(LINES.encode()), "compressed by bzip2"),
        ("a", lzma.compress(LINES.encode()), "compressed by xz"),
        ("a.jsonl.zst", b"", "compressed by zstd"),
        ("a.Parquet", b"PAR1" + bytes(9), "a Parquet table"),
        ("a.json", b"PAR1" + bytes(9), "a Parquet table"),
        ("a.arrow", b"ARROW1", "an Arrow table"),
        ("a.txt", b"PK\x03\x04", "a ZIP archive"),
        ("a.txt", b"%PDF-1.7", "a PDF"),
        ("a.txt", "one".encode("utf-16-le"), "NUL bytes.*iconv"),
        ("a.jsonl", LINES.encode("utf-16"), "not UTF-8|NUL bytes"),
        ("a.json", b"[]", "is empty"),
        ("a.json", b'["one", 2]', 'entry 2 has no string field "text"'),
        ("a.json", b'[{"text": "one"}, "two", {"content": "x"}]', "entry 3 has no string"),
        ("a.json", b'{"text": "one",\n "url": "x"}', "line 1 is not valid JSON"),
        ("a.json", b"[" * 200_000, "nested too deeply"),
        ("a.jsonl", b'\n{"text": "one", "tree": ' + b"[" * 200_000, "line 2 .* nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1 is not valid JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\\ud83d two"}', r"line 2 has half .*\\ud83d"),
        ("a.json", b'["\\udc00"]', r"entry 1 has half of a surrogate pair \('\\udc00'\)"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        documents(tmp_path / name)
    assert name in str(refusal.value) and len(str(refusal.value)) < 1000


def test_a_pair_of_surrogates_and_a_nul_are_characters(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud83d\ude00 \u0000 \ufffe"}')
    assert documents(tmp_path / "a.jsonl") == ["\U0001f600 \0 \ufffe"]
    assert len(encode_documents(documents(tmp_path / "a.jsonl"), tokenizer)) > 3


@pytest.mark.parametrize(
    "source",
    ["n" * 300, "n" * 300 + ".jsonl", "a\0b", "a/b/c", "two words", "owner/", "-x y", "corpus.csv"],
)
def test_names_of_neither_file_nor_dataset_are_refused(source, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", None)
    with pytest.raises(UserError, match="cannot be read|is not a file"):
        documents(source)


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for name in (tmp_path / "a.jsonl", "/dev/zero", "/dev/stdin"):
        with pytest.raises(UserError, match="is not a file"):
            documents(name)


def test_a_folder_with_pipes_has_no_tokenizer(tmp_path):
    shutil.copy(MODEL / "config.json", tmp_path)
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"holds \['tokenizer.json'\], pipes"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "BPE"}}', "[]", "{", ""])
def test_broken_tokenizers_are_refused_with_a_reason(tmp_path, content):
    shutil.copy(MODEL / "config.json", tmp_path)
    shutil.copy(MODEL / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"has no usable tokenizer: .{5,}"):
        load_tokenizer(tmp_path)


class PanicException(BaseException):  # what Rust's panics are called in Python
    pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Exception("WordLevel error"), "WordLevel error"),
        (AttributeError(), "AttributeError"),
        (KeyError("added_tokens"), "'added_tokens' is missing"),
        (ImportError("\n sentencepiece\nis needed"), "sentencepiece"),
        (PanicException("at the disco"), "at the disco"),
    ],
)
def test_whatever_a_tokenizer_raises_becomes_a_reason(error, reason, monkeypatch):
    def fail(*given, **settings):
        raise error

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(UserError, match=f"no usable tokenizer: {reason}$"):
        load_tokenizer(MODEL)
    fail.eos_token_id = None
    with pytest.raises(UserError, match=f"cannot encode document 2 of the text: {reason}$"):
        encode_documents(["", "two"], fail)


def test_an_interrupt_is_no_reason(monkeypatch):
    def interrupt(*given, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(MODEL)


def test_stretches_without_a_break_are_cut_and_said_to_be(tokenizer):
    said = []
    word = "ab" * LONGEST_RUN
    pieces = cut_long_runs(f"one {word} two{' ' * (LONGEST_RUN + 1)}three")
    assert all(len(run) <= LONGEST_RUN for p in pieces for run in re.findall(r"\S+|\s+", p))
    assert "".join(pieces) == f"one {word} two{' ' * (LONGEST_RUN + 1)}three" and len(pieces) == 3
    ids = encode_documents(["one", word, "two", word], tokenizer, say=said.append)
    assert len(said) == 1 and "document 2" in said[0] and "25,000 characters" in said[0]
    assert "".join(tokenizer.convert_ids_to_tokens(list(ids))).count("</s>") == 4
    usual = "words of a usual length " * 5000
    assert cut_long_runs(usual) == [usual] and cut_long_runs("x" * LONGEST_RUN) == [
        "x" * LONGEST_RUN
    ]


def test_a_large_file_is_read_in_places_all_over_it(tmp_path):
    lines = [json.dumps({"text": f"{i:06d} ä"}, ensure_ascii=False) for i in range(20_000)]
    said = []
    for name, content in (
        ("a.jsonl", "\n".join(lines)),
        ("a.txt", "\n".join(f"{i:06d} ä" for i in range(20_000))),
        ("b.txt", "ä" * 200_000),  # no line break: cut between characters
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        size = (tmp_path / name).stat().st_size
        found = list(read_documents(str(tmp_path / name), said.append, 64 * 1000))
        assert sum(len(text.encode()) for text in found) <= 64_000
        assert f"{size:,} bytes: 64,000 are read, at 64 places" in said[-1]
        if name == "b.txt":
            assert {character for text in found for character in text} == {"ä"}
            continue
        numbers = [int(line.split()[0]) for text in found for line in text.splitlines()]
        assert all(line.endswith(" ä") for text in found for line in text.splitlines())
        assert numbers[0] == 0 and numbers[-1] >= 19_998 and numbers == sorted(set(numbers))
        assert max(b - a for a, b in zip(numbers, numbers[1:], strict=False)) < 400
    assert len(said) == 3
    (tmp_path / "a.json").write_text(json.dumps(["word"] * 20_000))
    with pytest.raises(UserError, match="one JSON list of more than 64,000 bytes"):
        list(read_documents(str(tmp_path / "a.json"), said.append, 64_000))


def test_a_broken_line_in_a_place_of_a_large_file_is_found_by_its_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 500 + "oops\n" * 8000)
    with pytest.raises(UserError, match=r"a.jsonl, [0-9]+ lines after byte [0-9]+, is not valid"):
        list(read_documents(str(tmp_path / "a.jsonl"), lambda message: None, 6400))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, 32, 0), "samples is 0"),
        ((-3, 32, 0), "samples is -3"),
        ((1, 32, 2**64), "seed is"),
        ((1, 32, -1), "seed is -1"),
    ],
)
def test_numbers_of_samples_are_checked(text_file, tokenizer, given, message):
    with pytest.raises(UserError, match=message):
        sample_windows(text_file, tokenizer, *given)


def test_tokens_that_the_model_does_not_know_are_refused():
    require_known_tokens(torch.tensor([[0, 7]]), 8, MODEL)
    with pytest.raises(UserError, match="gives token 8, the model knows 8"):
        require_known_tokens(torch.tensor([[0, 8]]), 8, MODEL)


@pytest.mark.parametrize(
    ("longest", "asked", "length"),
    [(512, None, 512), (8192, None, 2048), (None, None, 2048), (8192, 8192, 8192), (512, 2, 2)],
)
def test_the_length_of_windows(longest, asked, length):
    assert window_length(SimpleNamespace(max_position_embeddings=longest), asked) == length
    for wrong in (0, 1, -1, (longest or 2048) + 1):
        with pytest.raises(UserError, match="allowed are 2 to"):
            window_length(SimpleNamespace(max_position_embeddings=longest), wrong)


# Datasets of the Hub, from a stand-in of its library


@pytest.fixture
def hub(monkeypatch):
    """hub(records): what datasets.load_dataset streams; `asked` lists its calls, `read` counts."""

    class Hub:
        asked, read, records = [], 0, []

        def __call__(self, *names, **settings):
            self.asked.append((*names, settings["split"]))
            assert settings["streaming"]
            return self.stream()

        def stream(self):
            for record in self.records:
                self.read += 1
                if isinstance(record, Exception):
                    raise record
                yield record

    hub = Hub()
    hub.asked = []
    monkeypatch.setattr("datasets.load_dataset", hub)
    return hub


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("allenai/c4", ("allenai/c4", "en", "train")),
        ("allenai/c4:de", ("allenai/c4", "de", "train")),
        ("wikitext:wikitext-2-raw-v1:test", ("wikitext", "wikitext-2-raw-v1", "test")),
        ("owner/name::validation[:10%]", ("owner/name", None, "validation[:10%]")),
    ],
)
def test_a_dataset_is_asked_for_by_configuration_and_split(hub, source, asked):
    hub.records = [{"text": None}, {"text": "one"}]
    with pytest.raises(UserError, match="no text field"):
        documents(source)
    hub.records.reverse()
    assert documents(source) == ["one"] and hub.asked[-1] == asked


def test_a_file_of_a_datasets_name_is_the_file(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "name:x").write_text("a file")
    assert documents("name:x") == ["a file"] and not hub.asked


def test_a_dataset_is_read_as_far_as_windows_need(hub, tokenizer):
    hub.records = ({"text": f"word {i}"} for i in itertools.count())
    assert sample_windows("owner/endless", tokenizer, 4, 8, seed=0).shape == (4, 8)
    assert hub.read < 8 * 4 * 8
    hub.read, hub.records = 0, ({"content": f"word {i}"} for i in itertools.count())
    assert strided_windows("owner/endless", tokenizer, 4, 8).shape == (4, 8)
    assert hub.read < 8 * 4 * 8
    hub.read, hub.records = 0, ({"text": ""} for _ in itertools.count())
    with pytest.raises(UserError, match="its 0 tokens"):
        strided_windows("owner/endless", tokenizer, 4, 8)
    assert hub.read <= 8 * 4 * 8


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "dataset owner/name is empty"),
        ([{"text": "a"}, {"text": 5}], 'dataset owner/name record 2 has no string field "text"'),
        ([{"text": "a"}, ConnectionError("gone")], r"\(ConnectionError: gone\).*local file"),
        ([{"text": "a"}, Exception()], r"\(Exception: Exception\)"),
    ],
)
def test_datasets_that_end_badly_are_refused(hub, records, message):
    hub.records = records
    with pytest.raises(UserError, match=message):
        documents("owner/name")
