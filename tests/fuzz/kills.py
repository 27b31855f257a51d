"""Jobs killed at random moments and taken up again, compared with undisturbed ones byte by byte.

    PYTHONPATH=.:kernels python -m tests.fuzz.kills --kills 200 --processes 16 --json FILE

A job is a child forked from a process that has imported everything, so that kills hit work and not
imports; --executable runs the program `mcmoe` instead. SIGKILL comes at a moment drawn uniformly
from the time that an undisturbed job takes beside as many others, up to three times; then the job
runs to its end. `--first N --kills 1` repeats the job of a number.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import select
import shutil
import signal
import statistics
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

MOST_KILLS = 3  # of a job
PATIENCE = 20  # undisturbed times after which a job hangs
TRACEBACK = 70  # exit code of a child that ended by an exception
VERDICTS = ("identical", "different", "left behind", "refused", "crashed")
UNLIKE = ("seconds", "peak_rss_bytes")  # keys of report.json, in objects at any depth
TEXT = ("argparse", "calendar", "heapq", "shlex", "statistics", "textwrap")
WORK = "out.work"


@dataclass(frozen=True)
class Inputs:
    """What jobs work on. size: flags that say how much text they take."""

    model: Path
    text: Path
    plan: Path
    compressed: Path
    size: tuple[str, ...]
    executable: bool


@dataclass(frozen=True)
class Command:
    """A command of `mcmoe`. arguments: of the inputs and the place of its output; output: the name
    of that; prepare: what lies there before; resumes: whether it knows --resume."""

    arguments: Callable[[Inputs, Path], list[object]]
    output: str
    resumes: bool = True
    prepare: Callable[[Inputs, Path], object] = lambda inputs, output: None


def _calibration(inputs: Inputs) -> list[object]:
    return ["--calibration", inputs.text, *inputs.size, "--device", "cpu"]


COMMANDS: dict[str, Command] = {
    "quantize": Command(lambda i, out: ["quantize", i.model, "-o", out, *_calibration(i)], "out"),
    "plan": Command(
        lambda i, out: [
            *("plan", i.model, "-o", out, "--work-dir", out.with_name(WORK)), *_calibration(i)
        ],
        "plan.json",
    ),
    "quantize --plan": Command(
        lambda i, out: [
            *("quantize", i.model, "-o", out, "--plan", i.plan, "--target-drop", "0.15"),
            *_calibration(i),
        ],
        "out",
    ),
    "calibrate-pruning": Command(
        lambda i, out: ["calibrate-pruning", out, "--text", i.text, *i.size, "--device", "cpu"],
        "out",
        resumes=False,
        prepare=lambda i, out: shutil.copytree(i.compressed, out),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Undisturbed:
    """A job that nobody stopped: its seconds, and name -> (mode, hash) of the files it wrote."""

    seconds: float
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Job:
    """What became of a disturbed one. moments: of the kills, in shares of an undisturbed time."""

    number: int
    command: str
    verdict: str
    moments: tuple[float, ...]
    detail: str = ""


def run_undisturbed(inputs: Inputs, name: str) -> Undisturbed:
    """Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, log, output = _places(Path(scratch), inputs, name)
        started = time.monotonic()
        code = run(inputs, _arguments(inputs, name, output, resume=False), log)
        if code != 0 or os.listdir(folder) != [output.name]:
            raise RuntimeError(f"{name}: exit code {code}, {os.listdir(folder)}: {_last(log)}")
        return Undisturbed(time.monotonic() - started, snapshot(output))


def try_job(inputs: Inputs, name: str, undisturbed: Undisturbed, seed: int, number: int) -> Job:
    """Start a job, kill it at random moments, and let it end."""
    rng = Random(f"{seed} {number}")
    moments: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, log, output = _places(Path(scratch), inputs, name)
        code: int | None = None
        while code is None and len(moments) < MOST_KILLS:
            moments.append(rng.random())
            code = _go_on(inputs, name, output, log, moments[-1] * undisturbed.seconds)
        if code is None:
            code = _go_on(inputs, name, output, log, PATIENCE * undisturbed.seconds + 60)
        else:
            moments.pop()  # it had ended before
        verdict, detail = judge(code, folder, output, undisturbed.files)
        detail = detail or ("" if verdict == "identical" else _last(log))
    return Job(number, name, verdict, tuple(round(m, 3) for m in moments), detail)


