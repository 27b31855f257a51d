"""A process of its own: vLLM scores windows of tokens.

The result is the mean loss of each window, as text: it may be "nan".
"""

from __future__ import annotations

from typing import Any

from mcmoe_vllm.evaluate.program import run_program


def score(job: dict[str, Any]) -> list[str]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job["model"],
        max_model_len=job["length"] + 1,
        enforce_eager=True,
        trust_remote_code=job["trust_remote_code"],
        enable_prefix_caching=False,
        dtype="auto",
        additional_config=job["additional_config"],
    )
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": w} for w in job["windows"]], params)
    losses = []
    for window, output in zip(job["windows"], outputs, strict=True):
        rows = output.prompt_logprobs[1:]
        logprobs = [row[token].logprob for row, token in zip(rows, window[1:], strict=True)]
        losses.append(str(-sum(logprobs) / len(logprobs)))
    return losses


if __name__ == "__main__":
    run_program(score)
