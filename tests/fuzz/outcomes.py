"""What a command made of damaged input, and whether that is allowed.

Allowed is to do the work (0), to find a check failed (1) and to refuse in a sentence (2): below
1 kB, without control characters, with nothing written, in bounded time, and without a look outside.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_CHARACTERS = 1000
SECONDS = 60


@dataclass(frozen=True)
class Outcome:
    """code: the exit code, None without one; faults: what is not allowed."""

    code: int | None
    said: str
    faults: list[str] = field(default_factory=list)

    @property
    def word(self) -> str:
        if self.faults:
            return self.faults[0].partition(":")[0]
        words = {None: "not run", 0: "accepted", 1: "check failed"}
        return words.get(self.code, "refused")


class Overtime(BaseException):
    """No exception that a library would catch."""


_watched: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event == "open" and isinstance(arguments[0], str | bytes | Path):
        _watched.append(os.fsdecode(arguments[0]))


sys.addaudithook(_watch)


def run(arguments: Sequence[object], folder: Path, secret: Path) -> Outcome:
    """The command line in this process, on input in `folder`; `secret` must never be opened."""
    from mcmoe_vllm.cli import main

    global _watched
    before = _listing(folder)
    out, err = io.StringIO(), io.StringIO()
    faults: list[str] = []
    code: int | None = None
    _watched = []
    try:
        with _limit(SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(a) for a in arguments])
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except Overtime:
        faults.append(f"hang: {_place(traceback.extract_tb(sys.exc_info()[2]))}")
    except BaseException as e:
        where = _place(traceback.extract_tb(e.__traceback__))
        faults.append(f"traceback: {type(e).__name__} at {where}: {str(e)[:200]}")
    opened, _watched = _watched, None
    strangers = [name for name in opened if _is_stranger(name, folder, secret)]
    if strangers:
        faults.append(f"read outside: {strangers[0]}")
    if not faults and code not in (0, 1, 2):
        faults.append(f"exit code: {code}")
    if code == 2:
        faults += _wrong_words(err.getvalue())
        if _listing(folder) != before:
            faults.append("wrote: refused, and the folder is another")
    if secret.read_text() in out.getvalue() + err.getvalue():
        faults.append("read outside: the secret was shown")
    return Outcome(code, err.getvalue().strip()[-300:], faults)


def _is_stranger(name: str, folder: Path, secret: Path) -> bool:
    """Whether an opened name lies beside the folder: links in it may lead elsewhere, to weights on
    another disk, but names may not."""
    path = os.path.normpath(os.path.abspath(name))
    return path == str(secret) and not path.startswith(f"{folder}{os.sep}")


def _wrong_words(said: str) -> Iterator[str]:
    refusal = said[said.rfind("error: ") :] if "error: " in said else ""
    if not refusal.removeprefix("error: ").strip():
        yield f"wordless: {said[-200:]!r}"
    if len(refusal) > MOST_CHARACTERS:
        yield f"wordy: {len(refusal)} characters"
    if any(ord(c) < 32 and c not in "\n\t" for c in refusal):
        yield f"control characters: {refusal[:200]!r}"


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Overtime

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a folder, links not followed."""
    found = []
    for entry in sorted(folder.rglob("*")):
        status = entry.lstat()
        found.append((str(entry), status.st_size, status.st_mtime_ns))
    return found


def _place(frames: traceback.StackSummary) -> str:
    ours = [f for f in frames if "mcmoe" in f.filename and "fuzz" not in f.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
