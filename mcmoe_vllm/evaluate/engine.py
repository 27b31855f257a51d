"""Programs that run vLLM in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mcmoe_vllm.errors import UserError

_VLLM_PROGRAM = """
import json, os, sys
job = json.load(open(sys.argv[1]))
from vllm import LLM, SamplingParams
llm = LLM(model=job["model"], max_model_len=job["length"] + 1, enforce_eager=True,
          trust_remote_code=job["trust_remote_code"], enable_prefix_caching=False,
          dtype="auto", additional_config=job["additional_config"])
params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
outputs = llm.generate([{"prompt_token_ids": w} for w in job["windows"]], params)
losses = []
for window, output in zip(job["windows"], outputs):
    rows = output.prompt_logprobs[1:]
    losses.append(-sum(r[t].logprob for r, t in zip(rows, window[1:])) / len(rows))
with open(sys.argv[2] + ".part", "w") as f:
    json.dump(losses, f)
os.rename(sys.argv[2] + ".part", sys.argv[2])
"""


def score_with_vllm(
    path: Path,
    tokens: torch.Tensor,
    trust_remote_code: bool,
    pruning: str | float | None = None,
) -> torch.Tensor:
    """Mean loss of each window from vLLM's prompt logprobs; in a process of its own, which gives
    the engine's memory back."""
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise UserError('vLLM is not installed; pip install "mcmoe-vllm[vllm]"')
    job = {
        "model": str(path),
        "length": tokens.shape[1],
        "windows": tokens.tolist(),
        "trust_remote_code": trust_remote_code,
        "additional_config": {} if pruning is None else {"mcmoe": {"pruning": pruning}},
    }
    losses = run_engine_program(
        _VLLM_PROGRAM,
        job,
        f"vLLM could not score {path}",
        # The engine insists on generating a token after a full window; nothing is computed at its
        # position, so the model's maximum still holds.
        VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",
    )
    return torch.tensor(losses, dtype=torch.float64)


def run_engine_program(program: str, job: Mapping[str, Any], failure: str, **settings: str) -> Any:
    """What a Python program writes as JSON. It is given two files, of `job` and for its result,
    and `settings` in its environment, where else what the user set stays.

    Raises UserError with `failure` and the last lines of its stderr if it writes no result.
    """
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "job.json"), Path(folder, "result.json")
        given.write_text(json.dumps(job))
        process = subprocess.run(
            [sys.executable, "-c", program, str(given), str(result)],
            env={**defaults, **os.environ, **settings},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # The result is renamed into place when it is whole. What an engine's threads do after
        # that, while the process ends, is not asked: some abort.
        if not result.exists():
            tail = "\n".join(process.stderr.strip().splitlines()[-15:])
            raise UserError(f"{failure}:\n{tail}")
        return json.loads(result.read_text())
