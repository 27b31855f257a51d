"""`mcmoe`: parse -> call -> render. Results go to stdout, talk to stderr; exit codes are honest:
0 done, 1 a check failed, 2 the user's input cannot be used, 128 + N ended by signal N (130 Ctrl-C,
143 SIGTERM, 141 when nobody reads the output any more)."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from mcmoe_vllm.arguments import parse
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.disk import explain_os_errors, is_stdout, write_json
from mcmoe_vllm.errors import UserError, brief, printable
from mcmoe_vllm.flags import given_flags
from mcmoe_vllm.places import JOB_FILE, require_result, work_folder

ENDING = (signal.SIGTERM, signal.SIGHUP)  # that end a program which does not listen to them


class Ended(BaseException):
    """The program was told to end, by a signal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    _open_streams()
    parsed = argparse.Namespace()
    with _ending_on_signals():
        try:
            try:
                parsed = parse(arguments)
                return int(COMMANDS[parsed.command](parsed) or 0)
            finally:
                sys.stdout.flush()
        except UserError as e:
            return _fail(str(e))
        except BrokenPipeError:
            _drop(sys.stdout)
            return 128 + signal.SIGPIPE
        except OSError as e:
            _drop(sys.stdout)
            file = f" ({e.filename})" if e.filename else ""
            return _fail(f"reading or writing failed: {e.strerror or e}{file}")
        except MemoryError:
            return _fail(OUT_OF_MEMORY)
        except RuntimeError as e:
            if not _is_out_of_memory(e):
                raise
            return _fail(f"{OUT_OF_MEMORY} ({str(e).strip().splitlines()[0]})")
        except KeyboardInterrupt:
            return _interrupted("interrupted", parsed, signal.SIGINT)
        except Ended as e:
            return _interrupted(signal.Signals(e.args[0]).name, parsed, e.args[0])


OUT_OF_MEMORY = (
    "there is not enough memory: close other programs, or give fewer --samples or a shorter "
    "--sequence-length"
)


def _fail(message: str) -> int:
    _tell(f"error: {message}")
    return 2


def _interrupted(how: str, parsed: argparse.Namespace, number: int) -> int:
    """Say what is left of an interrupted command; its exit code."""
    folder = _unfinished(parsed)
    kept = f"; finished layers are kept in {folder}, add --resume to continue" if folder else ""
    _tell(f"{how}{kept}")
    return 128 + number


def _tell(message: str) -> None:
    with suppress(OSError):  # of a full device, or a pipe that nobody reads: none is left to tell
        print(brief(message), file=sys.stderr)
    _drop(sys.stderr)


def _unfinished(parsed: argparse.Namespace) -> Path | None:
    """The work directory that a command leaves, if it leaves one."""
    if getattr(parsed, "command", None) not in ("quantize", "plan") or "sweep" in parsed:
        return None
    try:
        folder = work_folder(parsed.output, getattr(parsed, "work_dir", None))
    except UserError:
        return None
    return folder if (folder / JOB_FILE).exists() else None


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch's own errors, of a GPU and of a CPU."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _open_streams() -> None:
    """A closed stream becomes /dev/null, lest the next file that is opened be taken for it; a name
    that the terminal's encoding lacks is escaped."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop(stream: TextIO) -> None:
    """Flush a stream; what it cannot take is not tried again at the end of the program, which would
    then end with an exit code of its own."""
    try:
        stream.flush()
    except OSError:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Signals that would end the program at once unwind it instead, so that unfinished files and
    processes go with it. What is ignored (nohup) or handled by others stays so."""

    def end(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise Ended(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.getsignal(n) for n in ENDING}
        before = {n: handler for n, handler in before.items() if handler is signal.SIG_DFL}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _options(parsed: argparse.Namespace) -> QuantizeOptions:
    """What is asked for; of a job that is resumed, what it was started with."""
    given = given_flags(QuantizeOptions, parsed)
    if given.get("resume"):
        from mcmoe_vllm.compress.job import resumed_flags

        given = resumed_flags(given)
    return QuantizeOptions(**given)


def _run_quantize(parsed: argparse.Namespace) -> None:
    options = _options(parsed)
    from mcmoe_vllm.compress.pipeline import quantize

    result = quantize(options)
    if "json" in parsed:
        print(json.dumps(result, indent=2))


def _run_plan(parsed: argparse.Namespace) -> None:
    options = _options(parsed)
    if "plot" in parsed:
        require_result(parsed.plot, options.calibration)
    from mcmoe_vllm.compress.pipeline import plan, sweep
    from mcmoe_vllm.report.plots import write_sweep

    if "sweep" not in parsed:
        plan(options)
        if not is_stdout(parsed.output):
            print(printable(parsed.output))
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
        require_result(parsed.heatmap)
    from mcmoe_vllm.checkpoint.manifest import read_manifest
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
        uncovered = read_manifest(found.path).uncovered
        if uncovered is not None:
            print(f"not checked: {uncovered}", file=sys.stderr)


def _run_eval(parsed: argparse.Namespace) -> None:
    if "json" in parsed:
        require_result(parsed.json, getattr(parsed, "text", None))
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

    folder = getattr(parsed, "self_test", None)
    if folder is None:
        findings = run_doctor()
    else:
        from mcmoe_vllm.self_test import run_self_test

        findings = run_self_test(folder)
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
