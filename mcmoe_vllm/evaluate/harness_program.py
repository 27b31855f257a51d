"""A process of its own: lm-evaluation-harness scores a model that vLLM runs.

The result is what the harness found, its samples left out.
"""

from __future__ import annotations

import json
from typing import Any

from mcmoe_vllm.evaluate.program import run_program
from mcmoe_vllm.evaluate.task_index import open_task_index


def score(job: dict[str, Any]) -> dict[str, Any]:
    import lm_eval

    found = lm_eval.simple_evaluate(
        model="vllm",
        model_args=job["engine"],
        tasks=job["tasks"],
        num_fewshot=job["num_fewshot"],
        limit=job["limit"],
        task_manager=open_task_index(job["tasks"], job["include_path"]),
        batch_size="auto",
        log_samples=False,
    )
    kept = {key: found[key] for key in ("results", "higher_is_better", "n-samples", "versions")}
    return dict(json.loads(json.dumps(kept, default=str)))  # numbers may be numpy's


if __name__ == "__main__":
    run_program(score)
