"""`mcmoe`: parse -> call -> render. Results go to stdout, talk to stderr; exit codes are honest:
0 done, 1 a check failed, 2 the user's input cannot be used, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mcmoe_vllm.arguments import parse
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.disk import explain_os_errors, require_file, write_json
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.flags import from_flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        parsed = parse(arguments)
        return int(COMMANDS[parsed.command](parsed) or 0)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished layers are kept, add --resume to continue", file=sys.stderr)
        return 130


def _run_quantize(parsed: argparse.Namespace) -> None:
    options = from_flags(QuantizeOptions, parsed)
    from mcmoe_vllm.compress.pipeline import quantize

    result = quantize(options)
    if "json" in parsed:
        print(json.dumps(result, indent=2))


def _run_plan(parsed: argparse.Namespace) -> None:
    options = from_flags(QuantizeOptions, parsed)
    if "plot" in parsed:
        require_file(parsed.plot)
    from mcmoe_vllm.compress.pipeline import plan, sweep
    from mcmoe_vllm.report.plots import write_sweep

    if "sweep" not in parsed:
        plan(options)
        print(parsed.output)
        return
    points = sweep(options, parsed.sweep)
    print(" bits  expected KL (nats per token, before finetuning)")
    for bits, divergence in points:
        print(f"{bits:5.2f}  {divergence:.4f}")
    if "plot" in parsed:
        with explain_os_errors(f"writing {parsed.plot}"):
            write_sweep(points, Path(parsed.plot))


def _run_allocate(parsed: argparse.Namespace) -> None:
    from mcmoe_vllm.allocate.pmq import allocate_file

    result = allocate_file(**_given(parsed))
    for layer, row in enumerate(result.bits):
        print(f"{layer:4d} {''.join(map(str, row))}")
    print(f"objective {result.objective:.6g}, {result.seconds:.2f} s", file=sys.stderr)


def _run_calibrate_pruning(parsed: argparse.Namespace) -> None:
    from mcmoe_vllm.pruning.calibration import calibrate_checkpoint

    table = calibrate_checkpoint(**_given(parsed))
    print("layer  drop below this share of a token's largest weight")
    for layer, ratio in table.layer_ratios().items():
        print(f"{layer:5d}  {ratio:.4f}")


def _run_inspect(parsed: argparse.Namespace) -> None:
    if "heatmap" in parsed:
        require_file(parsed.heatmap)
    from mcmoe_vllm.inspection import inspect_checkpoint, print_inspection
    from mcmoe_vllm.report.plots import write_bits_heatmap

    found = inspect_checkpoint(parsed.model, check="check" in parsed)
    if "json" in parsed:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_inspection(found)
    if "heatmap" in parsed:
        name = found.path.absolute().name
        with explain_os_errors(f"writing {parsed.heatmap}"):
            pairs = list(found.pairs().values())
            write_bits_heatmap(found.layers, pairs, Path(parsed.heatmap), name)
    if "check" in parsed:
        print("all checks passed", file=sys.stderr)


def _run_eval(parsed: argparse.Namespace) -> None:
    if "json" in parsed:
        require_file(parsed.json)
    figures = _scores_of_tasks(parsed) if "tasks" in parsed else _figures_of_text(parsed)
    if "json" in parsed:
        with explain_os_errors(f"writing {parsed.json}"):
            write_json(parsed.json, figures)


def _scores_of_tasks(parsed: argparse.Namespace) -> list[dict[str, Any]]:
    from mcmoe_vllm.evaluate.tasks import evaluate_tasks, print_scores

    arguments = _given(parsed, "json", "engine", "engine_args")
    scores = evaluate_tasks(engine=getattr(parsed, "engine_args", None), **arguments)
    print_scores(parsed.model, scores, getattr(parsed, "against", None))
    return [score.to_dict() for score in scores]


def _figures_of_text(parsed: argparse.Namespace) -> dict[str, Any]:
    from mcmoe_vllm.evaluate.perplexity import evaluate, print_evaluation

    result = evaluate(**_given(parsed, "json"))
    print_evaluation(result)
    return result.to_dict()


def _given(parsed: argparse.Namespace, *without: str) -> dict[str, Any]:
    """What was parsed, by the names of a function's arguments."""
    return {n: v for n, v in vars(parsed).items() if n not in ("command", *without)}


def _run_doctor(parsed: argparse.Namespace) -> int:
    from mcmoe_vllm.doctor import has_errors, print_findings, run_doctor

    findings = run_doctor()
    print_findings(findings)
    return int(has_errors(findings))


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "quantize": _run_quantize,
    "plan": _run_plan,
    "allocate": _run_allocate,
    "calibrate-pruning": _run_calibrate_pruning,
    "inspect": _run_inspect,
    "eval": _run_eval,
    "doctor": _run_doctor,
}


if __name__ == "__main__":
    sys.exit(main())