def judge(
    code: int | None, folder: Path, output: Path, expected: dict[str, tuple[int, str]]
) -> tuple[str, str]:
    """The verdict on a job that ended with `code` (None: it had to be stopped), and the files that
    are others than expected or too many."""
    if code != 0:
        return ("refused" if code == 2 else "crashed"), ""
    found = snapshot(output)
    wrong = sorted({n for n, _ in found.items() ^ expected.items()})
    if wrong:
        return "different", ", ".join(wrong)
    left = sorted(set(os.listdir(folder)) - {output.name})
    return ("left behind", ", ".join(left)) if left else ("identical", "")


def snapshot(output: Path) -> dict[str, tuple[int, str]]:
    """Mode and hash of each file, without what differs between any two runs."""
    files = [output] if output.is_file() else [f for f in output.rglob("*") if not f.is_dir()]
    return {
        str(f.relative_to(output)): (f.lstat().st_mode, sha256(_comparable(f)).hexdigest())
        for f in files
    }


def _comparable(file: Path) -> bytes:
    content = file.read_bytes()
    if file.name != "report.json":
        return content

    def without(found: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in found.items() if key not in UNLIKE}

    return json.dumps(json.loads(content, object_hook=without)).encode()


def _go_on(inputs: Inputs, name: str, output: Path, log: Path, seconds: float) -> int | None:
    """Start a job, or take it up as its user would, and kill it after `seconds`."""
    work = output.with_name(WORK)
    begun = work.is_dir() and any(entry != "lock" for entry in os.listdir(work))
    if COMMANDS[name].resumes and output.exists() and not work.exists():
        return 0  # killed behind its last step
    return run(inputs, _arguments(inputs, name, output, resume=begun), log, seconds)


def run(
    inputs: Inputs, arguments: Sequence[object], log: Path, seconds: float | None = None
) -> int | None:
    """The exit code of `mcmoe` in a process of its own; None if it was killed after `seconds`."""
    pid = os.fork()
    if pid == 0:
        os._exit(_work([str(a) for a in arguments], log, inputs.executable))
    ended = os.pidfd_open(pid)
    try:
        if not select.select([ended], [], [], seconds)[0]:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(ended)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if code == -signal.SIGKILL else code


