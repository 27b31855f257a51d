"""Run offline engines one after another: `python engine.py`, a line of stdin names each job's file.

Importing vLLM takes most of an engine's start, so those that agree on the environment share a
process. The job is {"llm": arguments of vllm.LLM, "prompts": token ids, "max_tokens": greedy ones
for each prompt, "then_alone": whether to ask each prompt again by itself, "log": the file for what
is printed, "output": file}, and may have "lora", an adapter's folder, and "calls", [method of
vLLM's workers, keyword arguments] that are made one after another.

The result has "logprobs" of each prompt token but the first (none with "then_alone"), "tokens" and
"output_logprobs" of what followed, "alone", tokens again, "metrics", as a server would show them,
and "calls": of each its refusal, or null, and the prompts' log-probabilities after it.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def main() -> None:
    for line in sys.stdin:
        job = json.loads(Path(line.strip()).read_text())
        with open(job["log"], "wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        result = run(job)
        gc.collect()  # the engine and its weights
        part = Path(job["output"] + ".part")
        part.write_text(json.dumps(result))
        part.rename(job["output"])


def run(job: dict) -> dict:
    from vllm import LLM, SamplingParams

    llm = LLM(**job["llm"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    greedy = {"temperature": 0, "max_tokens": job["max_tokens"], "ignore_eos": True, "logprobs": 0}
    # Scoring a prompt reads nothing from the prefix cache.
    scored = SamplingParams(**greedy, prompt_logprobs=None if job["then_alone"] else 0)
    outputs = llm.generate(prompts, scored, use_tqdm=False, lora_request=adapter(job))
    result = {
        "logprobs": logprobs_of(outputs, job["prompts"]),
        "tokens": tokens_of(outputs),
        "output_logprobs": [
            [row[t].logprob for row, t in zip(o.outputs[0].logprobs, tokens, strict=True)]
            for o, tokens in zip(outputs, tokens_of(outputs), strict=True)
        ],
    }
    if job["then_alone"]:
        plain = SamplingParams(**greedy)
        alone = [llm.generate(p, plain, use_tqdm=False)[0] for p in prompts]
        result["alone"] = tokens_of(alone)
        result["metrics"] = metrics()
    result["calls"] = []
    for method, arguments in job.get("calls", ()):
        refusal = refused(lambda: llm.collective_rpc(method, kwargs=arguments))  # noqa: B023
        after = logprobs_of(llm.generate(prompts, scored, use_tqdm=False), job["prompts"])
        result["calls"].append({"refusal": refusal, "logprobs": after})
    llm.llm_engine.engine_core.shutdown()  # until then nothing of it is collected
    return result


def adapter(job: dict) -> object:
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, job["lora"]) if job.get("lora") else None


def refused(call: Callable[[], object]) -> str | None:
    try:
        call()
    except Exception as e:
        return str(e)
    return None


def logprobs_of(outputs: list, prompts: list[list[int]]) -> list[list[float]]:
    return [
        [o.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))]
        for o, ids in zip(outputs, prompts, strict=True)
        if o.prompt_logprobs
    ]


def tokens_of(outputs: list) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in outputs]


def metrics() -> dict[str, float]:
    """Of all engines of this process that count: `disable_log_stats` is False for those."""
    from prometheus_client import REGISTRY

    from mcmoe_vllm.plugin.metrics import PUBLISH_SECONDS

    time.sleep(2 * PUBLISH_SECONDS)  # a worker's counts are shown at most so long after
    return {
        f"{sample.name} {sample.labels.get('layer', '')}".strip(): sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
    }


if __name__ == "__main__":
    main()
