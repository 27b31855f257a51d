#!/usr/bin/env python3
"""Speed of a large model's shape in vLLM's engine: `python engine.py`. Needs a GPU, no weights.

Dummy weights; routes are drawn uniformly at random (vLLM's routing simulation), because dummy
routers would send every token the same way. One process a method makes all its measurements:

    memory        weights, as vLLM logs them
    decode        one request, time of an output token
    throughput    requests of 512 tokens in, 128 out, all at once
    prefill       one request of 4096 tokens, time to its first token

Rows go to benchmarks/results/serving.jsonl. `gpu_ms` is how long the GPU is busy for an output
token of one request: well below the wall clock's `tpot_ms`, the host is what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench import EXAMPLE, RESULTS, environment, say, surroundings

HIDDEN_LAYERS, EXPERTS, TOP_K = 32, 8, 2
MIXTRAL = {  # https://huggingface.co/mistralai/Mixtral-8x7B-v0.1, config.json
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "dtype": "bfloat16",
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_hidden_layers": HIDDEN_LAYERS, "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K, "max_position_embeddings": 32768, "vocab_size": 32000,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "sliding_window": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDTHS = "33323123"  # 2.5 bits on average
PROMPT, OUTPUT, LONG_PROMPT = 512, 128, 4096
CONCURRENCY = (64, 256)
GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def quantization(method: str) -> dict[str, Any]:
    """The checkpoint's `quantization_config`; attention is int4 in both."""
    if method == "gptq-marlin":
        # Without a list vLLM takes what the safetensors say, and here are none.
        modules = [f"self_attn.{name}_proj" for name in "qkvo"]
        return {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False,
                "sym": True, "lm_head": False,
                "modules_in_block_to_quantize": [*modules, "experts"]}  # fmt: skip
    layers = {layer: WIDTHS[layer % EXPERTS :] + WIDTHS[: layer % EXPERTS]
              for layer in range(HIDDEN_LAYERS)}  # fmt: skip
    return {
        "quant_method": "mcmoe",
        "format_version": 2,
        "group_size": {"w13": 128, "w2": 128, "dense": 128},
        "expert_bits": {str(layer): [widths, widths] for layer, widths in layers.items()},
        "dense_bits": 4,
        "dense_modules": ["self_attn"],
    }


MARK = "measured: "
METHODS = {"mcmoe": 2.625, "gptq-marlin": 4.125}  # bits of an expert's weight, scales included


def main() -> int:
    arguments = parse_arguments()
    if arguments.child:
        measure(arguments)
        return 0
    status = 0
    for method in arguments.methods:
        with tempfile.TemporaryDirectory() as folder:
            model = write_model(Path(folder) / f"mixtral-8x7b-{method}", method)
            say(f"measuring {method}")
            command = [sys.executable, __file__, "--child", str(model), "--methods", method,
                       "--commit", arguments.commit, "--output", str(arguments.output)]  # fmt: skip
            child = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**environment(), "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "uniform_random"},
            )  # fmt: skip
            if child.returncode:
                say(f"{method} failed:\n{child.stdout[-4000:]}")
                status = 1
                continue
            memory = re.findall(r"Model loading took ([\d.]+) GiB", child.stdout)
            measured = next(line for line in child.stdout.splitlines() if line.startswith(MARK))
            row = {**json.loads(measured.removeprefix(MARK)), "weights_gib": float(memory[-1])}
            with arguments.output.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            say(json.dumps({k: v for k, v in row.items() if isinstance(v, float | dict)}))
    return status


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--commit", default="", help="recorded if the checkout has no git folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_model(folder: Path, method: str) -> Path:
    folder.mkdir(parents=True)
    config = {**MIXTRAL, "quantization_config": quantization(method)}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    return folder


