#!/usr/bin/env python3
"""Time one MoE layer in mcmoe's kernels and in its peers', in one run: `python bench.py`.

From given routes to the reduced output, CUDA graph, cold L2 cache, the same 64 routes for every
kernel. Needs a GPU and, for the peers, vLLM with humming-kernels; a peer that cannot run stops the
run unless --kernels leaves it out. Appends a row a measurement to --output. --sweep instead times
mcmoe alone: every width, 1 to 8192 tokens, and what one kernel for all widths costs a uniform one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernels"), str(Path(__file__).parent)]

from layers import (  # noqa: E402
    OTHERS,
    PLAIN_SHAPES,
    SHAPES,
    MixedMatrices,
    Route,
    active_slots,
    random_layer,
    random_routes,
    touched_bits,
    touched_bytes,
    traits_of,
)
from peers import PEERS, use_tuned_files  # noqa: E402
from timing import copy_bandwidth, matrix_peak, time_call  # noqa: E402

from mcmoe_kernels.gpu.choice import (  # noqa: E402
    Config,
    choose_config,
    dump_config,
)
from mcmoe_kernels.gpu.experts import (  # noqa: E402
    fused_experts,
    shape_of,
)
from mcmoe_kernels.gpu.tiled import (  # noqa: E402
    TiledLayer,
    TiledMatrices,
)

TOKENS = (1, 8, 64, 4096)
SWEEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
OURS = "mcmoe"
PACKAGES = ("torch", "triton", "vllm", "humming-kernels")


def main() -> None:
    arguments = parse_arguments()
    beside = "peers" if set(PEERS) <= set(arguments.kernels) else "alone"
    head = about(arguments.commit, "sweep" if arguments.sweep else beside)
    if arguments.sweep:
        rows = sweep(arguments, head)
    else:
        if set(PEERS) & set(arguments.kernels):
            head["tuned_files"] = use_tuned_files(
                [(SHAPES[s][0], SHAPES[s][3]) for s in PLAIN_SHAPES]
            )
        rows = compare(arguments, head)
    for row in rows:  # each is written as soon as it is measured
        show(row)
        with arguments.output.open("a") as f:
            f.write(json.dumps(row) + "\n")


def compare(arguments: argparse.Namespace, head: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cases = [(s, m) for s in arguments.shapes for m in arguments.tokens]
    precompile(
        [(*case, None, TiledMatrices) for case in cases],
        [(*case, kernel) for kernel in arguments.kernels if kernel != OURS for case in cases],
    )
    for shape in arguments.shapes:
        layer = random_layer(shape)
        routes = {m: random_routes(shape, m, arguments.routes, layer) for m in arguments.tokens}
        for kernel in arguments.kernels:
            bits, call = 2.5, None
            if kernel != OURS:
                experts, _, hidden, intermediate = SHAPES[shape]
                bits, prepare = PEERS[kernel]
                call = prepare(experts, hidden, intermediate)
            for tokens in arguments.tokens:
                timed = measure(layer, routes[tokens], arguments, call)
                where = {"shape": shape, "tokens": tokens, "kernel": kernel, "bits": bits}
                yield {**head, **where, **timed}
            call = None
            torch.cuda.empty_cache()


def sweep(arguments: argparse.Namespace, head: dict[str, Any]) -> Iterator[dict[str, Any]]:
    bandwidth, peak = copy_bandwidth(), matrix_peak()
    head |= {"copy_bytes_per_second": bandwidth, "matrix_flops": peak}
    widths = [(b, kind) for b in (1, 2, 3, 4) for kind in (TiledMatrices, MixedMatrices)]
    widths = [w for w in widths if w != (4, MixedMatrices)] + [(None, TiledMatrices)]
    jobs = [
        (s, m, b, kind) for s in arguments.shapes for m in arguments.tokens for b, kind in widths
    ]
    precompile(jobs)
    for shape in arguments.shapes:
        _, top_k, hidden, intermediate = SHAPES[shape]
        for bits, kind in widths:
            layer = random_layer(shape, bits, kind)
            for tokens in arguments.tokens:
                routes = random_routes(shape, tokens, arguments.routes, layer)
                timed = measure(layer, routes, arguments, None)
                bytes_ = sum(touched_bytes(layer, r) for r in routes) / len(routes)
                flops = 6 * tokens * top_k * hidden * intermediate
                seconds = timed["median_us"] / 1e6
                yield {
                    **head,
                    "shape": shape,
                    "tokens": tokens,
                    "kernel": OURS,
                    "bits": bits or 2.5,
                    **timed,
                    "compiled_for_all_widths": kind is MixedMatrices,
                    "bandwidth_fraction": bytes_ / seconds / bandwidth,
                    "matrix_fraction": flops / seconds / peak,
                }


def measure(
    layer: TiledLayer, routes: list[Route], arguments: argparse.Namespace, call: Any
) -> dict[str, Any]:
    """Time a peer's call or, with None, ours."""
    tokens = routes[0].topk_ids.shape[0]
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(
        tokens, layer.hidden_size, device="cuda", dtype=torch.bfloat16, generator=generator
    )
    config = {}
    if call is None:
        chosen = choose_config(x.device, shape_of(layer, routes[0].topk_ids.shape[1]), tokens)
        config = {"config": dump_config(chosen)}
        call = lambda x, weights, ids: fused_experts(x, layer, weights, ids)  # noqa: E731
    repeats = arguments.repeats if tokens <= 512 else max(3, arguments.repeats // 3)
    timing = time_call(call, x, routes, repeats, arguments.flush)
    return {
        "active_experts": sum(len(active_slots(layer, r)) for r in routes) / len(routes),
        "touched_bits": sum(touched_bits(layer, r) for r in routes) / len(routes),
        "median_us": timing.median,
        "p20_us": timing.p20,
        "p80_us": timing.p80,
        "routes": len(routes),
        "flush": arguments.flush,
        **config,
    }


def precompile(
    jobs: list[tuple[str, int, int | None, type]], peers: Sequence[tuple[str, int, str]] = ()
) -> None:
    """Compile in parallel processes what will be timed; everyone keeps it in a cache on disk."""
    begin = time.time()
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), get_context("spawn")) as pool:
        others = [pool.submit(compile_peer, *peer) for peer in reversed(peers)]
        list(pool.map(compile_one, dict.fromkeys(jobs)))
        for done in others:
            done.result()
    cases = len(jobs) + len(peers)
    print(f"compiled for {cases} cases in {time.time() - begin:.0f} s", file=sys.stderr)


