"""Which family does what: `python -m tests.families.matrix --json FILE` runs every step of every
family and prints a table.

Each step runs in a process of its own with a time limit; what a family cannot do is a row's text
and ends nothing. Results are kept in FILE, a step that is there is not run again, and steps of a
family share a folder under --work. `--no-serve` leaves out what starts an engine, `--lock` waits
before one where others use the machine too.

    read      transformers' logits, layer by layer: the largest difference over the largest logit
    compress  to 3 bits a weight, attention and shared experts to int4: true bits
    inspect   every tensor as config.json says it
    eval      KL divergence of the compressed model to its 16-bit one
    prune     calibrate-pruning for 15 % of activations: layers with a ratio
    blocks    the compressed model's blocks of experts in vLLM to transformers' on the same weights:
              the largest relative error of a layer
    plain     the 16-bit model in vLLM, float32: mean difference of log-probabilities to our own run
    serve     the compressed one in vLLM to our own run; "control" is that difference to our run of
              the same folder with one expert's gate and up exchanged, which must exceed the bound;
              "pruned" the share of pairs that the served model with its table left out
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.families.families import FAMILIES, save_family
from tests.helpers.engine_environment import engine_environment
from tests.helpers.logprobs import MEAN_ERROR
from tests.helpers.text import CALIBRATION, EVALUATION, write_text

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "examples" / "mixtral-6m"
READ_ERROR = 1e-5
PROMPTS, LENGTH = 4, 200  # longer than the sliding windows
LIMITS = {"read": 120, "compress": 300, "inspect": 60, "eval": 120, "prune": 180, "blocks": 240}
ENGINE_LIMITS = {"plain": 400, "serve": 600}
TURN = 300  # seconds for which the lock is kept
FORK = multiprocessing.get_context("fork")
Result = dict[str, Any]
# Of files: results are kept, and say nothing of the machine.
FOLDERS = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+")


def read(family: str, work: Path) -> Result:
    import torch
    import transformers

    model = work / "model"
    shutil.rmtree(model, ignore_errors=True)
    save_family(family, model, TOKENIZER)
    tokens = torch.tensor(prompts())
    whole = getattr(transformers, FAMILIES[family].cls).from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.cat([whole.eval()(t[None], use_cache=False).logits for t in tokens])
    error = float((logits_of(model) - expected).abs().max() / expected.abs().max())
    return {"error": error, "ok": error < READ_ERROR}


def compress(family: str, work: Path) -> Result:
    from mcmoe_vllm.compress.options import QuantizeOptions
    from mcmoe_vllm.compress.pipeline import quantize
    from mcmoe_vllm.inspection import inspect_checkpoint

    output = work / "compressed"
    shutil.rmtree(output, ignore_errors=True)
    quantize(
        QuantizeOptions(
            model=str(work / "model"),
            output=str(output),
            calibration=str(write_text(work / "calibration.jsonl", CALIBRATION)),
            bits=3,
            samples=4,
            sequence_length=64,
            group_size=64,
            finetune_passes=0,
        )
    )
    return {"bits": inspect_checkpoint(output).expert_bits, "ok": True}


def inspect(family: str, work: Path) -> Result:
    from mcmoe_vllm.inspection import inspect_checkpoint

    return {"ok": inspect_checkpoint(work / "compressed", check=True).checked}


def evaluate(family: str, work: Path) -> Result:
    from mcmoe_vllm.evaluate.perplexity import evaluate

    text = write_text(work / "evaluation.jsonl", EVALUATION)
    found = evaluate(
        str(work / "compressed"),
        str(text),
        against=str(work / "model"),
        windows=4,
        sequence_length=64,
        pruning="off",
    )
    return {"kl": found.kl, "ok": 0 <= found.kl < 1}


def prune(family: str, work: Path) -> Result:
    from mcmoe_vllm.checkpoint.files import open_checkpoint, read_config
    from mcmoe_vllm.pruning.calibration import calibrate_checkpoint
    from mcmoe_vllm.pruning.table import read_table

    output = work / "pruned"
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(work / "compressed", output)
    calibrate_checkpoint(
        str(output),
        str(work / "calibration.jsonl"),
        target_drop=0.15,
        samples=4,
        sequence_length=64,
    )
    table = read_table(read_config(open_checkpoint(output)))
    layers = sum(ratio > 0 for ratio in table.layer_ratios().values()) if table else 0
    return {"layers": layers, "ok": layers > 0}


def blocks(family: str, work: Path) -> Result:
    from tests.families.blocks import block_errors

    row = FAMILIES[family]
    errors = block_errors(work / "compressed", work, row.cls, row.launch)
    return {"error": max(errors), "ok": max(errors) < READ_ERROR}


def plain(family: str, work: Path) -> Result:
    """Both sides of the 16-bit model; what vLLM computes says nothing of this project."""
    served = run_engine(work, [job(work, "plain", work / "model")])[0]["logprobs"]
    error = mean_error(served, logprobs_of(work / "model"))
    return {"error": error, "ok": error <= MEAN_ERROR}


def serve(family: str, work: Path) -> Result:
    jobs = [
        job(work, "unpruned", work / "pruned", pruning="off"),
        job(work, "pruned", work / "pruned", pruning="on", counting=True),
    ]
    unpruned, pruned = run_engine(work, jobs)
    error = mean_error(unpruned["logprobs"], logprobs_of(work / "compressed"))
    exchanged = exchange_gate_and_up(work / "compressed", work / "exchanged")
    control = mean_error(unpruned["logprobs"], logprobs_of(exchanged))
    counts = pruned["metrics"]
    routed, dropped = (
        sum(v for name, v in counts.items() if name.startswith(f"mcmoe_{kind}_pairs_total"))
        for kind in ("routed", "pruned")
    )
    return {
        "error": error,
        "control": control,
        "pruned": dropped / max(routed, 1),
        "ok": error <= MEAN_ERROR < control and dropped > 0,
    }


STEPS: dict[str, Callable[[str, Path], Result]] = {
    "read": read,
    "compress": compress,
    "inspect": inspect,
    "eval": evaluate,
    "prune": prune,
    "blocks": blocks,
    "plain": plain,
    "serve": serve,
}


NEEDS: dict[str, tuple[str, ...]] = {
    "read": (),
    "compress": ("read",),
    **dict.fromkeys(("inspect", "eval", "prune", "blocks"), ("read", "compress")),
    "plain": ("read",),
    "serve": ("read", "compress", "prune"),
}


def prompts() -> list[list[int]]:
    """Token ids, no two prompts alike, hardly one id twice."""
    return [[(i * 37 + 501 * p) % 8000 + 3 for i in range(LENGTH)] for p in range(PROMPTS)]


def logits_of(folder: Path) -> Any:
    """Float32 [P, L, V] of the layer-by-layer run of a folder, compressed or not."""
    import torch

    from mcmoe_vllm.checkpoint.files import open_checkpoint
    from mcmoe_vllm.model.moe_model import open_model
    from mcmoe_vllm.model.runner import final_hidden

    model = open_model(open_checkpoint(folder), "cpu")
    return torch.stack(list(model.logits(final_hidden(model, torch.tensor(prompts())))))


def logprobs_of(folder: Path) -> Any:
    """Of each prompt token but the first, [P, L-1]."""
    import torch

    tokens = torch.tensor(prompts())
    return logits_of(folder)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)


def mean_error(measured: Any, reference: Any) -> float:
    from tests.helpers.logprobs import difference

    return float(difference(measured, reference).mean())


def exchange_gate_and_up(source: Path, target: Path) -> Path:
    """A copy of a folder in which one expert's gate lies where its up was, and its up where its
    gate was: the least that a loader could do wrong."""
    from safetensors.torch import load_file, save_file

    from mcmoe_vllm.checkpoint.files import open_checkpoint, read_config
    from mcmoe_vllm.model.agreement import open_layout

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    checkpoint = open_checkpoint(source)
    layout = open_layout(checkpoint, read_config(checkpoint))
    *halves, _ = layout.expert_weights(layout.skeleton.moe_layers[0], 0)
    for kind in ("_packed", "_scale"):
        for shard in target.glob("*.safetensors"):
            tensors = load_file(shard)
            names = [half + kind for half in halves]
            if names[0] in tensors:
                rows = [tensors[name] for name in names]
                if len(names) == 1:  # both in one, in pairs of rows
                    rows = [rows[0].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)]
                tensors |= dict(zip(names, reversed(rows), strict=True))
                save_file(tensors, shard, metadata={"format": "pt"})
    return target


def job(work: Path, name: str, folder: Path, pruning: str = "", counting: bool = False) -> Path:
    """The file of a job of tests/e2e/engine.py, which asks for prompts' log-probabilities, or for
    metrics."""
    llm = {
        "model": str(folder),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
        "disable_log_stats": not counting,
        **FAMILIES[work.name].launch,
        **({"additional_config": {"mcmoe": {"pruning": pruning}}} if pruning else {}),
    }
    file = work / f"{name}.job.json"
    asked = {
        "llm": llm,
        "prompts": prompts(),
        "max_tokens": 4,
        "then_alone": counting,
        "log": str(work / f"{name}.log"),
        "output": str(work / f"{name}.result.json"),
    }
    file.write_text(json.dumps(asked))
    return file


def run_engine(work: Path, jobs: list[Path]) -> list[Result]:
    """What engine.py answers to jobs, one after another in one process."""
    outputs = [Path(json.loads(j.read_text())["output"]) for j in jobs]
    for output in outputs:
        output.unlink(missing_ok=True)
    child = FORK.Process(target=answer, args=(jobs,))
    child.start()
    child.join()
    missing = [j for j, output in zip(jobs, outputs, strict=True) if not output.exists()]
    if missing:
        log = Path(json.loads(missing[0].read_text())["log"])
        raise RuntimeError(
            last_error(log.read_text(errors="replace") if log.exists() else "killed")
        )
    return [json.loads(output.read_text()) for output in outputs]


def answer(jobs: list[Path]) -> None:
    from tests.e2e import engine

    sys.stdin = io.StringIO("".join(f"{j}\n" for j in jobs))
    engine.main()


def last_error(log: str) -> str:
    """What the last exception says, in a line, files without their folders."""
    lines = [line.rpartition("] ")[2] for line in log.splitlines()]
    if lacking := [line for line in lines if line.startswith("ModuleNotFoundError: ")]:
        return lacking[-1]  # what comes after it does not say which
    named = [i for i, line in enumerate(lines) if "Error: " in line]
    said = " ".join(lines[named[-1] :])[:400] if named else log[-400:]
    return FOLDERS.sub("", said)


def run_step(step: str, family: str, work: Path) -> Result:
    """A step in a process of its own: its result, or why there is none."""
    start, limit = time.monotonic(), {**LIMITS, **ENGINE_LIMITS}[step]
    output = work / f"{step}.json"
    output.unlink(missing_ok=True)
    child = FORK.Process(target=run_child, args=(step, family, work, output))
    child.start()
    child.join(limit)
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)
        return {"ok": False, "why": f"not done after {limit} s"}
    result = {"ok": False, "why": f"ended with {child.exitcode}"}
    if output.exists():
        result = json.loads(output.read_text())
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def run_child(step: str, family: str, work: Path, output: Path) -> None:
    os.setpgrp()  # an engine's processes end with it
    with (work / f"{step}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            result = STEPS[step](family, work)
        except Exception:  # whatever a family does is what the table shows
            traceback.print_exc()
            sys.stderr.flush()
            result = {"ok": False, "why": last_error(Path(log.name).read_text(errors="replace"))}
    output.write_text(json.dumps(result))


def run_family(family: str, results: Result, steps: list[str], work: Path) -> None:
    """Run what is missing. A step that fails leaves out those that need it."""
    work.mkdir(parents=True, exist_ok=True)
    for step in steps:
        if step in results:
            continue
        if any(needed in results and not results[needed]["ok"] for needed in NEEDS[step]):
            continue
        results[step] = run_step(step, family, work)
        print(f"{family} {step}: {results[step]}", file=sys.stderr, flush=True)


def in_turns(families: list[str], lock: Path | None) -> Iterator[str]:
    """The families, while this process has the lock, which it lets others have after TURN."""
    left = list(families)
    while left:
        with open(lock or os.devnull, "w") as file:
            if lock is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            until = time.monotonic() + TURN
            while left and time.monotonic() < until:
                yield left.pop(0)


def preload() -> None:
    """Import once, before any fork, what every step would import for itself."""
    import transformers  # noqa: F401

    import mcmoe_vllm.compress.pipeline
    import mcmoe_vllm.evaluate.perplexity
    import mcmoe_vllm.pruning.calibration  # noqa: F401

    os.environ.update(engine_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"))
    with suppress(ImportError):
        import vllm.entrypoints.llm  # noqa: F401


def table(found: dict[str, Result]) -> str:
    """The matrix, for people; reasons of what failed below it."""
    head = ("family", *STEPS, "control", "pruned pairs")
    rows, reasons = [head], []
    for family, results in found.items():
        cells = [cell(step, results.get(step)) for step in STEPS]
        served = results.get("serve", {})
        rows.append(
            (
                family,
                *cells,
                figure(served.get("control")),
                f"{served['pruned']:.1%}" if "pruned" in served else "-",
            )
        )
        reasons += [f"{family} {s}: {r['why']}" for s, r in results.items() if "why" in r]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    bounds = f"bounds: read {READ_ERROR:.0e}; plain, serve {MEAN_ERROR:.0e}, control above it"
    return "\n".join([*lines, "", bounds, *reasons])


def cell(step: str, result: Result | None) -> str:
    if result is None:
        return "-"
    if "why" in result:
        return "failed"
    key = {"compress": "bits", "eval": "kl", "prune": "layers"}.get(step, "error")
    value = result.get(key)
    text = "yes" if value is None else str(value) if step == "prune" else figure(value)
    return text if result["ok"] else f"{text} (!)"


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--json", type=Path, help="results, kept and completed")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "families")
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=STEPS, metavar="STEP")
    parser.add_argument("--no-serve", action="store_true", help="start no engine")
    parser.add_argument("--lock", type=Path, help="lock this file while an engine runs")
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - set(FAMILIES):
        parser.error(f"no families: {', '.join(sorted(unknown))}; known are {', '.join(FAMILIES)}")
    file = arguments.json
    found = json.loads(file.read_text()) if file and file.exists() else {}
    steps = [s for s in arguments.steps if not arguments.no_serve or s not in ENGINE_LIMITS]
    with_engine = [s for s in steps if s in ENGINE_LIMITS]
    preload()
    for part in ([s for s in steps if s not in ENGINE_LIMITS], with_engine):
        lock = arguments.lock if part is with_engine else None
        for family in in_turns(arguments.families, lock):
            run_family(family, found.setdefault(family, {}), part, arguments.work / family)
            if file:
                file.write_text(json.dumps(found, indent=2))
    print(table({name: found[name] for name in arguments.families}))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
