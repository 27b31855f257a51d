"""The one exception whose message is written for the user, how it lists offenders, and how what
others have named is shown."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

MOST_SHOWN = 980  # bytes of a message on a terminal
LONG_WORD = 160  # characters; most paths are shorter
# Controls but tabs and line breaks; marks that turn the direction of text; halves of characters.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


class UserError(ValueError):
    """Something the user gave cannot be used: the message names the value, the allowed range
    and the remedy. The command line prints it without a traceback and exits with 2."""


def some(offenders: Sequence[str], most: int = 20, characters: int = 700) -> str:
    """A list of offenders, one a line, the rest counted: as many as `characters` have room for."""
    lengths = itertools.accumulate(len(line) for line in offenders)
    fitting = sum(length <= characters for length in lengths)
    return "".join(f"\n  - {line}" for line in _first(offenders, max(1, min(most, fitting))))


def count(names: Sequence[str], noun: str) -> str:
    """`3 tensors: a, b, c`: all of a short list, the first ten of a long one."""
    plural = "s" * (len(names) != 1)
    return f"{len(names)} {noun}{plural}: {', '.join(_first(names, 10))}"


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: what is unsafe becomes its escape."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def brief(message: str) -> str:
    """A message of at most MOST_SHOWN bytes, printable. If it is longer, long words lose their
    middle, then the message does: what was wrong stands first, what to do about it last."""
    message = printable(message)
    if _bytes(message) > MOST_SHOWN:
        message = re.sub(rf"\S{{{LONG_WORD + 1},}}", lambda found: _cut_word(found[0]), message)
    if _bytes(message) <= MOST_SHOWN:
        return message
    content = message.encode()
    head, tail = content[: MOST_SHOWN * 6 // 10], content[-MOST_SHOWN * 3 // 10 :]
    left_out = len(content) - len(head) - len(tail)
    parts = (head.decode(errors="ignore"), tail.decode(errors="ignore"))
    return f" [... {left_out} bytes ...] ".join(parts)


def _bytes(text: str) -> int:
    return len(text.encode())


def _cut_word(word: str) -> str:
    return f"{word[:100]}[...]{word[-40:]}"


def _first(offenders: Sequence[str], most: int) -> list[str]:
    rest = len(offenders) - most
    return [*offenders[:most], *([f"and {rest} more"] if rest > 0 else [])]


def reason_of(error: BaseException) -> str:
    """What an exception says, in a line: of many, the first; of none, its type."""
    if isinstance(error, KeyError) and len(error.args) == 1:
        return f"{error.args[0]!r} is missing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
