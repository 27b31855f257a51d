"""What the programs that run vLLM have in common; they are started by `run_engine_program`.

    python -P -m mcmoe_vllm.evaluate.vllm_program JOB RESULT PARENT

JOB and RESULT are numbers of open files, PARENT the number of the process that asked.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG = 1


def run_program(score: Callable[[dict[str, Any]], Any]) -> None:
    """Give the job to `score` and write what it makes of it, both JSON."""
    job, result, parent = map(int, sys.argv[1:])
    for file in (job, result):
        os.set_inheritable(file, False)
    end_with(parent)
    with open(job, encoding="utf-8") as f:
        given = json.load(f)
    found = json.dumps(score(given))
    with open(result, "w", encoding="utf-8") as f:
        f.write(found)


def end_with(parent: int) -> None:
    """From now on this process and all of its group are killed when its parent ends, however that
    does, and when it is asked to end itself."""
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it had ended before
        os.killpg(0, signal.SIGKILL)
