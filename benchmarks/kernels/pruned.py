#!/usr/bin/env python3
"""What online pruning saves: MoE layers with and without it, on a real model's routing.

    python pruned.py capture MODEL --calibration A.jsonl --text B.jsonl -o routes.safetensors
    python pruned.py time routes.safetensors

`capture` calibrates the rule on one text and notes how MODEL routes the other; it needs mcmoe-vllm
and no GPU. `time` needs a GPU and no model: tokens of different positions, batched as decoding
batches them, are routed through experts of a large model's shape, unpruned and pruned in turn. One
CUDA graph holds as many layers as MODEL has, each with weights and widths of its own, as a
decoding step does; times are those of a layer.

Appends a row a measurement to benchmarks/results/pruned_kernels.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bench import ROOT, about
from layers import SHAPES, Route, random_layer
from safetensors import safe_open
from safetensors.torch import save_file
from timing import time_call
from torch.nn.functional import pad

from mcmoe_kernels.gpu.experts import fused_experts
from mcmoe_kernels.gpu.pruning import prune_ids

TOKENS = (1, 4, 16, 64)
TARGETS = (0.1, 0.15, 0.2, 0.25)
FIGURES = ("tokens", "target_drop", "dropped_fraction", "unpruned_us", "pruned_us", "ratio")
SHAPE = "mixtral-8x7b"
ALIGNED = 64  # elements
RESULTS = ROOT / "benchmarks" / "results" / "pruned_kernels.jsonl"


def main() -> None:
    arguments = parse_arguments()
    if arguments.command == "capture":
        capture(arguments)
    else:
        time_routes(arguments)


def capture(arguments: argparse.Namespace) -> None:
    """Per layer: weights [tokens, k] and ids of `--windows` windows, and the ratio per target."""
    sys.path.insert(0, str(ROOT))
    from mcmoe_vllm.checkpoint.files import open_checkpoint
    from mcmoe_vllm.model.moe_model import open_model
    from mcmoe_vllm.model.runner import run_layer
    from mcmoe_vllm.model.text import load_tokenizer, sample_windows, strided_windows
    from mcmoe_vllm.pruning.calibration import calibrate_pruning

    checkpoint = open_checkpoint(arguments.model)
    tokenizer = load_tokenizer(checkpoint.path, False)
    loaded = open_model(checkpoint)
    samples = sample_windows(arguments.calibration, tokenizer, 64, 512, 0)
    table = calibrate_pruning(loaded, samples, TARGETS[0], "sensitivity")
    tokens = strided_windows(arguments.text, tokenizer, arguments.windows, 512)
    blocks, found = [block.cpu() for block in loaded.embed(tokens)], {}
    for index in range(loaded.num_layers):
        with loaded.open_layer(index) as layer:
            runs = [run_layer(layer, [block], layer.experts) for block in blocks]
        blocks = [run.outputs[0].cpu() for run in runs]
        routings = [run.routing for run in runs if run.routing is not None]
        if routings:
            found[f"{index}.weights"] = torch.cat([r.weights for r in routings]).float().cpu()
            found[f"{index}.ids"] = torch.cat([r.ids for r in routings]).int().cpu()
    ratios = {t: {str(i): r for i, r in table.layer_ratios(t).items()} for t in TARGETS}
    source = {"model": checkpoint.path.name, "text": Path(arguments.text).name}
    save_file(found, arguments.output, {**source, "ratios": json.dumps(ratios)})


def time_routes(arguments: argparse.Namespace) -> None:
    with safe_open(arguments.routes, "pt") as file:
        source = file.metadata()
        by_target = {float(target): r for target, r in json.loads(source.pop("ratios")).items()}
        routing = {
            int(i): (file.get_tensor(f"{i}.weights"), file.get_tensor(f"{i}.ids"))
            for i in by_target[TARGETS[0]]
        }
    layers = list(routing)
    assert routing[layers[0]][1].shape[1] == SHAPES[SHAPE][1], "another top_k than the shape's"
    stack = [random_layer(SHAPE, seed=i) for i in layers]
    head = {**about(arguments.commit, "pruned"), **source, "shape": SHAPE, "layers": len(layers)}
    for tokens in arguments.tokens:
        steps = draw_steps([routing[i] for i in layers], tokens, arguments.count)
        unpruned = measure(stack, steps, [0.0] * len(layers), tokens)
        for target, by_layer in by_target.items():
            ratios = [by_layer[str(i)] for i in layers]
            pruned = measure(stack, steps, ratios, tokens)
            row = {
                **head,
                "tokens": tokens,
                "steps": len(steps),
                "target_drop": target,
                "dropped_fraction": dropped_fraction(steps, ratios, tokens),
                "unpruned_us": unpruned,
                "pruned_us": pruned,
                "ratio": pruned / unpruned,
            }
            print(*(f"{key} {row[key]:.3f}" for key in FIGURES), sep="  ", flush=True)
            with arguments.output.open("a") as out:
                out.write(json.dumps(row) + "\n")


def draw_steps(
    routing: list[tuple[torch.Tensor, torch.Tensor]], tokens: int, count: int
) -> list[Route]:
    """`count` steps of `tokens` tokens, drawn from all positions: the routes of each through every
    layer, [layers, at least tokens * top_k], a layer's at an address as aligned as any tensor's."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(routing[0][1]), (count, tokens), generator=generator)
    weights, ids = (torch.stack(parts).cuda() for parts in zip(*routing, strict=True))
    fill = -tokens * ids.shape[2] % ALIGNED
    return [
        Route(*(pad(of[:, r].flatten(1), (0, fill), value=-1) for of in (weights, ids)))
        for r in rows
    ]


def routes_of(step: Route, tokens: int) -> list[Route]:
    """A step's routes by layer, [tokens, top_k]."""
    size = tokens * SHAPES[SHAPE][1]
    return [
        Route(w[:size].view(tokens, -1), i[:size].view(tokens, -1))
        for w, i in zip(step.topk_weights, step.topk_ids, strict=True)
    ]


def dropped_fraction(steps: list[Route], ratios: list[float], tokens: int) -> float:
    dropped = [
        float((prune_ids(route.topk_weights, route.topk_ids, ratio) < 0).float().mean())
        for step in steps
        for route, ratio in zip(routes_of(step, tokens), ratios, strict=True)
    ]
    return sum(dropped) / len(dropped)


def measure(stack: list[Any], steps: list[Route], ratios: list[float], tokens: int) -> float:
    """Microseconds a layer, the mean over all steps of each one's median."""
    x = torch.randn(tokens, stack[0].hidden_size, device="cuda", dtype=torch.bfloat16)

    def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        routes = routes_of(Route(weights, ids), tokens)
        for layer, route, ratio in zip(stack, routes, ratios, strict=True):
            fused_experts(x, layer, route.topk_weights, route.topk_ids, prune_ratio=ratio)

    return time_call(run, x, steps, 5).median / len(stack)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    capturing = commands.add_parser("capture")
    capturing.add_argument("model")
    capturing.add_argument("--calibration", required=True)
    capturing.add_argument("--text", required=True)
    capturing.add_argument("--windows", type=int, default=8)
    capturing.add_argument("-o", "--output", required=True)
    timing = commands.add_parser("time")
    timing.add_argument("routes")
    timing.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    timing.add_argument("--count", type=int, default=256, help="steps drawn")
    timing.add_argument("--commit", help="recorded if the checkout has no git folder")
    timing.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
