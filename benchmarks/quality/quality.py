"""Accuracy per true bit: recipes and allocations of one model, by the protocol of `mcmoe eval`.

    python benchmarks/quality/quality.py MODEL --calibration A.jsonl --text B.jsonl \
        --recipes paper best --bits 1.5 2 2.5 2.75 --seeds 0 1 2

Appends a row per point to benchmarks/results/quality.jsonl (the 16-bit model with nominal_bits 16)
and prints it. A point whose row is in the file already is not measured again.

Every layer is calibrated on what the quantized layers before it put out, as `mcmoe quantize` does:
one compression a point. With --compose, calibration is on the 16-bit model instead: the model is
compressed once at every width without finetuning, kept in --cache, and points are put together from
these.

--methods are ways to choose the widths for one budget:

    recipe     what the recipe does
    pmq        the paper's integer program with the recipe's errors
    uniform    one width for all, where the budget is one
    random     any widths of that sum in every layer, a draw a row (5 draws)
    frequency  by how often an expert is used
    weight     by the routing weight it is given
    hessian    by the trace of its Hessians times the squared change of its weights

The last three, as `pmq`, minimise a sum of costs within a layer's budget; frequency and weight
multiply 4^-bits, what a uniform quantizer loses.

No solver needs to be installed. --set changes traits of the recipes, for ablations:
--set refinements=0 keep_rounding=False.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from mcmoe_vllm.allocate.knapsack import choose
from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.checkpoint.format import FORMAT_VERSION
from mcmoe_vllm.compress.choose import allocate_sensitivity
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.compress.pipeline import measure, quantize
from mcmoe_vllm.compress.significance import LayerSignificance
from mcmoe_vllm.disk import read_json, write_json
from mcmoe_vllm.evaluate.perplexity import WINDOWS, compare
from mcmoe_vllm.model.experts import Expert
from mcmoe_vllm.model.moe_model import MoeModel, open_model
from mcmoe_vllm.model.runner import final_hidden
from mcmoe_vllm.model.text import load_tokenizer, strided_windows, window_length
from mcmoe_vllm.plan import Plan, same_group_size
from mcmoe_vllm.recipes import RECIPES, Recipe

RESULTS = Path(__file__).parents[1] / "results" / "quality.jsonl"
CANDIDATES = (1, 2, 3)
METHODS = ("recipe", "pmq", "uniform", "random", "frequency", "weight", "hessian")
DRAWS = 5
GROUP_SIZE = same_group_size(128)
KEYS = ("model", "method", "recipe", "changes", "nominal_bits", "seed", "draw", "sequential",
        "text", "windows", "calibration", "samples")  # fmt: skip

Bits = tuple[tuple[int, ...], ...]
Widths = tuple[Bits, Bits]  # of w13 and of w2, a row for every layer


@dataclass(frozen=True)
class Bench:
    """One model and text; base_hidden: the 16-bit model's `final_hidden` of `tokens` [S, L]."""

    arguments: argparse.Namespace
    model: Path
    tokens: torch.Tensor
    base: MoeModel
    base_hidden: list[torch.Tensor]

    def options(self, output: Path, recipe: Recipe, seed: int, **more: Any):  # type: ignore[no-untyped-def]
        given = self.arguments
        return QuantizeOptions(
            model=str(self.model),
            output=str(output),
            recipe=recipe,
            calibration=given.calibration,
            samples=given.samples,
            seed=seed,
            device=given.device,
            **more,
        )

    def folder(self, recipe: Recipe, seed: int) -> Path:
        """Where what depends on model, calibration, recipe and seed alone is kept."""
        given = self.arguments
        key = [recipe.to_dict(), given.calibration, given.samples, self.base.model.device.type]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        folder = given.cache / f"{self.model.name}-{recipe.name}-{seed}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        return Path(folder)

    def measured(self, recipe: Recipe, seed: int) -> list[LayerSignificance]:
        file = self.folder(recipe, seed) / "significance.json"
        if not file.exists():
            found = measure(self.options(file, recipe, seed))
            write_json(file, [asdict(layer) for layer in found])
        return [LayerSignificance(**layer) for layer in read_json(file)]

    def plan(self, bits: Widths, nominal: float) -> Plan:
        return Plan(
            model=str(self.model),
            architecture=self.base.model.name,
            layers=tuple(self.base.model.moe_layers),
            bits=bits[0],
            w2_bits=bits[1],
            candidate_bits=(1, 2, 3, 4),
            group_size=GROUP_SIZE,
            dense_bits=4,
            nominal_bits=nominal,
        )

    def compress(self, folder: Path, plan: Plan, recipe: Recipe, seed: int) -> Path:
        """A checkpoint of the plan at folder/out, made unless it is there."""
        output = folder / "out"
        if not output.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "plan.json", plan.to_dict())
            plan_file = str(folder / "plan.json")
            begun = (folder / "out.work").exists()
            options = self.options(output, recipe, seed, plan=plan_file, resume=begun)
            quantize(options)
        return output

    def compressed(
        self, bits: Widths, nominal: float, recipe: Recipe, seed: int, scratch: Path
    ) -> tuple[MoeModel, float]:
        """A model with these widths, and its true bits per expert weight."""
        plan = self.plan(bits, nominal)
        if not self.arguments.compose:
            return self.load(self.compress(scratch / "point", plan, recipe, seed))
        parts, true = {}, {}
        for width in sorted({b for rows in bits for row in rows for b in row}):
            same = tuple((width,) * len(row) for row in bits[0])
            folder = self.folder(recipe, seed) / f"{width}-bit"
            output = self.compress(folder, self.plan((same, same), width), recipe, seed)
            parts[width], true[width] = self.load(output)
        used = [true[b] for row in plan.pairs() for w13, w2 in row for b in (w13, w13, w2)]
        return compose(plan, parts), float(np.mean(used))

    def load(self, output: Path) -> tuple[MoeModel, float]:
        loaded = open_model(open_checkpoint(output), self.arguments.device)
        return loaded, float(read_json(output / "report.json")["average_bits"]["experts"])


