"""A process of its own: lm-evaluation-harness scores a model that vLLM runs.

    python -P -m mcmoe_vllm.evaluate.harness_program JOB.json RESULT.json

The result is what the harness found, its samples left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mcmoe_vllm.disk import write_json


def score(job: dict[str, Any]) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="vllm",
        model_args=job["engine"],
        tasks=job["tasks"],
        num_fewshot=job["num_fewshot"],
        limit=job["limit"],
        task_manager=TaskManager(include_path=job["include_path"]),
        batch_size="auto",
        log_samples=False,
    )
    kept = {key: found[key] for key in ("results", "higher_is_better", "n-samples", "versions")}
    return dict(json.loads(json.dumps(kept, default=str)))  # numbers may be numpy's


if __name__ == "__main__":
    write_json(sys.argv[2], score(json.loads(Path(sys.argv[1]).read_text())))
