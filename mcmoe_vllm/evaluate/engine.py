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
        "vllm_program",
        job,
        f"vLLM could not score {path}",
        # The engine insists on generating a token after a full window; nothing is computed at its
        # position, so the model's maximum still holds.
        VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",
    )
    return torch.tensor(losses, dtype=torch.float64)


def run_engine_program(name: str, job: Mapping[str, Any], failure: str, **settings: str) -> Any:
    """What a module of this folder writes as JSON. It is given two files, of `job` and for its
    result, and `settings` in its environment, where else what the user set stays.

    Raises UserError with `failure` and the last lines of its stderr if it writes no result.
    """
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "job.json"), Path(folder, "result.json")
        given.write_text(json.dumps(job))
        process = subprocess.run(
            [sys.executable, "-P", "-m", f"{__package__}.{name}", str(given), str(result)],
            # Neither the program nor what it starts imports from the working folder, which may be
            # a model's, with code that came with it.
            env={**defaults, **os.environ, **settings, "PYTHONSAFEPATH": "1"},
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
