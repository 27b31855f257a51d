"""Programs that run vLLM in a process of their own, which never outlives the one that asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from mcmoe_vllm.errors import UserError

TAIL_BYTES = 1 << 16  # of what an engine said last
TAIL_LINES = 15


def score_with_vllm(
    path: Path,
    tokens: torch.Tensor,
    trust_remote_code: bool,
    pruning: str | float | None = None,
) -> torch.Tensor:
    """Mean loss of each window from vLLM's prompt logprobs, float64 [S]; in a process of its own,
    which gives the engine's memory back."""
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
    return torch.tensor([float(loss) for loss in losses], dtype=torch.float64)


def run_engine_program(name: str, job: Mapping[str, Any], failure: str, **settings: str) -> Any:
    """What a module of this folder makes of `job`, both JSON. `settings` are added to its
    environment, where else what the user set stays.

    It and all that it started are gone when this returns or raises, or when this process ends,
    however that does; so are the files between them, which have no names.
    Raises UserError with `failure` and the last lines of its stderr if it gives no result.
    """
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as result,
        tempfile.TemporaryFile() as said,
    ):
        given.write(json.dumps(job).encode())
        given.seek(0)
        files = given.fileno(), result.fileno()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}.{name}", *map(str, (*files, os.getpid()))],
            # Neither the program nor what it starts imports from the working folder, which may be
            # a model's, with code that came with it.
            env={**defaults, **os.environ, **settings, "PYTHONSAFEPATH": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            pass_fds=files,
            start_new_session=True,  # the leader of a group, of which whatever it starts is a part
        )
        try:
            # The process stays a zombie, so that no other gets its number before the group ends.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        # A result that can be read is whole. What an engine's threads do after it, while the
        # process ends, is not asked: some abort.
        result.seek(0)
        try:
            return json.load(result)
        except ValueError:
            raise UserError(f"{failure}:\n{_tail(said)}") from None


def _tail(said: IO[bytes]) -> str:
    said.seek(max(0, said.seek(0, os.SEEK_END) - TAIL_BYTES))
    return "\n".join(said.read().decode(errors="replace").strip().splitlines()[-TAIL_LINES:])
