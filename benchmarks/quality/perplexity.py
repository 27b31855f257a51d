"""Perplexity and KL of a model at several widths: measured once, quantized and scored at each.

    python benchmarks/quality/perplexity.py examples/mixtral-6m --calibration A.jsonl --text B.jsonl

Appends a row per width to benchmarks/results/perplexity.jsonl and prints a table. The protocol
is that of `mcmoe eval`. Widths above the candidates are uniform 4 bits (candidates 4).
"""

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from mcmoe_vllm import __version__, allocation, evaluation, pipeline
from mcmoe_vllm.checkpoint import open_checkpoint
from mcmoe_vllm.config import Plan, write_json
from mcmoe_vllm.text import load_tokenizer, strided_windows

CANDIDATES = (1, 2, 3)
RESULTS = Path(__file__).parents[1] / "results" / "perplexity.jsonl"


def reallocate(measured: Plan, bits: float) -> Plan:
    """The plan that the same measurements give at another average width."""
    if bits in (4, *CANDIDATES):
        rows = tuple((int(bits),) * measured.num_experts for _ in measured.layers)
        return _with(measured, bits, rows, (4,) if bits == 4 else CANDIDATES)
    layers = measured.options["significance"]
    factors = allocation.Factors(
        frequency=np.array([layer["frequency"] for layer in layers]),
        routing_weight=np.array([layer["routing_weight"] for layer in layers]),
        reconstruction_error=np.array([layer["reconstruction_error"] for layer in layers]),
        candidate_bits=CANDIDATES,
        layers=measured.layers,
    )
    budget, floors = allocation.budget_for_bits(
        bits, measured.num_experts, len(layers), CANDIDATES, "layer"
    )
    chosen = allocation.allocate_bits(
        allocation.expert_costs(factors),
        CANDIDATES,
        scope="layer",
        layer_budget=budget,
        floors=floors,
    )
    return _with(measured, bits, chosen.bits, CANDIDATES)


def _with(
    plan: Plan, bits: float, rows: tuple[tuple[int, ...], ...], candidates: tuple[int, ...]
) -> Plan:
    value = {**plan.to_dict(), "bits": rows, "nominal_bits": bits, "candidate_bits": candidates}
    return Plan.from_dict(value)


def measure(arguments: argparse.Namespace, folder: Path) -> Plan:
    return pipeline.plan(
        pipeline.QuantizeOptions(
            model=arguments.model,
            output=str(folder / "plan.json"),
            bits=2.5,
            recipe="paper",
            calibration=arguments.calibration,
            seed=arguments.seed,
        )
    )


def logits_of(path: str, tokens: torch.Tensor) -> tuple[evaluation.LoadedModel, list[torch.Tensor]]:
    """A model and its final hidden states, from which logits come cheaply again and again."""
    loaded = evaluation.load_streamed(open_checkpoint(path))
    return loaded, evaluation.final_hidden(loaded, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--bits", default="4,3,2.75,2.5,2,1.75")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="recorded in the rows (default: of this checkout)")
    arguments = parser.parse_args()
    model = Path(arguments.model)
    tokenizer = load_tokenizer(model)
    length = evaluation.window_length(open_checkpoint(model), None)
    tokens = strided_windows(arguments.text, tokenizer, evaluation.WINDOWS, length)
    base, base_hidden = logits_of(arguments.model, tokens)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan = measure(arguments, folder)
        for text in arguments.bits.split(","):
            write_json(folder / "plan.json", reallocate(plan, float(text)).to_dict())
            output = folder / "checkpoint"
            result = pipeline.quantize(
                pipeline.QuantizeOptions(
                    model=arguments.model,
                    output=str(output),
                    plan=str(folder / "plan.json"),
                    calibration=arguments.calibration,
                    seed=arguments.seed,
                )
            )
            scored, hidden = logits_of(str(output), tokens)
            figures = evaluation.compare(scored, hidden, base, base_hidden, tokens)
            row = {
                "model": model.name,
                "nominal_bits": float(text),
                "true_bits": round(result["average_bits"]["experts"], 4),
                "model_bits": round(result["average_bits"]["model"], 4),
                "bytes": result["bytes"]["compressed"],
                **figures,
                "text": Path(arguments.text).name,
                "calibration": Path(arguments.calibration).name,
                "windows": len(tokens),
                "sequence_length": length,
                "seed": arguments.seed,
                "seconds": result["seconds"],
                **machine(arguments.commit),
            }
            with arguments.results.open("a") as f:
                f.write(json.dumps(row) + "\n")
            print(
                f"{model.name} {text} bits ({row['true_bits']} true): perplexity "
                f"{row['base_perplexity']:.4f} -> {row['perplexity']:.4f}, "
                f"loss +{row['loss_difference']:.4f} +- {row['paired_stderr']:.4f}, "
                f"KL {row['kl']:.4f}"
            )
            shutil.rmtree(output)


def machine(commit: str | None) -> dict[str, str]:
    """What a figure needs to be understood later."""
    commit = (
        commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    return {
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "mcmoe": __version__,
        "torch": torch.__version__,
        "commit": commit,
    }


if __name__ == "__main__":
    sys.exit(main())