def compile_peer(shape: str, tokens: int, kernel: str) -> None:
    experts, top_k, hidden, intermediate = SHAPES[shape]
    call = PEERS[kernel][1](experts, hidden, intermediate)
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    ids = torch.rand(tokens, experts, device="cuda").topk(top_k)[1].int()
    call(x, torch.ones(ids.shape, device="cuda"), ids)
    torch.cuda.synchronize()
    del call
    torch.cuda.empty_cache()


def compile_one(job: tuple[str, int, int | None, type], config: Config | None = None) -> None:
    shape, tokens, bits, kind = job
    experts, top_k, hidden, intermediate = SHAPES[shape]
    widths = (bits,) if bits else (3, 2, 1)
    empty = torch.zeros(1 << 12, dtype=torch.int8, device="cuda")
    table = torch.zeros(len(widths), dtype=torch.int32, device="cuda")
    # No pair has a slot, so nothing is read and nothing but the number of slots must be right.
    padded = widths + widths[-1:] * (experts - len(widths))
    traits = traits_of(shape)
    bias = torch.zeros(64, dtype=torch.bfloat16, device="cuda") if traits.biases else None
    sizes = (traits.activation.rows * intermediate, hidden), (hidden, intermediate)
    matrices = [kind(n, k, traits.group_size, padded, empty, table, bias=bias) for n, k in sizes]
    lookup = torch.full((experts, 4), -1, dtype=torch.int32, device="cuda")
    layer = TiledLayer(hidden, intermediate, *matrices, lookup, traits.activation)
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    ids = torch.full((tokens, top_k), -1, dtype=torch.int32, device="cuda")
    fused_experts(x, layer, torch.zeros(ids.shape, device="cuda"), ids, config)
    torch.cuda.synchronize()


def show(row: dict[str, Any]) -> None:
    fractions = "".join(f" {k} {row[k]:.2f}" for k in row if k.endswith("_fraction"))
    print(
        f"{row['shape']:17} {row['tokens']:5} {row['kernel']:17} {row['bits']:4} bits "
        f"{row['median_us']:9.1f} us{fractions}"
        + (" (all widths)" if row.get("compiled_for_all_widths") else ""),
        file=sys.stderr,
        flush=True,
    )


def about(commit: str | None, what: str) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "date": now,
        "run": f"{now} {what}",
        "commit": commit or read("git", "describe", "--always", "--dirty"),
        "device": torch.cuda.get_device_name(),
        "gpu_clock": read("nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader"),
        "versions": {name: installed(name) for name in PACKAGES},
        "command": " ".join(sys.argv),
    }  # fmt: skip


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=PLAIN_SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--kernels", nargs="+", default=[*PEERS, OURS], choices=[*PEERS, OURS])
    parser.add_argument("--routes", type=int)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--flush", choices=("read", "write"), default="read")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--commit", help="recorded if the checkout has no git folder")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "kernels.jsonl"
    )
    arguments = parser.parse_args()
    alone = sorted(OTHERS.keys() & set(arguments.shapes))
    if alone and not arguments.sweep and set(PEERS) & set(arguments.kernels):
        parser.error(f"no peer here computes the experts of {', '.join(alone)}: --kernels {OURS}")
    arguments.tokens = arguments.tokens or list(SWEEP_TOKENS if arguments.sweep else TOKENS)
    arguments.routes = arguments.routes or (4 if arguments.sweep else 64)
    return arguments


if __name__ == "__main__":
    main()
