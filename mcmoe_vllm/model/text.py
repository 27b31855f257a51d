"""Text to token windows: files and Hub datasets in, int64 [windows, length] out."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mcmoe_vllm.errors import UserError, reason_of
from mcmoe_vllm.flags import out_of_range
from mcmoe_vllm.limits import MAX_SEED, MAX_WINDOWS
from mcmoe_vllm.model.documents import (
    WHOLE_BYTES,
    Say,
    is_file,
    read_documents,
    say_on_stderr,
)

MAX_SEQUENCE_LENGTH = 2048
# Of a text that is too large to be read whole, so much more than the windows take is read: it
# leaves room for a random choice.
ROOM = 8
TOKEN_BYTES = 4  # of text, about
# Tokenizers may take time that grows with the square of a stretch without a break, blanks or not.
LONGEST_RUN = 25_000  # characters
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{LONGEST_RUN + 1}}}|(?<!\s)\s{{{LONGEST_RUN + 1}}}")
_RUN = re.compile(r"\S+|\s+")


def encode_documents(
    documents: Iterable[str], tokenizer: Any, limit: int | None = None, say: Say = say_on_stderr
) -> array[int]:
    """Token ids of all documents in order, each followed by the end token.

    tokenizer: a transformers tokenizer; limit: stop after the document that reaches so many, and
    after so many documents. A document is cut where it goes on without a break, which is said once.
    Raises UserError for text that the tokenizer cannot encode.
    """
    end = tokenizer.eos_token_id
    ids = array("q")
    long_runs = 0
    for number, document in enumerate(islice(documents, limit), 1):
        if not document:
            continue
        pieces = cut_long_runs(document)
        long_runs += len(pieces) > 1
        if long_runs == 1 and len(pieces) > 1:
            say(
                f"document {number} of the text has more than {LONGEST_RUN:,} characters without a "
                "break; such stretches are cut there"
            )
        for piece in pieces:
            with _explain_tokenizer(f"the tokenizer cannot encode document {number} of the text"):
                # verbose=False: windows are cut afterwards, a long document is no mistake.
                found = tokenizer(piece, add_special_tokens=False, verbose=False)
                ids.extend(found["input_ids"])
        if end is not None:
            ids.append(end)
        if limit is not None and len(ids) >= limit:
            break
    return ids


def cut_long_runs(document: str) -> list[str]:
    """The document in pieces, none with more than LONGEST_RUN characters without a break."""
    if len(document) <= LONGEST_RUN or not _LONG_RUN.search(document):
        return [document]
    cuts = [
        place
        for run in _RUN.finditer(document)
        for place in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)
    ]
    return [document[a:b] for a, b in zip([0, *cuts], [*cuts, len(document)], strict=True)]


def sample_windows(
    source: str | os.PathLike[str],
    tokenizer: Any,
    samples: int,
    sequence_length: int,
    seed: int,
    say: Say = say_on_stderr,
) -> torch.Tensor:
    """Calibration windows: `samples` disjoint windows at random places, int64 [samples, length].

    Raises UserError if the text is too short for them.
    """
    wrong = [
        *out_of_range("samples", samples, 1, MAX_WINDOWS),
        *out_of_range("seed", seed, 0, MAX_SEED),
    ]
    if wrong:
        raise UserError("\n".join(wrong))
    source = os.fspath(source)
    table, tokens = _read_windows(source, tokenizer, samples, sequence_length, say)
    if len(table) < samples:
        raise UserError(
            f"calibration text {source} is too short: its {tokens} tokens fill {len(table)} "
            f"windows of {sequence_length}, --samples asks for {samples}. Give more text, "
            f"--samples {max(len(table), 1)} or a smaller --sequence-length"
        )
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    return table[order[:samples].sort().values].contiguous()


def strided_windows(
    source: str | os.PathLike[str],
    tokenizer: Any,
    windows: int,
    sequence_length: int,
    minimum: int = 2,
    say: Say = say_on_stderr,
) -> torch.Tensor:
    """Evaluation windows: non-overlapping, at a fixed stride over the whole text.

    All of the text's windows if it holds no more than `windows`; int64 [<= windows, length].
    Raises UserError if it holds fewer than `minimum`.
    """
    if wrong := out_of_range("windows", windows, minimum, MAX_WINDOWS):
        raise UserError("\n".join(wrong))
    source = os.fspath(source)
    table, tokens = _read_windows(source, tokenizer, windows, sequence_length, say)
    available = len(table)
    if available < minimum:
        raise UserError(
            f"text {source} is too short: its {tokens} tokens fill {available} windows of "
            f"{sequence_length}, at least {minimum} are needed"
        )
    count = min(windows, available)
    return table[torch.arange(count) * available // count].contiguous()


def _read_windows(
    source: str, tokenizer: Any, windows: int, length: int, say: Say
) -> tuple[torch.Tensor, int]:
    """All windows of what is read of a text, int64 [S, length], and its number of tokens.

    Much of a dataset or of a very large file stays unread.
    """
    need = ROOM * windows * length
    documents = read_documents(source, say, max(WHOLE_BYTES, need * TOKEN_BYTES))
    ids = encode_documents(documents, tokenizer, None if is_file(source) else need, say)
    available = len(ids) // length
    return torch.tensor(ids[: available * length]).view(available, length), len(ids)


def load_tokenizer(path: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder. Raises UserError if there is none."""
    from transformers import AutoTokenizer

    special = [f.name for f in Path(path).iterdir() if not (f.is_file() or f.is_dir())]
    if special:
        raise UserError(f"{path} holds {special}, pipes or devices, which are no files of a model")
    with _explain_tokenizer(f"{path} has no usable tokenizer"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


@contextmanager
def _explain_tokenizer(failure: str) -> Iterator[None]:
    """Tokenizers raise whatever they like: Exception itself, what a missing library raises, and
    what Rust panics with, which is no Exception."""
    try:
        yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise UserError(f"{failure}: {reason_of(e)}") from None


def window_length(config: Any, asked: int | None) -> int:
    """Tokens of a window, by default min(2048, the model's maximum). config: of transformers.

    Raises UserError beyond it.
    """
    longest = getattr(config, "max_position_embeddings", None) or MAX_SEQUENCE_LENGTH
    length = min(MAX_SEQUENCE_LENGTH, longest) if asked is None else asked
    if not 2 <= length <= longest:
        raise UserError(f"sequence_length is {length}, allowed are 2 to {longest}")
    return length


def require_known_tokens(windows: torch.Tensor, vocabulary: int, path: Path) -> None:
    """Raises UserError if windows hold tokens that a model of so many does not know."""
    if int(windows.max()) >= vocabulary:
        raise UserError(
            f"the tokenizer in {path} gives token {int(windows.max())}, the model "
            f"knows {vocabulary}: tokenizer and model do not belong together"
        )
