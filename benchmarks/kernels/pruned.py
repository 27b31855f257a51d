#!/usr/bin/env python3
"""What online pruning saves: one MoE layer with and without it, on a real model's routing.

    python pruned.py capture MODEL --calibration A.jsonl --text B.jsonl -o routes.safetensors
    python pruned.py time routes.safetensors

`capture` calibrates the rule on one text and notes how MODEL routes the other; it needs mcmoe-vllm
and no GPU. `time` needs a GPU and no model: tokens of different positions, batched as decoding
batches them, are routed through experts of a large model's shape, unpruned and pruned in turn.
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

from mcmoe_kernels.experts_gpu import fused_experts
from mcmoe_kernels.pruning import prune_ids

TOKENS = (1, 4, 16, 64)
TARGETS = (0.1, 0.15, 0.2, 0.25)
FIGURES = ("tokens", "target_drop", "dropped_fraction", "unpruned_us", "pruned_us", "ratio")
SHAPE = "mixtral-8x7b"
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
    from mcmoe_vllm.checkpoint import open_checkpoint
    from mcmoe_vllm.evaluation import load_streamed, open_layer
    from mcmoe_vllm.pruning_calibration import calibrate_pruning
    from mcmoe_vllm.text import load_tokenizer, sample_windows, strided_windows

    checkpoint = open_checkpoint(arguments.model)
    tokenizer = load_tokenizer(checkpoint.path, False)
    loaded = load_streamed(checkpoint)
    samples = sample_windows(arguments.calibration, tokenizer, 64, 512, 0)
    table = calibrate_pruning(loaded, samples, TARGETS[0], "sensitivity")
    tokens = strided_windows(arguments.text, tokenizer, arguments.windows, 512)
    blocks, found = [block.cpu() for block in loaded.model.embed(tokens)], {}
    for index in range(loaded.model.num_layers):
        with open_layer(loaded, index) as run:
            routed = [run(block, None) for block in blocks]
        blocks = [block for block, _ in routed]
        routings = [routing for _, routing in routed if routing is not None]
        if routings:
            found[f"{index}.weights"] = torch.cat([r.weights for r in routings]).float()
            found[f"{index}.ids"] = torch.cat([r.ids for r in routings]).int()
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
    ratios = {target: {int(i): r for i, r in of.items()} for target, of in by_target.items()}
    layer = random_layer(SHAPE)
    assert routing[layers[0]][1].shape[1] == SHAPES[SHAPE][1], "another top_k than the shape's"
    head = {**about(arguments.commit, "pruned"), **source, "shape": SHAPE}
    for tokens in arguments.tokens:
        routes = {i: draw_routes(*routing[i], tokens, -(-arguments.count // len(layers)), i)
                  for i in layers}  # fmt: skip
        unpruned = measure(layer, routes, dict.fromkeys(layers, 0.0), tokens)
        for target, by_layer in ratios.items():
            pruned = measure(layer, routes, by_layer, tokens)
            dropped = [
                float((prune_ids(r.topk_weights, r.topk_ids, by_layer[i]) < 0).float().mean())
                for i in layers for r in routes[i]
            ]  # fmt: skip
            row = {
                **head,
                "tokens": tokens,
                "routes": len(dropped),
                "target_drop": target,
                "dropped_fraction": sum(dropped) / len(dropped),
                "unpruned_us": unpruned,
                "pruned_us": pruned,
                "ratio": pruned / unpruned,
            }
            print(*(f"{key} {row[key]:.3f}" for key in FIGURES), sep="  ", flush=True)
            with arguments.output.open("a") as out:
                out.write(json.dumps(row) + "\n")


def draw_routes(
    weights: torch.Tensor, ids: torch.Tensor, tokens: int, count: int, seed: int
) -> list[Route]:
    """`count` batches of `tokens` rows, drawn from all positions."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(ids), (count, tokens), generator=generator)
    return [Route(weights[r].cuda(), ids[r].cuda()) for r in rows]


def measure(
    layer: Any, routes: dict[int, list[Route]], ratios: dict[int, float], tokens: int
) -> float:
    """Microseconds, the mean over all routes of each one's median."""
    x = torch.randn(tokens, layer.hidden_size, device="cuda", dtype=torch.bfloat16)
    total, count = 0.0, 0
    for index, drawn in routes.items():
        run = lambda x, weights, ids, ratio=ratios[index]: fused_experts(  # noqa: E731
            x, layer, weights, ids, prune_ratio=ratio
        )
        total += time_call(run, x, drawn, 5).median * len(drawn)
        count += len(drawn)
    return total / count


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
    timing.add_argument("--count", type=int, default=256, help="batches drawn, over all layers")
    timing.add_argument("--commit", help="recorded if the checkout has no git folder")
    timing.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
