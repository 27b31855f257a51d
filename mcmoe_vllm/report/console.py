"""Where tables and lines for people are printed."""

from __future__ import annotations

from typing import Any

import rich.console
from rich.text import Text

from mcmoe_vllm.errors import printable


class Console(rich.console.Console):
    """A console for text that others have named: control characters are shown as escapes; markup
    and highlighting are off unless asked for."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **how})

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text), **how)

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704  # of the exception that is being handled: the program ends with it
