"""One line per finished layer, and the time that remains."""

from __future__ import annotations

import time
from typing import Any


class Progress:
    """One line per layer on stderr, below them a bar with the remaining time on a terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        from mcmoe_vllm.report.console import Console

        self._console = Console(stderr=True, soft_wrap=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task: Any = None
        self._phase, self._total, self._done, self._first = "", 0, 0, 0
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        self._console.print(message)

    def start(self, phase: str, total: int, done: int) -> None:
        """Begin a phase of `total` layers of which `done` were finished before."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._phase, self._total, self._done, self._first = phase, total, done, done
        self._began = time.monotonic()
        self._task = self._bar.add_task(phase, total=total, completed=done)
        if done:
            self.say(f"{phase}: resuming at layer {done + 1} of {total}")

    def layer_done(self, index: int, message: str) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        pace = (time.monotonic() - self._began) / (self._done - self._first)
        eta = time.strftime("%H:%M:%S", time.gmtime(pace * (self._total - self._done)))
        self.say(f"{self._phase} layer {index + 1}/{self._total}: {message} | ETA {eta}")
