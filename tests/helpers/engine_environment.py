"""What an engine of vLLM is started with beside another on one machine."""

import os
from pathlib import Path

ENGINE = Path(__file__).parents[1] / "e2e" / "engine.py"


def engine_environment(**settings: str) -> dict[str, str]:
    values = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:  # a core for each: threads that spin would starve the other's engine
        cores = os.cpu_count() or 1
        values["VLLM_CPU_OMP_THREADS_BIND"] = str(int(worker.removeprefix("gw")) % cores)
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**inherited, **values, **settings}
