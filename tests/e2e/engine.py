"""Run one offline engine and exit: `python engine.py job.json`, the result goes to job["output"].

An engine wants a process of its own; the job is {"llm": arguments of vllm.LLM, "prompts": token
ids, "output": file}, the result {"logprobs": of each prompt token but the first, "tokens": 16
greedy ones for each prompt}.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    llm = LLM(**job["llm"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, prompt_logprobs=0)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    logprobs = [
        [o.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))]
        for o, ids in zip(outputs, job["prompts"], strict=True)
    ]
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    Path(job["output"]).write_text(json.dumps({"logprobs": logprobs, "tokens": tokens}))


if __name__ == "__main__":
    main()
