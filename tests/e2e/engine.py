"""Run one offline engine and exit: `python engine.py job.json`, the result goes to job["output"].

An engine wants a process of its own; the job is {"llm": arguments of vllm.LLM, "prompts": token
ids, "max_tokens": greedy ones for each prompt, "then_alone": whether to ask each prompt again by
itself, "output": file}. The result has "logprobs" of each prompt token but the first (none with
"then_alone"), "tokens" and "output_logprobs" of what followed, "alone", tokens again, and
"metrics", as a server would show them.
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    llm = LLM(**job["llm"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    greedy = {"temperature": 0, "max_tokens": job["max_tokens"], "ignore_eos": True, "logprobs": 0}
    # Scoring a prompt reads nothing from the prefix cache.
    scored = SamplingParams(**greedy, prompt_logprobs=None if job["then_alone"] else 0)
    outputs = llm.generate(prompts, scored, use_tqdm=False)
    result = {
        "logprobs": [
            [o.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))]
            for o, ids in zip(outputs, job["prompts"], strict=True)
            if o.prompt_logprobs
        ],
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
        time.sleep(1)  # until the plugin has published its counts
        result["metrics"] = metrics()
    Path(job["output"]).write_text(json.dumps(result))


def tokens_of(outputs: list) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in outputs]


def metrics() -> dict[str, float]:
    from prometheus_client import REGISTRY

    return {
        f"{sample.name} {sample.labels.get('layer', '')}".strip(): sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
    }


if __name__ == "__main__":
    main()
