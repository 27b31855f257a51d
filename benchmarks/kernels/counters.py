#!/usr/bin/env python3
"""What bounds the kernels: hardware counters of one layer's two products, by `ncu`.

    python counters.py --shapes mixtral-8x7b --tokens 1 64

Needs a GPU and Nsight Compute, and the right to read counters. A layer at 2.5 bits on average, a
cold L2 cache, clocks as they are. Appends a row a kernel to benchmarks/results/counters.jsonl:
microseconds, and percent of the peak of memory (dram), of instruction slots (issue) and of the
integer (alu) and matrix (tensor) pipes. A kernel under `ncu` runs alone, so its time is not what
`bench.py` measures.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from bench import ROOT, about
from layers import PLAIN_SHAPES, SHAPES, random_layer, random_routes
from timing import flush

from mcmoe_kernels.gpu.choice import LayerShape, choose_config, dump_config
from mcmoe_kernels.gpu.experts import fused_experts

RESULTS = ROOT / "benchmarks" / "results" / "counters.jsonl"
METRICS = {
    "us": "gpu__time_duration.sum",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "alu": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "tensor": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


def main() -> int:
    arguments = parse_arguments()
    if arguments.child:
        run_layer(arguments.shapes[0], arguments.tokens[0])
        return 0
    head = about(arguments.commit, "counters")
    for shape in arguments.shapes:
        for tokens in arguments.tokens:
            command = [
                "ncu", "--csv", "--clock-control", "none", "--cache-control", "none",
                "--kernel-name", "regex:^(gate_up|down)", "--metrics", ",".join(METRICS.values()),
                sys.executable, __file__, "--child", "--shapes", shape, "--tokens", str(tokens),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            found = read_counters(done.stdout.splitlines())
            if done.returncode or not found:
                print(done.stdout[-2000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
                return 1
            config = choose_config(torch.device("cuda"), LayerShape(*SHAPES[shape]), tokens)
            for kernel, figures in found.items():
                row = {**head, "shape": shape, "tokens": tokens, "kernel": kernel, **figures}
                with arguments.output.open("a") as out:
                    out.write(json.dumps({**row, "config": dump_config(config)}) + "\n")
                print(f"{shape:18}{tokens:>6} {kernel:26}", *figures.items(), file=sys.stderr)
    return 0


def read_counters(lines: Iterable[str]) -> dict[str, dict[str, float]]:
    """ncu's lines of one metric each -> by kernel: the figures of its last launch."""
    table = [line for line in lines if line.startswith('"')]
    names = {metric: name for name, metric in METRICS.items()}
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(table):
        name = names.get(row["Metric Name"])
        if name is not None:
            value = float(re.sub(r"[^\d.eE+-]", "", row["Metric Value"]))
            value *= MICROSECONDS[row["Metric Unit"]] if name == "us" else 1
            found.setdefault(row["Kernel Name"], {})[name] = value
    return found


def run_layer(shape: str, tokens: int) -> None:
    """Twice, so that the second finds everything compiled."""
    layer = random_layer(shape)
    (route,) = random_routes(shape, tokens, 1, layer)
    x = torch.randn(tokens, layer.hidden_size, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        flush("read")
        fused_experts(x, layer, route.topk_weights, route.topk_ids)
    torch.cuda.synchronize()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=PLAIN_SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 4096])
    parser.add_argument("--commit", help="recorded if the checkout has no git folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
