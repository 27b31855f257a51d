"""Scores on tasks of EleutherAI's lm-evaluation-harness, served by vLLM.

Every model is run by a process of its own, which gives the engine's memory back. A task's
recovery is its score over the base model's.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mcmoe_vllm.checkpoint.files import open_checkpoint, own_config, resolve_model
from mcmoe_vllm.disk import is_number
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.evaluate.engine import run_engine_program
from mcmoe_vllm.evaluate.task_index import open_task_index
from mcmoe_vllm.flags import out_of_range
from mcmoe_vllm.pruning.table import parse_switch, read_table

NEEDED = {
    "vllm": 'pip install "mcmoe-vllm[vllm]"',
    "lm_eval": 'pip install "mcmoe-vllm[tasks]"',
}


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task; stderr and everything of the base are None where there is none.

    recovery: score / base score; None for metrics of which less is better, and for a base of 0.
    """

    task: str
    metric: str
    higher_is_better: bool
    samples: int | None
    score: float
    stderr: float | None
    base_score: float | None = None
    base_stderr: float | None = None

    @property
    def recovery(self) -> float | None:
        if not self.higher_is_better or not self.base_score:
            return None
        return self.score / self.base_score

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "recovery": self.recovery}


def evaluate_tasks(
    model: str | os.PathLike[str],
    tasks: Sequence[str],
    *,
    against: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    include_path: str | None = None,
    pruning: str | float | None = None,
    engine: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> list[TaskScore]:
    """Score a model (16-bit or mcmoe; folder or Hub name) on tasks by their harness names.

    limit: documents of each task (a share of them below 1); include_path: a folder with more
    tasks; pruning: as for `evaluate`, of the model and not of the base; engine: further arguments
    of vLLM's `LLM`, for both.
    Raises UserError for unknown tasks, missing packages, numbers out of range, an engine that
    fails, and scores that are not finite.
    """
    _require_usable(tasks, num_fewshot, limit)
    missing = {package: remedy for package, remedy in NEEDED.items() if find_spec(package) is None}
    if missing:
        raise UserError(f"--tasks needs {' and '.join(missing)}: {'; '.join(missing.values())}")
    _require_tasks(tasks, include_path)
    common = {"trust_remote_code": trust_remote_code, **(engine or {})}
    job = {
        "tasks": list(tasks),
        "num_fewshot": num_fewshot,
        "limit": limit,
        "include_path": include_path,
    }
    pruned = {} if pruning is None else {"additional_config": {"mcmoe": {"pruning": pruning}}}
    paths = [resolve_model(os.fspath(m)) for m in (model, against) if m is not None]
    if pruning not in (None, "off"):
        parse_switch(pruning, read_table(own_config(open_checkpoint(paths[0]))))
    settings = [{**pruned, **common}, common]
    found = [_run(p, {**job, "engine": engine}) for p, engine in zip(paths, settings, strict=False)]
    return join_scores(found[0], found[1] if against is not None else None)


def _require_usable(tasks: Sequence[str], num_fewshot: int | None, limit: float | None) -> None:
    wrong = []
    if isinstance(tasks, str) or not tasks:
        wrong.append(f"tasks is {tasks!r:.60}, needs a list of names")
    if num_fewshot is not None:
        wrong += out_of_range("num_fewshot", num_fewshot, 0, 1000)
    if limit is not None:
        wrong += out_of_range("limit", limit, None, None, float)
        if not wrong and limit <= 0:
            wrong.append(f"limit is {limit}, needs documents, or a share of them below 1")
    if wrong:
        raise UserError("\n".join(wrong))


def join_scores(found: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[TaskScore]:
    """The harness's results as a list, in its order, each with the base's score beside it.

    Raises UserError for scores that are not finite.
    """
    scores, broken = [], []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or name.endswith("_stderr") or not filtered:
                continue
            others = base["results"].get(task, {}) if base else {}
            pair = (value, others.get(key))
            if any(isinstance(v, float) and not math.isfinite(v) for v in pair):
                broken.append(f"{task} {name}")
                continue
            error = f"{name}_stderr,{filtered}"
            scores.append(
                TaskScore(
                    task=task,
                    metric=name if filtered == "none" else f"{name} ({filtered})",
                    higher_is_better=bool(found["higher_is_better"].get(task, {}).get(name, True)),
                    samples=found["n-samples"].get(task, {}).get("effective"),
                    score=float(value),
                    stderr=_number(metrics.get(error)),
                    base_score=_number(others.get(key)),
                    base_stderr=_number(others.get(error)),
                )
            )
    if broken:
        raise UserError(
            f"the scores of {', '.join(broken)} are not finite: a model's weights are damaged, or "
            "its engine overflows. Leave these tasks out to score the others"
        )
    return scores


def _number(value: Any) -> float | None:
    """The harness writes "N/A" where it has no number, or NaN."""
    return float(value) if is_number(value) else None


def _require_tasks(tasks: Sequence[str], include_path: str | None) -> None:
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"include path {include_path} is not a folder")
    manager = open_task_index(tasks, include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        near = {t: difflib.get_close_matches(t, manager.all_tasks, 3) for t in unknown}
        raise UserError(
            "unknown tasks: "
            + "; ".join(t + (f" (near: {', '.join(n)})" if n else "") for t, n in near.items())
            + ". `lm-eval ls tasks` lists them; --include-path adds a folder of your own"
        )


def _run(path: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's results of one model."""
    given = {**job, "engine": {"pretrained": str(path), **job["engine"]}}
    return dict(run_engine_program("harness_program", given, f"lm-eval could not score {path}"))


def print_scores(model: str, scores: Sequence[TaskScore], base: str | None) -> None:
    """The scores as a table on stdout."""
    from rich.table import Table

    from mcmoe_vllm.report.console import Console

    table = Table(title=model)
    columns = ["task", "metric", "documents", "score"]
    columns += [f"base {base}", "recovery"] if base else []
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for s in scores:
        row = [s.task, s.metric, str(s.samples or ""), _with_error(s.score, s.stderr)]
        if base:
            row.append(_with_error(s.base_score, s.base_stderr))
            row.append("" if s.recovery is None else f"{100 * s.recovery:.1f} %")
        table.add_row(*row)
    Console().print(table)


def _with_error(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if stderr is None else f"{value:.4f} +- {stderr:.4f}"