def compose(plan: Plan, parts: dict[int, MoeModel]) -> MoeModel:
    """A model whose experts come from one compressed model for each width."""
    widths = dict(zip(plan.layers, plan.pairs(), strict=True))

    class Composed:
        """Expert by expert, w13 of one model and w2 of another."""

        def read(self, layer: int, expert: int) -> Expert:
            found = [parts[width].experts.read(layer, expert) for width in widths[layer][expert]]
            assert found[0] is not None and found[1] is not None
            return Expert(found[0].w13, found[1].w2)

    return next(iter(parts.values())).with_experts(Composed())


def allocate(
    method: str, layers: Sequence[LayerSignificance], bits: float, recipe: Recipe, draw: int
) -> Widths | None:
    """Widths of every expert for an average of codes; None where the method has none."""
    num_experts = len(layers[0].tokens)
    budget = round(bits * num_experts)
    if method == "recipe" and recipe.allocation == "sensitivity":
        w13, w2, _ = allocate_sensitivity(layers, recipe.candidate_bits, bits, GROUP_SIZE, recipe)
        return w13, w2
    if method == "uniform":
        width, rest = divmod(budget, num_experts)
        rows = None if rest else tuple((width,) * num_experts for _ in layers)
    elif method == "random":
        rng = np.random.default_rng(draw)
        rows = tuple(random_widths(rng, num_experts, budget) for _ in layers)
    else:
        floors = [CANDIDATES.index(3), CANDIDATES.index(2)]
        rows = tuple(
            tuple(CANDIDATES[c] for c in choose(costs, CANDIDATES, budget, floors))
            for costs in (layer_costs(method, layer, recipe) for layer in layers)
        )
    return None if rows is None else (rows, rows)


def layer_costs(method: str, layer: LayerSignificance, recipe: Recipe) -> np.ndarray:
    """[E, B]."""
    frequency, weight = np.array(layer.frequency), np.array(layer.routing_weight)
    ideal = 4.0 ** -np.array(CANDIDATES)
    if method == "frequency":
        return frequency[:, None] * ideal
    if method == "weight":
        return weight[:, None] * ideal
    if method == "hessian":
        return np.array(layer.trace_error)[:, : len(CANDIDATES)]
    importance = frequency**recipe.alpha * weight**recipe.beta
    errors = np.array(layer.reconstruction_error)[:, : len(CANDIDATES)]
    return importance[:, None] * errors**recipe.gamma


