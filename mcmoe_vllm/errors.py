"""The one exception whose message is written for the user, and how it lists offenders."""

from __future__ import annotations

from collections.abc import Sequence


def some(offenders: Sequence[str], most: int = 20) -> str:
    """A list of offenders, one a line, the rest counted."""
    shown = [f"\n  - {line}" for line in offenders[:most]]
    if len(offenders) > most:
        shown.append(f"\n  - and {len(offenders) - most} more")
    return "".join(shown)


class UserError(ValueError):
    """Something the user gave cannot be used: the message names the value, the allowed range
    and the remedy. The command line prints it without a traceback and exits with 2."""
