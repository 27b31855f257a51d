#!/usr/bin/env python3
"""Measure which configuration is fastest for each shape and number of tokens: `python tune.py`.

Writes kernels/mcmoe_kernels/gpu/configs/<device>.json, or --output. Needs a GPU; a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernels"), str(Path(__file__).parent)]

from bench import SWEEP_TOKENS, compile_one  # noqa: E402
from layers import PLAIN_SHAPES, SHAPES, Route, random_layer, random_routes  # noqa: E402
from timing import time_call  # noqa: E402

from mcmoe_kernels.gpu.choice import (  # noqa: E402
    SIZES,
    Config,
    DecodeConfig,
    LayerShape,
    PrefillConfig,
    SingleConfig,
    WarpConfig,
    WarpgroupConfig,
    compiler,
    dump_config,
    fit,
)
from mcmoe_kernels.gpu.experts import (  # noqa: E402
    fused_experts,
    shape_of,
)
from mcmoe_kernels.gpu.tiled import TiledMatrices  # noqa: E402

# block_m, block_n13, block_n2, warps, stages, registers of gate_up
DECODE = [(4, 128, 128, 2, 4, 0), (4, 128, 128, 2, 2, 0), (4, 64, 64, 2, 3, 0),
          (4, 64, 64, 4, 3, 0), (4, 256, 128, 4, 4, 0), (4, 256, 256, 4, 3, 0),
          (8, 128, 128, 4, 3, 0), (8, 128, 128, 4, 3, 128), (8, 128, 128, 4, 2, 0),
          (8, 64, 64, 4, 3, 0), (16, 64, 64, 4, 3, 0), (16, 64, 64, 4, 3, 128),
          (16, 128, 128, 4, 3, 0), (16, 128, 128, 8, 3, 128)]  # fmt: skip
# block_n13, block_n2, warps13, warps2, stages13, stages2, splits, registers of both products, parts
# of both. Limits as low as nothing spills: more programs share a multiprocessor.
WARP = [(128, 128, 8, 8, 4, 1, 3), (128, 128, 8, 8, 8, 1, 3), (64, 128, 4, 8, 4, 1, 3),
        (64, 64, 4, 4, 4, 1, 3), (128, 64, 8, 4, 4, 3, 2), (128, 64, 8, 4, 8, 3, 2),
        (64, 64, 4, 4, 4, 3, 2), (64, 64, 4, 4, 2, 3, 2), (64, 64, 4, 4, 4, 2, 3),
        (128, 64, 8, 2, 8, 3, 1), (128, 64, 8, 4, 4, 3, 1), (64, 64, 4, 4, 2, 3, 1),
        (64, 64, 4, 2, 2, 3, 1), (64, 64, 8, 4, 2, 3, 2, 0, 0, 2),
        (64, 64, 8, 2, 1, 3, 1, 0, 0, 2), (64, 64, 8, 4, 2, 3, 1, 80, 96, 2),
        (64, 64, 4, 4, 8, 3, 1, 128, 96), (64, 64, 4, 4, 8, 3, 2, 128, 96),
        (128, 64, 4, 4, 1, 3, 1, 128, 88), (128, 64, 4, 2, 1, 1, 1, 96, 88),
        (128, 64, 4, 4, 1, 3, 2, 128, 96), (128, 64, 4, 4, 2, 3, 1, 168, 80),
        (128, 64, 4, 4, 1, 1, 1, 96, 64), (128, 64, 4, 4, 1, 1, 1, 88, 64),
        (128, 64, 4, 2, 1, 1, 2, 80, 96), (256, 64, 8, 2, 1, 1, 2, 80, 96),
        (128, 128, 4, 4, 1, 1, 2, 80, 128), (128, 64, 4, 2, 2, 1, 2, 144, 96)]  # fmt: skip
WARP_MANY_COLUMNS = [(256, 128, 8, 4, 1, 2, 14), (256, 128, 8, 4, 2, 2, 14),
                     (256, 256, 8, 8, 1, 2, 7), (256, 128, 4, 4, 1, 2, 7),
                     (256, 128, 8, 4, 1, 1, 7, 0, 80), (128, 128, 8, 8, 2, 2, 8)]  # fmt: skip
SINGLE = [(32, 128, 8, 8, 1, 1, 3, 0, 0, 4), (32, 128, 8, 8, 2, 1, 3, 0, 0, 4),
          (32, 128, 8, 8, 1, 3, 2, 0, 0, 4), (32, 128, 8, 8, 1, 2, 3, 0, 0, 4),
          (64, 128, 16, 8, 1, 3, 2, 64, 0, 4), (48, 128, 16, 8, 2, 1, 3, 0, 0, 4),
          (16, 128, 4, 8, 2, 1, 3, 0, 0, 4), (64, 128, 8, 8, 2, 1, 3, 0, 0, 2),
          (128, 64, 8, 4, 8, 3, 2)]  # fmt: skip
SINGLE_MANY_COLUMNS = [(448, 256, 32, 16, 1, 1, 8, 64, 64), (448, 128, 32, 8, 1, 1, 8, 64, 64),
                       (448, 256, 32, 16, 1, 1, 7, 64, 64), (224, 256, 16, 16, 1, 1, 8, 64, 64),
                       (224, 128, 16, 8, 1, 1, 8, 64, 64), (256, 128, 16, 8, 1, 1, 8, 64, 64),
                       (112, 128, 8, 8, 1, 1, 8, 64, 64)]  # fmt: skip
# block_m, block_n13, block_n2, warps, stages, group_n, registers, few_m
PREFILL = [(8, 128, 128, 4, 3, 112, 128), (16, 128, 128, 4, 3, 112, 168, 8),
           (16, 128, 128, 4, 4, 112, 168, 8),
           (16, 128, 128, 4, 3, 64, 0), (16, 128, 128, 4, 3, 64, 168), (32, 64, 64, 4, 3, 64, 0),
           (32, 128, 128, 4, 3, 64, 0), (32, 128, 128, 4, 3, 64, 0, 16),
           (32, 128, 128, 4, 3, 64, 0, 8), (32, 128, 128, 4, 3, 112, 0, 16),
           (32, 128, 128, 4, 3, 112, 0, 8), (32, 128, 64, 4, 3, 64, 0),
           (32, 128, 128, 8, 3, 64, 128), (32, 256, 128, 8, 3, 64, 0),
           (32, 128, 128, 4, 2, 64, 0), (64, 128, 128, 4, 2, 16, 168),
           (64, 128, 128, 4, 2, 64, 0, 32), (64, 128, 128, 4, 2, 112, 0, 16),
           (64, 256, 256, 8, 2, 16, 128), (64, 256, 256, 8, 2, 64, 128),
           (64, 256, 256, 8, 2, 64, 128, 16), (64, 256, 128, 8, 2, 64, 128),
           (128, 256, 256, 8, 2, 16, 0)]  # fmt: skip
# block_m, block_n13, block_n2, warps, stages, part13, part2, group_n, registers
WARPGROUP = [(16, 128, 128, 4, 4, 64, 64, 64, 144), (32, 64, 64, 4, 4, 64, 64, 64, 128),
             (32, 64, 64, 4, 6, 64, 64, 64, 128), (32, 128, 64, 4, 4, 64, 64, 64, 0),
             (32, 128, 128, 4, 4, 64, 64, 64, 0), (32, 128, 128, 8, 4, 64, 64, 64, 128),
             (64, 256, 256, 8, 4, 64, 64, 16, 0), (128, 128, 128, 8, 4, 64, 64, 16, 0),
             (128, 256, 256, 8, 4, 64, 64, 16, 0), (128, 256, 256, 8, 4, 64, 64, 64, 0),
             (128, 256, 256, 8, 4, 64, 32, 16, 0),
             (128, 256, 256, 8, 4, 64, 32, 64, 0)]  # fmt: skip


def candidates(shape: str, tokens: int) -> list[Config]:
    experts, top_k, hidden, intermediate = SHAPES[shape]
    per_expert = tokens * top_k / min(experts, tokens * top_k)
    splits = (1, 2, 4, 7) if intermediate > 4096 else (1, 2)
    found: list[Config] = []
    if per_expert <= 32:
        found += [
            DecodeConfig(m, n13, n2, w, min(w, 4), s, s, split, r)
            for m, n13, n2, w, s, r in DECODE
            for split in splits
            if m <= max(4, 2 * per_expert)
        ]
    many = intermediate > 4096
    if tokens == 1:
        found += [SingleConfig(4, *sizes) for sizes in (SINGLE_MANY_COLUMNS if many else SINGLE)]
    elif per_expert <= 4:
        found += [WarpConfig(4, *sizes) for sizes in (WARP_MANY_COLUMNS if many else WARP)]
    if per_expert >= 4:
        found += [
            PrefillConfig(*sizes)
            for sizes in PREFILL
            if min(64, per_expert / 2) <= sizes[0] <= max(32, 2 * per_expert)
        ]
        if torch.cuda.get_device_capability() == (9, 0):
            found += [
                WarpgroupConfig(*sizes)
                for sizes in WARPGROUP
                if min(64, per_expert / 2) <= sizes[0] <= max(32, 2 * per_expert)
            ]
    layer = LayerShape(experts, top_k, hidden, intermediate)
    return list(dict.fromkeys(fit(config, layer) for config in found))


def compile_candidate(job: tuple[str, bool, Config]) -> str | None:
    shape, single, config = job
    try:
        compile_one((shape, 1 if single else 2, None, TiledMatrices), config)
    except Exception as e:  # a configuration that does not fit the chip is no candidate
        return f"{shape} {config}: {e!r}"[:300]
    return None


def tune(shapes: list[str], tokens: list[int], routes: int) -> list[dict]:
    cases = [(s, m, c) for s in shapes for m in tokens for c in candidates(s, m)]
    jobs = list(dict.fromkeys((s, m == 1, c) for s, m, c in cases))
    begin = time.time()
    with ProcessPoolExecutor(min(15, os.cpu_count() or 1), get_context("spawn")) as pool:
        failed = {
            job: e for job, e in zip(jobs, pool.map(compile_candidate, jobs), strict=True) if e
        }
    print(f"{len(jobs)} compiled in {time.time() - begin:.0f} s", *failed.values(), sep="\n",
          file=sys.stderr)  # fmt: skip
    out = []
    for shape in shapes:
        layer, best = random_layer(shape), {}
        for m in tokens:
            drawn = random_routes(shape, m, routes, layer)
            timed = sorted(
                (measure(layer, drawn, m, c), i, c)
                for i, c in enumerate(candidates(shape, m))
                if (shape, m == 1, c) not in failed
            )
            best[m] = timed[0][2]
            line = "  ".join(f"{t:.1f} {tuple(c.__dict__.values())}" for t, _, c in timed[:3])
            print(f"{shape} {m}: {line}", file=sys.stderr, flush=True)
        measured = shape_of(layer, SHAPES[shape][1])
        entry = {name: getattr(measured, name) for name in (*SIZES, "group_size")}
        out.append({**entry, "tokens": {str(m): dump_config(c) for m, c in best.items()}})
        del layer
        torch.cuda.empty_cache()
    return out


def measure(layer, routes: list[Route], tokens: int, config: Config) -> float:
    x = torch.randn(tokens, layer.hidden_size, device="cuda", dtype=torch.bfloat16)
    run = lambda x, weights, ids: fused_experts(x, layer, weights, ids, config)  # noqa: E731
    return time_call(run, x, routes, 5 if tokens <= 512 else 3).median


def main() -> None:
    name = torch.cuda.get_device_name().replace(" ", "_").replace("/", "_")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=PLAIN_SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(SWEEP_TOKENS))
    parser.add_argument("--routes", type=int, default=8)
    parser.add_argument(
        "--output", type=Path, default=ROOT / f"kernels/mcmoe_kernels/gpu/configs/{name}.json"
    )
    arguments = parser.parse_args()
    shapes = tune(arguments.shapes, arguments.tokens, arguments.routes)
    table = {"device": name, "triton": compiler(), "shapes": shapes}
    arguments.output.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