def random_widths(rng: np.random.Generator, num_experts: int, budget: int) -> tuple[int, ...]:
    """Widths with exactly that sum: bits are handed out one by one to who can still take one."""
    widths = np.full(num_experts, min(CANDIDATES))
    for _ in range(budget - int(widths.sum())):
        widths[rng.choice(np.flatnonzero(widths < max(CANDIDATES)))] += 1
    return tuple(int(w) for w in widths)


def evaluate_point(
    bench: Bench, row: dict[str, Any], recipe: Recipe, scratch: Path
) -> dict[str, Any] | None:
    layers = bench.measured(recipe, row["seed"])
    bits = allocate(row["method"], layers, row["nominal_bits"], recipe, row["draw"])
    if bits is None:
        return None
    began = time.perf_counter()
    loaded, true_bits = bench.compressed(bits, row["nominal_bits"], recipe, row["seed"], scratch)
    seconds = time.perf_counter() - began
    hidden = final_hidden(loaded, bench.tokens)
    figures = compare(loaded, hidden, bench.base, bench.base_hidden, bench.tokens)
    widths = [["".join(map(str, row)) for row in rows] for rows in bits]
    return {"true_bits": true_bits, **figures, "bits": widths, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--recipes", nargs="+", default=["paper", "best"], choices=RECIPES)
    parser.add_argument("--methods", nargs="+", default=["recipe"], choices=METHODS)
    parser.add_argument("--bits", nargs="+", type=float, default=[1.5, 2, 2.5, 2.75])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", nargs="+", default=[], metavar="TRAIT=VALUE")
    parser.add_argument("--compose", action="store_true")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "mcmoe-quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="recorded in the rows (default: of this checkout)")
    arguments = parser.parse_args()

    base = open_model(open_checkpoint(arguments.model), arguments.device)
    length = window_length(base.config, None)
    tokenizer = load_tokenizer(arguments.model)
    tokens = strided_windows(arguments.text, tokenizer, arguments.windows, length)
    hidden = final_hidden(base, tokens)
    bench = Bench(arguments, arguments.model, tokens, base, hidden)
    run = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    known = {tuple(row.get(key) for key in KEYS) for row in map(json.loads, lines)}

    def record(row: dict[str, Any]) -> None:
        row |= {"run": run, **machine(arguments.commit)}
        with arguments.results.open("a") as f:
            f.write(json.dumps(row) + "\n")
        print(
            f"{row['model']} {row['recipe']} {row['method']} {' '.join(arguments.set)} seed "
            f"{row['seed']}: {row['nominal_bits']} bits ({row['true_bits']:.3f} true), perplexity "
            f"{row['perplexity']:.4f}, loss {row['loss_difference']:+.4f} +- "
            f"{row['paired_stderr']:.4f}, KL {row['kl']:.4f}",
            flush=True,
        )

    common = {
        "model": arguments.model.name, "text": Path(arguments.text).name, "windows": len(tokens),
        "sequence_length": length, "calibration": Path(arguments.calibration).name,
        "samples": arguments.samples, "format_version": FORMAT_VERSION,
    }  # fmt: skip
    plain = common | {"method": "none", "recipe": "none", "changes": "", "nominal_bits": 16.0,
                      "seed": 0, "draw": 0, "sequential": False}  # fmt: skip
    if tuple(plain.get(key) for key in KEYS) not in known:
        figures = compare(base, hidden, base, hidden, tokens)
        record(plain | {"true_bits": 16.0} | figures)
    changes = {name: literal(value) for name, value in (s.split("=", 1) for s in arguments.set)}
    for name in arguments.recipes:
        recipe = replace(RECIPES[name], **changes)
        if arguments.compose:
            recipe = replace(recipe, sequential=False, finetune_passes=0)
        points = [
            (method, bits, seed, draw)
            for seed in arguments.seeds
            for bits in arguments.bits
            for method in arguments.methods
            for draw in range(DRAWS if method == "random" else 1)
        ]
        for method, bits, seed, draw in points:
            row = common | {"method": method, "recipe": name, "changes": " ".join(arguments.set),
                            "nominal_bits": bits, "seed": seed, "draw": draw,
                            "sequential": recipe.sequential}  # fmt: skip
            if tuple(row[key] for key in KEYS) in known:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                found = evaluate_point(bench, row, recipe, Path(scratch))
            if found is not None:
                record(row | found)


def literal(text: str) -> Any:
    """A trait's value as it is written in Python, or as a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    main()
