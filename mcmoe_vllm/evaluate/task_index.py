"""Which tasks lm-evaluation-harness knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def open_task_index(tasks: Sequence[str], include_path: str | None) -> Any:
    """The harness's TaskManager, with all that it knows by name; include_path: a folder with more.

    Where that folder holds all of `tasks`, it alone is read: the harness brings 14,000 of its own,
    which take a dozen seconds, in every process.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):  # groups may name tasks of the harness
            return own
    return TaskManager(include_path=include_path)
