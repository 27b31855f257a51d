"""How long one layer of a large model takes to compress, and the GPU memory for it.

    python benchmarks/quality/speed.py --recipes paper best

Makes a model of one layer with random weights in the real shape, and text of random tokens, then
runs what `mcmoe plan` (errors at every candidate width) and `mcmoe quantize` run. Appends a row per
recipe to benchmarks/results/compression.jsonl: measure_seconds and quantize_seconds of that layer,
tuning_seconds of a model that has only it and a small vocabulary, tuning_again_seconds of the same
in a second run, without what libraries do once a process (a whole model takes that for each of its
layers), and compile_seconds: what a very small layer took before it, which is compiling kernels,
once a machine. Needs no solver.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from machine import machine
from quality import allocate
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.compress.pipeline import measure, quantize
from mcmoe_vllm.disk import write_json
from mcmoe_vllm.model.memory import peak_rss_bytes
from mcmoe_vllm.plan import Plan, same_group_size
from mcmoe_vllm.recipes import RECIPES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "compression.jsonl"
SHAPES = {  # experts, top_k, hidden size, intermediate size, attention heads, key-value heads
    "mixtral-8x7b": (8, 2, 4096, 14336, 32, 8),
    "qwen3-30b-a3b": (128, 8, 2048, 768, 32, 4),
    "small": (8, 2, 512, 1024, 8, 2),
}


def make_model(folder: Path, shape: str, length: int) -> None:
    """One Mixtral layer of that shape, with the example's tokenizer."""
    experts, top_k, hidden, intermediate, heads, kv_heads = SHAPES[shape]
    tokenizer = ROOT / "examples" / "mixtral-6m"
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    config = MixtralConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_local_experts=experts, num_experts_per_tok=top_k, max_position_embeddings=length,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = MixtralForCausalLM._from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def write_text(file: Path, model: Path, tokens: int) -> None:
    """Random tokens, half as many again as needed: their text is not cut into the same ones."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, len(tokenizer), (tokens * 3 // 2 // 64, 64), generator=generator)
    file.write_text("\n".join(tokenizer.batch_decode(ids)))


def prepare(folder: Path, shape: str, samples: int, length: int) -> None:
    """A model of one layer and its text, in a new folder."""
    folder.mkdir()
    make_model(folder / "model", shape, length)
    write_text(folder / "text.txt", folder / "model", samples * length)


def compress(folder: Path, name: str, bits: float, samples: int, length: int) -> dict[str, float]:
    recipe = RECIPES[name]
    options = QuantizeOptions(
        model=str(folder / "model"), output=str(folder / f"out-{name}"), bits=bits, recipe=recipe,
        calibration=str(folder / "text.txt"), samples=samples, sequence_length=length,
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    measured = measure(options)
    seconds = time.perf_counter() - began
    widths = allocate("recipe", measured, bits, recipe, 0)
    assert widths is not None
    plan = Plan(
        model=options.model, architecture="MixtralForCausalLM", layers=(0,),
        bits=widths[0], w2_bits=widths[1], candidate_bits=recipe.candidate_bits,
        group_size=same_group_size(128), dense_bits=4, nominal_bits=bits,
    )  # fmt: skip
    write_json(folder / "plan.json", plan.to_dict())
    options = replace(options, plan=str(folder / "plan.json"))
    report = quantize(options)
    tuning_seconds = tuning_again = 0.0
    if recipe.finetune_passes:
        again = quantize(replace(options, output=f"{options.output}-again"))
        tuning_seconds, tuning_again = (r["finetuning"]["seconds"] for r in (report, again))
    return {
        "measure_seconds": round(seconds, 1),
        "quantize_seconds": report["layers"][0]["seconds"],
        "quantize_all_seconds": round(report["seconds"] - tuning_seconds, 1),
        "tuning_seconds": round(tuning_seconds, 1),
        "tuning_again_seconds": round(tuning_again, 1),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--recipes", nargs="+", default=["paper", "best"], choices=RECIPES)
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="recorded in the rows (default: of this checkout)")
    arguments = parser.parse_args()
    samples, length = arguments.samples, arguments.sequence_length
    with tempfile.TemporaryDirectory() as scratch:
        first, folder = Path(scratch, "first"), Path(scratch, "measured")
        prepare(first, "small", 8, 512)
        prepare(folder, arguments.shape, samples, length)
        for name in arguments.recipes:
            small = compress(first, name, arguments.bits, 8, 512)
            compile_seconds = round(small["measure_seconds"] + small["quantize_all_seconds"], 1)
            figures = compress(folder, name, arguments.bits, samples, length)
            row = {
                "shape": arguments.shape, "recipe": name, "nominal_bits": arguments.bits,
                "tokens": samples * length, "compile_seconds": compile_seconds, **figures,
                "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                **machine(arguments.commit),
            }  # fmt: skip
            with arguments.results.open("a") as f:
                f.write(json.dumps(row) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
