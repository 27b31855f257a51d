"""The one exception whose message is written for the user, and how it lists offenders."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


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


def _first(offenders: Sequence[str], most: int) -> list[str]:
    rest = len(offenders) - most
    return [*offenders[:most], *([f"and {rest} more"] if rest > 0 else [])]