def measure(arguments: argparse.Namespace) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the profiler sees the kernels
    from vllm import LLM

    method = arguments.methods[0]
    begin = time.perf_counter()
    engine = LLM(
        str(arguments.child), load_format="dummy", dtype="bfloat16", max_model_len=8192,
        max_num_seqs=max(CONCURRENCY), max_num_batched_tokens=8192, gpu_memory_utilization=0.92,
        enable_prefix_caching=False, compilation_config={"cudagraph_capture_sizes": list(GRAPHS)},
    )  # fmt: skip
    started = time.perf_counter() - begin
    run(engine, 2, PROMPT, 8)
    first = median(lambda: run(engine, 1, PROMPT, 1), 5)
    whole = median(lambda: run(engine, 1, PROMPT, OUTPUT + 1), 3)
    run(engine, 1, LONG_PROMPT, 1)
    busy, kernels = decoding_on_the_gpu(engine)
    row: dict[str, Any] = {
        "model": "mixtral-8x7b (shape, dummy weights)",
        "method": method,
        "bits": METHODS[method],
        "dtype": "bfloat16",
        "routing": "uniform_random",
        "disabled_kernels": os.environ.get("VLLM_DISABLED_KERNELS", ""),
        "start_seconds": started,
        "tpot_ms": (whole - first) / OUTPUT * 1e3,
        "gpu_ms": busy,
        "kernels_ms": kernels,
        "ttft_4096_ms": median(lambda: run(engine, 1, LONG_PROMPT, 1), 5) * 1e3,
        "output_tokens_per_second": {},
        "distinct_experts_per_step": {1: float(TOP_K)},
        "input_len": PROMPT,
        "output_len": OUTPUT,
    }
    for requests in CONCURRENCY:
        run(engine, requests, PROMPT, 4)
        seconds = median(lambda n=requests: run(engine, n, PROMPT, OUTPUT), 3)
        row["output_tokens_per_second"][requests] = requests * OUTPUT / seconds
        row["distinct_experts_per_step"][requests] = EXPERTS * (
            1 - (1 - TOP_K / EXPERTS) ** requests
        )
    row |= surroundings()
    row["commit"] = arguments.commit or row["commit"]
    print("\n" + MARK + json.dumps(row), flush=True)


def run(engine: Any, requests: int, prompt: int, output: int) -> float:
    """Seconds that requests of random tokens take, all at once."""
    from vllm import SamplingParams, TokensPrompt

    tokens = [[(7 * i + 13 * r) % 8000 + 3 for i in range(prompt)] for r in range(requests)]
    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    done = engine.generate([TokensPrompt(prompt_token_ids=t) for t in tokens], sampling,
                           use_tqdm=False)  # fmt: skip
    seconds = time.perf_counter() - begin
    assert all(len(request.outputs[0].token_ids) == output for request in done)
    return seconds


def median(call: Any, repeats: int) -> float:
    return statistics.median(call() for _ in range(repeats))


def decoding_on_the_gpu(engine: Any) -> tuple[float, dict[str, float]]:
    """Milliseconds that the GPU is busy for an output token of one request, and those of the
    kernels that take most of it."""
    (whole, kernels), (prefill, others) = (profile(engine, n) for n in (OUTPUT + 1, 1))
    kernels.subtract(others)
    return (whole - prefill) / OUTPUT, {k: v / OUTPUT for k, v in kernels.most_common(12)}


def profile(engine: Any, output: int) -> tuple[float, Counter]:
    """Milliseconds in which a kernel runs while a request is served, and each kernel's own."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        run(engine, 1, PROMPT, output)
    events = sorted(
        (e.time_range.start / 1e3, e.time_range.end / 1e3, e.name[:80])
        for e in recorded.events()
        if e.device_type == DeviceType.CUDA
    )
    busy, last, kernels = 0.0, 0.0, Counter()
    for start, end, name in events:  # a kernel may start before the one before it ends
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
        kernels[name] += end - start
    return busy, kernels


if __name__ == "__main__":
    sys.exit(main())
