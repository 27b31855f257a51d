"""Damaged folders before a real engine, by vLLM's default loader and by `--load-format mcmoe`.

    PYTHONPATH=.:kernels python -m tests.fuzz.engines --json FILE

An engine must refuse a folder, or serve it with the numbers of the sound one. Each lives in a child
forked from a process that has imported vLLM. `--only NAME` tries some of `damages.DAMAGES`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.damages import DAMAGES, FLIPPED, PRUNED, SOUND, damaged, make_folder

LOADERS = ("auto", "mcmoe")
PROMPT = list(range(20, 68))
SECONDS = 180
NEAR = 1e-5  # of a log-probability in float32, whose sums may be added up in another order
REFUSED, ERROR, SAME, OTHER = "refused", "error of vLLM", "sound numbers", "other numbers"
CRASHED, HANGS = "crashed", "hangs"
HARMLESS = (REFUSED, ERROR, SAME)
# Where something else is right. A bit that leaves a number a number is told by its hash alone,
# which vLLM's own loader does not read.
EXPECTED = {
    **{(SOUND, loader): (SAME,) for loader in LOADERS},
    **{(PRUNED, loader): (OTHER,) for loader in LOADERS},
    (FLIPPED, "auto"): (*HARMLESS, OTHER),
}


def score(folder: Path, loader: str) -> list[float]:
    """Log-probabilities of a prompt's tokens but the first."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder), load_format=loader, enforce_eager=True, max_model_len=128,
        max_num_seqs=4, dtype="float32", enable_prefix_caching=False, skip_tokenizer_init=True,
        num_gpu_blocks_override=8, disable_log_stats=True,
    )  # fmt: skip
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    (found,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    rows = zip(found.prompt_logprobs[1:], PROMPT[1:], strict=True)
    return [row[token].logprob for row, token in rows]


def run_engine(folder: Path, loader: str, scratch: Path) -> dict[str, Any]:
    """In a child: {"logprobs": ...}, or a "verdict" and what was "said" last."""
    result, log = scratch / "result.json", scratch / "log.txt"
    result.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _be_engine(folder, loader, result, log)
    deadline = time.monotonic() + SECONDS
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"verdict": HANGS, "said": log.read_text(errors="replace")[-300:]}
        time.sleep(0.05)
    if not result.exists():
        return {"verdict": CRASHED, "said": log.read_text(errors="replace")[-300:]}
    return dict(json.loads(result.read_text()))


def _be_engine(folder: Path, loader: str, result: Path, log: Path) -> None:
    try:
        os.setsid()
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        try:
            found: dict[str, Any] = {"logprobs": score(folder, loader)}
        except BaseException as e:
            found = refusal(e)
        part = result.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.rename(result)
    finally:
        os._exit(0)


def refusal(error: BaseException) -> dict[str, Any]:
    """Whether this project refused, in a sentence, and what was said."""
    chain: list[BaseException] = []
    while error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__ or error
    own = [e for e in chain if type(e).__name__ == "UserError"]
    # vLLM's checks of config.json turn what is raised there into an error of theirs.
    quoted = [e for e in chain if "UserError" in str(e)]
    said = (own or quoted or chain)[0]
    return {
        "verdict": REFUSED if own or quoted else ERROR,
        "said": f"{type(said).__name__}: {said}"[:300],
    }


def judge(found: dict[str, Any], sound: Sequence[float]) -> dict[str, Any]:
    """The outcome, by how far served numbers are from the sound ones."""
    if "logprobs" not in found:
        return found
    pairs = zip(found["logprobs"], sound, strict=True)
    # A difference that is NaN is not near.
    far = max(pairs, key=lambda pair: abs(pair[0] - pair[1]) if pair[0] == pair[0] else 1e9)
    same = abs(far[0] - far[1]) <= NEAR
    return {"verdict": SAME if same else OTHER, "said": f"{far[1]:.6f} became {far[0]:.6f}"}


def is_fault(name: str, loader: str, verdict: str) -> bool:
    return verdict not in EXPECTED.get((name, loader), HARMLESS)


def try_all(
    names: Sequence[str], loaders: Sequence[str], scratch: Path, most_seconds: float
) -> list[dict[str, Any]]:
    """Every damage by every loader, none begun after so many seconds. Raises RuntimeError if the
    sound folder is not served."""
    started = time.monotonic()
    folder = make_folder(scratch / "sound")
    sound = run_engine(folder, "auto", scratch)
    if "logprobs" not in sound:
        raise RuntimeError(f"the sound folder is not served: {sound}")
    results = []
    for name, loader in itertools.product(names, loaders):
        began = time.monotonic()
        if began - started > most_seconds:
            break
        found = run_engine(damaged(folder, scratch / "damaged", name), loader, scratch)
        outcome = judge(found, sound["logprobs"])
        seconds = round(time.monotonic() - began, 1)
        results.append({"damage": name, "loader": loader, **outcome, "seconds": seconds})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=DAMAGES, default=list(DAMAGES))
    parser.add_argument("--loaders", nargs="*", choices=LOADERS, default=LOADERS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after that")
    parser.add_argument("--json", metavar="FILE")
    asked = parser.parse_args()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.pop("TRITON_INTERPRET", None)  # set by what tests share
    import torch
    import vllm.v1.engine.llm_engine  # noqa: F401

    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        results = try_all(asked.only, asked.loaders, Path(scratch), asked.seconds)
    faults = [r for r in results if is_fault(r["damage"], r["loader"], r["verdict"])]
    counts = Counter(f"{r['loader']}: {r['verdict']}" for r in results)
    result = {
        "engines": len(results),
        "seconds": round(time.monotonic() - started),
        "counts": dict(counts),
        "faults": faults,
    }
    if asked.json:
        Path(asked.json).write_text(json.dumps({**result, "results": results}, indent=1))
    print(json.dumps(result, indent=1))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
