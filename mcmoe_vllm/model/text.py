"""Text to token windows: files and Hub datasets in, int64 [windows, length] out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from mcmoe_vllm.checkpoint.files import Checkpoint
from mcmoe_vllm.errors import UserError

DATASET_CONFIGS = {"allenai/c4": "en"}  # the subset meant when a dataset needs one
TEXT_FIELDS = ("text", "content")
TEXT_SUFFIXES = (".jsonl", ".json", ".txt", ".md")


def read_documents(source: str) -> Iterator[str]:
    """The documents of a .jsonl file (field "text"), a plain text file (one document), or the
    training split of a Hub dataset, streamed.

    Raises UserError for missing, empty, non-UTF-8 or malformed files and unreachable datasets.
    """
    path = Path(source)
    if path.is_file():
        return _read_jsonl(path) if path.suffix == ".jsonl" else _read_plain(path)
    if path.is_dir() or path.suffix in TEXT_SUFFIXES or source.startswith((".", "/", "~")):
        raise UserError(f"calibration text {source} is not a file; give a .jsonl or .txt file")
    return _read_dataset(source)


def encode_documents(
    documents: Iterable[str], tokenizer: Any, limit: int | None = None
) -> list[int]:
    """Token ids of all documents in order, each followed by the end token.

    tokenizer: a transformers tokenizer; limit: stop after the document that reaches so many.
    """
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for document in documents:
        if not document:
            continue
        # verbose=False: windows are cut afterwards, a long document is no mistake.
        ids.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        if end is not None:
            ids.append(end)
        if limit is not None and len(ids) >= limit:
            break
    return ids


def sample_windows(
    source: str, tokenizer: Any, samples: int, sequence_length: int, seed: int
) -> torch.Tensor:
    """Calibration windows: `samples` disjoint windows at random places, int64 [samples, length].

    Raises UserError if the text is too short for them.
    """
    streamed = not Path(source).is_file()
    # A streamed dataset never ends: eight times the need leaves room for a random choice.
    limit = 8 * samples * sequence_length if streamed else None
    ids = encode_documents(read_documents(source), tokenizer, limit)
    available = len(ids) // sequence_length
    if available < samples:
        raise UserError(
            f"calibration text {source} is too short: its {len(ids)} tokens fill {available} "
            f"windows of {sequence_length}, --samples asks for {samples}. Give more text, "
            f"--samples {max(available, 1)} or a smaller --sequence-length"
        )
    windows = torch.tensor(ids[: available * sequence_length]).view(available, sequence_length)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return windows[order[:samples].sort().values].contiguous()


def strided_windows(
    source: str, tokenizer: Any, windows: int, sequence_length: int, minimum: int = 2
) -> torch.Tensor:
    """Evaluation windows: non-overlapping, at a fixed stride over the whole file.

    All of the file's windows if it holds no more than `windows`; int64 [<= windows, length].
    Raises UserError if it holds fewer than `minimum`.
    """
    ids = encode_documents(read_documents(source), tokenizer)
    available = len(ids) // sequence_length
    if available < minimum:
        raise UserError(
            f"text {source} is too short: its {len(ids)} tokens fill {available} windows of "
            f"{sequence_length}, at least {minimum} are needed"
        )
    table = torch.tensor(ids[: available * sequence_length]).view(available, sequence_length)
    count = min(windows, available)
    return table[torch.arange(count) * available // count].contiguous()


def load_tokenizer(path: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder. Raises UserError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"{path} has no usable tokenizer: {reason}") from None


def _read_plain(path: Path) -> Iterator[str]:
    text = _decode(path)
    if not text.strip():
        raise UserError(f"text {path} is empty")
    yield text


def _read_jsonl(path: Path) -> Iterator[str]:
    # Numbered before blank lines are dropped: the messages name the line of the file.
    lines = [(i, line) for i, line in enumerate(_decode(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"text {path} is empty")
    for number, line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(f"{path} line {number} is not valid JSON: {e}") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{path} line {number} has no string field "text"')
        yield text


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(
            f"text {path} is not UTF-8 (byte {e.start}: {e.reason}); convert it, for example "
            f"with iconv -t UTF-8"
        ) from None
    except OSError as e:
        raise UserError(f"text {path} cannot be read: {e.strerror}") from None


def _read_dataset(name: str) -> Iterator[str]:
    from datasets import load_dataset

    config = DATASET_CONFIGS.get(name)
    try:
        dataset = load_dataset(name, config, split="train", streaming=True)
        first = next(iter(dataset))
    except StopIteration:
        raise UserError(f"dataset {name} is empty") from None
    except Exception as e:  # its errors share no base: network, missing repository, no script
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(
            f"calibration dataset {name} could not be read ({type(e).__name__}: {reason}). "
            "Without a network, give a local file: --calibration FILE.jsonl or FILE.txt"
        ) from None
    field = next((f for f in TEXT_FIELDS if isinstance(first.get(f), str)), None)
    if field is None:
        raise UserError(f"dataset {name} has no text field among {TEXT_FIELDS}: {sorted(first)}")
    return (record[field] for record in dataset)


MAX_SEQUENCE_LENGTH = 2048


def window_length(checkpoint: Checkpoint, asked: int | None) -> int:
    """Tokens of a window, by default min(2048, the model's maximum). Raises UserError beyond it."""
    longest = int(checkpoint.config.get("max_position_embeddings", MAX_SEQUENCE_LENGTH))
    length = asked or min(MAX_SEQUENCE_LENGTH, longest)
    if not 2 <= length <= longest:
        raise UserError(f"sequence_length is {length}, allowed are 2 to {longest}")
    return length
