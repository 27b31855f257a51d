"""The documents of a text: a file's, by its content and ending, or a Hub dataset's, streamed."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcmoe_vllm.disk import open_regular
from mcmoe_vllm.errors import UserError, reason_of

DATASET_CONFIGS = {"allenai/c4": "en"}  # the subset meant when a dataset needs one
SPLIT = "train"
TEXT_FIELDS = ("text", "content")
DATASET_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
# Endings, how such a file begins, what it is called, and how it becomes a text.
FOREIGN = (
    ((".gz", ".tgz"), b"\x1f\x8b", "compressed by gzip", "unpack it: gunzip -k"),
    ((".bz2",), b"BZh91AY&SY", "compressed by bzip2", "unpack it: bunzip2 -k"),
    ((".xz",), b"\xfd7zXZ\0", "compressed by xz", "unpack it: unxz -k"),
    ((".zst", ".zstd"), b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it: unzstd"),
    ((".zip", ".docx"), b"PK\x03\x04", "a ZIP archive", "unpack it"),
    ((".parquet",), b"PAR1", "a Parquet table", "write its text as JSON Lines"),
    ((".arrow", ".feather"), b"ARROW1\0", "an Arrow table", "write its text as JSON Lines"),
    ((".csv", ".tsv"), None, "a table of comma- or tab-separated values", "write it as JSON Lines"),
    ((".pdf",), b"%PDF-", "a PDF", "extract its text"),
)  # fmt: skip
ENDINGS = (*JSON_LINES, ".json", ".txt", ".md", *(e for row in FOREIGN for e in row[0]))
BOM = b"\xef\xbb\xbf"
# What a character that began before leaves, and what one that goes on behind begins with.
CUT_CHARACTER = re.compile(
    rb"\A[\x80-\xbf]{1,3}"
    rb"|(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z"
)
WHOLE_BYTES = 64 << 20  # of a file are read whole, more in excerpts
EXCERPTS = 64  # places of a larger file, evenly spread
HEAD_BYTES = 1 << 20  # that tell a file's kind

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Part:
    """Bytes of a file, from a place on; whole: all there are."""

    path: Path
    place: int
    content: bytes
    whole: bool

    def text(self) -> str:
        """Raises UserError for what is no UTF-8."""
        if b"\0" in self.content:
            raise UserError(
                f"text {self.path} holds NUL bytes, so it is no UTF-8; convert it, for example "
                "with iconv -f UTF-16 -t UTF-8"
            )
        try:
            return self.content.decode("utf-8")
        except UnicodeDecodeError as e:
            raise UserError(
                f"text {self.path} is not UTF-8 (byte {self.place + e.start}: {e.reason}); convert "
                "it, for example with iconv -t UTF-8"
            ) from None

    def name_line(self, number: int) -> str:
        if self.whole:
            return f"{self.path} line {number}"
        return f"{self.path}, {number} lines after byte {self.place},"


def is_file(source: str) -> bool:
    """Whether a text is a file, not a dataset of the Hub. Raises UserError for names of neither."""
    try:
        mode = os.stat(source).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise UserError(f"text {source!r} cannot be read: {reason_of(e)}") from None
    if mode is not None:
        if not stat.S_ISREG(mode):
            raise UserError(
                f"text {source} is not a file; give a .jsonl or .txt file, no folder or pipe"
            )
        return True
    is_path = source.startswith((".", "/", "~")) or source.lower().endswith(ENDINGS)
    if is_path or not DATASET_NAME.fullmatch(source.split(":")[0]):
        raise UserError(
            f"text {source} is not a file; give a .jsonl or .txt file, or a dataset of the Hub as "
            "NAME, NAME:CONFIGURATION or NAME:CONFIGURATION:SPLIT"
        )
    return False


def say_on_stderr(message: str) -> None:
    print(message, file=sys.stderr)


def read_documents(
    source: str, say: Say = say_on_stderr, most_bytes: int = WHOLE_BYTES
) -> Iterator[str]:
    """The documents of a file or of a Hub dataset, streamed.

    A file holds JSON Lines or a JSON list of objects with a string "text", or it is one plain
    document. One of more than `most_bytes` is read in EXCERPTS places, and said to be. A dataset is
    NAME[:CONFIGURATION[:SPLIT]], by default its training split.
    Raises UserError for empty, non-UTF-8 or malformed files, for files of another kind, and for
    unreachable datasets.
    """
    if not is_file(source):
        return _read_dataset(source)
    path = Path(source)
    ending = path.suffix.lower()
    with open_regular(path) as f:
        head = f.read(HEAD_BYTES).removeprefix(BOM)
    _refuse_foreign(path, ending, head)
    if ending == ".json" and head.lstrip()[:1] == b"[":
        return _read_list(path, most_bytes)
    is_lines = ending in (*JSON_LINES, ".json") or _begins_with_record(head)
    return (_read_lines if is_lines else _read_plain)(_read_parts(path, most_bytes, say))


# Files


def _refuse_foreign(path: Path, ending: str, head: bytes) -> None:
    for endings, magic, what, remedy in FOREIGN:
        if ending in endings or (magic and head.startswith(magic)):
            raise UserError(
                f"text {path} is {what}, which is not read; {remedy}, and give a .jsonl (objects "
                'with a field "text") or .txt file'
            )


def _begins_with_record(head: bytes) -> bool:
    """Whether the first line is a JSON object with a string "text", whatever the file is called."""
    first = next((line for line in head.split(b"\n") if line.strip()), b"")
    if not first.lstrip().startswith(b"{"):
        return False
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get("text"), str)


def _read_parts(path: Path, most_bytes: int, say: Say) -> Iterator[_Part]:
    """A file whole, or excerpts of a larger one: whole lines as far as there are any."""
    with open_regular(path) as f:
        content = f.read(most_bytes + 1)  # some files do not tell their size
        if len(content) <= most_bytes:
            yield _Part(path, 0, content.removeprefix(BOM), True)
            return
        del content
        size, length = os.fstat(f.fileno()).st_size, most_bytes // EXCERPTS
        say(
            f"text {path} has {size:,} bytes: {most_bytes:,} are read, at {EXCERPTS} places evenly "
            "spread over it"
        )
        for i in range(EXCERPTS):
            place = i * (size - length) // (EXCERPTS - 1)
            f.seek(place)
            yield _Part(path, place, _whole_lines(f.read(length), place == 0), False)


def _whole_lines(content: bytes, from_start: bool) -> bytes:
    """An excerpt from the first line's begin to the last line's end; without line breaks, from the
    first character's begin to the last one's end."""
    if from_start:
        content = content.removeprefix(BOM)
    elif b"\n" in content:
        content = content.partition(b"\n")[2]
    if b"\n" in content:
        return content.rpartition(b"\n")[0]
    return CUT_CHARACTER.sub(b"", content)


def _read_plain(parts: Iterator[_Part]) -> Iterator[str]:
    """One document a part."""
    for part in parts:
        text = part.text()
        if text.strip():
            yield text
        elif part.whole:
            raise UserError(f"text {part.path} is empty")


def _read_lines(parts: Iterator[_Part]) -> Iterator[str]:
    for part in parts:
        # Numbered before blank lines are dropped: the messages name the line of the file.
        lines = [(i, line) for i, line in enumerate(part.text().split("\n"), 1) if line.strip()]
        if part.whole and not lines:
            raise UserError(f"text {part.path} is empty")
        for number, line in lines:
            where = part.name_line(number)
            text = _parse(line, where)
            yield _text_of(text if isinstance(text, dict) else None, where)


def _read_list(path: Path, most_bytes: int) -> Iterator[str]:
    """A JSON list of objects, or of strings."""
    with open_regular(path) as f:
        content = f.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise UserError(
            f"text {path} is one JSON list of more than {most_bytes:,} bytes, which is read whole; "
            "write it as JSON Lines, an object a line"
        )
    part = _Part(path, 0, content.removeprefix(BOM), True)
    records = _parse(part.text(), str(path))
    if not records:
        raise UserError(f"text {path} is empty")
    for number, record in enumerate(records, 1):
        yield _text_of(record, f"{path} entry {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where} is not usable JSON: it is nested too deeply") from None
    except ValueError as e:  # of json, and of int for too many digits
        raise UserError(f"{where} is not valid JSON: {e}") from None


def _text_of(record: Any, where: str) -> str:
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise UserError(f'{where} has no string field "text"')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(
            f"{where} has half of a surrogate pair ({text[e.start]!r}) in its text, which is no "
            "character; remove it or write the pair whole"
        ) from None
    return text


# The Hub


def _read_dataset(source: str) -> Iterator[str]:
    from datasets import load_dataset

    name, config, split = [*source.split(":", 2), "", ""][:3]
    try:
        dataset = load_dataset(
            name, config or DATASET_CONFIGS.get(name), split=split or SPLIT, streaming=True
        )
        field = None
        for number, record in enumerate(dataset, 1):
            field = field or _find_field(name, record)
            text = record.get(field)
            if text is not None:
                yield _text_of(text, f"dataset {name} record {number}")
        if field is None:
            raise UserError(f"dataset {name} is empty")
    except UserError:
        raise
    except Exception as e:  # its errors share no base: network, missing repository, no script
        raise UserError(
            f"calibration dataset {source} could not be read ({type(e).__name__}: {reason_of(e)}). "
            "A configuration and a split are named as in NAME:CONFIGURATION:SPLIT. Without a "
            "network, give a local file: --calibration FILE.jsonl or FILE.txt"
        ) from None


def _find_field(name: str, record: dict[str, Any]) -> str:
    found = [field for field in TEXT_FIELDS if isinstance(record.get(field), str)]
    if not found:
        raise UserError(f"dataset {name} has no text field among {TEXT_FIELDS}: {sorted(record)}")
    return found[0]