def _work(arguments: list[str], log: Path, executable: bool) -> int:
    """What the child does."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if executable:
        program = Path(sys.executable).with_name("mcmoe")
        os.execv(program, [str(program), *arguments])
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
    try:
        import torch

        from mcmoe_vllm.cli import main

        torch.set_num_threads(1)  # those of the parent are not here
        return main(arguments)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return TRACEBACK
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _places(scratch: Path, inputs: Inputs, name: str) -> tuple[Path, Path, Path]:
    """The folder of a job, which in the end holds its output alone; its log; its output."""
    folder = scratch / "job"
    folder.mkdir()
    output = folder / COMMANDS[name].output
    COMMANDS[name].prepare(inputs, output)
    return folder, scratch / "log", output


def _arguments(inputs: Inputs, name: str, output: Path, resume: bool) -> list[object]:
    return [*COMMANDS[name].arguments(inputs, output), *(["--resume"] if resume else [])]


def _last(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-400:] if log.exists() else ""


def make_inputs(asked: argparse.Namespace, folder: Path) -> Inputs:
    """The files of `asked`, or small ones made here; a plan and a compressed folder of them."""
    model, text = asked.model, asked.text
    if model is None:
        from tests.conftest import make_tiny_model

        model = make_tiny_model(folder / "model", "mixtral")
    if text is None:
        text = folder / "text.jsonl"
        library = Path(sysconfig.get_path("stdlib"))
        documents = ((library / f"{name}.py").read_text() for name in TEXT)
        text.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    size = ("--samples", str(asked.samples), "--sequence-length", str(asked.sequence_length))
    made = Inputs(model, text, folder / "plan.json", folder / "compressed", size, asked.executable)
    for name, output in (("plan", made.plan), ("quantize", made.compressed)):
        _import_as(made, _arguments(made, name, output, resume=False), folder)
        if not output.exists():
            raise RuntimeError(f"{name}: {_last(folder / 'log')}")
    return made


def _import_as(inputs: Inputs, arguments: Sequence[object], folder: Path) -> None:
    """Run `mcmoe` in a child and import here what it had imported in the end."""
    modules = folder / "modules"
    pid = os.fork()
    if pid == 0:
        _work([str(a) for a in arguments], folder / "log", executable=False)
        modules.write_text("\n".join(sys.modules))
        os._exit(0)
    os.waitpid(pid, 0)
    if not inputs.executable:
        for name in modules.read_text().splitlines():
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def run_campaign(asked: argparse.Namespace, inputs: Inputs) -> Iterator[Job]:
    """Jobs as they end, until there were as many kills as asked for."""
    names = asked.commands or list(COMMANDS)
    fork = multiprocessing.get_context("fork")
    kills, started, numbers = 0, time.monotonic(), itertools.count(asked.first)
    with ProcessPoolExecutor(asked.processes, mp_context=fork) as pool:
        undisturbed = {name: _measure(pool, inputs, name, asked.processes) for name in names}
        running: set[Future[Job]] = set()
        while True:
            enough = kills >= asked.kills or time.monotonic() - started > asked.seconds
            while not enough and len(running) < asked.processes:
                number = next(numbers)
                name = names[number % len(names)]
                given = (inputs, name, undisturbed[name], asked.seed, number)
                running.add(pool.submit(try_job, *given))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = future.result()
                kills += len(job.moments)
                yield job


def _measure(pool: ProcessPoolExecutor, inputs: Inputs, name: str, processes: int) -> Undisturbed:
    """As many undisturbed jobs at once as there will be; at least two, which must be alike."""
    futures = [pool.submit(run_undisturbed, inputs, name) for _ in range(max(2, processes))]
    runs = [future.result() for future in futures]
    for other in runs:
        wrong = sorted({n for n, _ in other.files.items() ^ runs[0].files.items()})
        if wrong:
            raise RuntimeError(f"two undisturbed runs of {name} differ in {', '.join(wrong)}")
    return Undisturbed(statistics.median(r.seconds for r in runs), runs[0].files)


def summarize(jobs: Sequence[Job]) -> dict[str, Any]:
    """Counts, in all and by command, and every job that is not as the undisturbed one."""

    def count(some: Sequence[Job]) -> dict[str, int]:
        verdicts = Counter(job.verdict for job in some)
        kills = sum(len(job.moments) for job in some)
        return {"kills": kills, "jobs": len(some), **{v: verdicts[v] for v in VERDICTS}}

    names = sorted({job.command for job in jobs})
    return {
        **count(jobs),
        "by_command": {n: count([job for job in jobs if job.command == n]) for n in names},
        "faults": [vars(job) for job in jobs if job.verdict != "identical"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kills", type=int, default=200)
    add("--seconds", type=float, default=float("inf"), help="start no job after that")
    add("--processes", type=int, default=os.cpu_count())
    add("--commands", nargs="+", choices=COMMANDS, help="by default all")
    add("--executable", action="store_true", help="run the program mcmoe, imports included")
    add("--model", type=Path, help="by default a tiny random one")
    add("--text", type=Path)
    add("--samples", type=int, default=4)
    add("--sequence-length", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--first", type=int, default=0, help="number of the first job")
    add("--json", metavar="FILE")
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started, jobs = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for job in run_campaign(asked, make_inputs(asked, Path(folder))):
            jobs.append(job)
            if job.verdict != "identical":
                print(job, file=sys.stderr, flush=True)
    result = {**summarize(jobs), "seconds": round(time.monotonic() - started)}
    if asked.json:
        Path(asked.json).write_text(json.dumps(result, indent=1))
    print(json.dumps({**result, "faults": len(result["faults"])}, indent=1))
    return int(bool(result["faults"]) or not jobs)


if __name__ == "__main__":
    sys.exit(main())
