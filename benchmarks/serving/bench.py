#!/usr/bin/env python3
"""Serving speed of a compressed model against the plain one: `make bench`.

For each model: start `vllm serve`, run `vllm bench serve` at each concurrency, stop it. Prints a
table and appends a row for each run to benchmarks/results/serving.jsonl. Without --checkpoint the
model is compressed to 2.5 bits first and kept under .cache/bench.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import server

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "serving.jsonl"
EXAMPLE = ROOT / "examples" / "mixtral-6m"
START_SECONDS = 600
COLUMNS = (
    ("model", "model", "{}"),
    ("method", "method", "{}"),
    ("bits", "bits/weight", "{:.2f}"),
    ("concurrency", "concurrency", "{}"),
    ("output_tokens_per_second", "output tokens/s", "{:.1f}"),
    ("ttft_ms", "first token ms", "{:.1f}"),
    ("tpot_ms", "next token ms", "{:.2f}"),
)


def main() -> int:
    arguments = parse_arguments()
    checkpoint = arguments.checkpoint or compress(arguments.model)
    rows = []
    for method, model in (("plain", arguments.model), ("mcmoe", checkpoint)):
        say(f"serving {model} ({method})")
        with served(model, arguments.dtype, arguments.serve_args) as url:
            for concurrency in arguments.concurrency:
                measured = measure(url, model, concurrency, arguments)
                rows.append(
                    {
                        "model": arguments.model.name,
                        "method": method,
                        "bits": expert_bits(model),
                        "dtype": arguments.dtype,
                        "concurrency": concurrency,
                        "serve_args": arguments.serve_args,
                        **measured,
                        **surroundings(),
                    }
                )
                say(f"  concurrency {concurrency}: {describe(rows[-1])}")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(rows))
    say(f"rows appended to {RESULTS.relative_to(ROOT)}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=EXAMPLE, help="plain model folder")
    parser.add_argument("--checkpoint", type=Path, help="its compressed folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--requests", type=int, default=8, help="requests per concurrent client")
    parser.add_argument(
        "--serve-args", nargs=argparse.REMAINDER, default=[], help="more flags for vllm serve"
    )
    arguments = parser.parse_args()
    for folder in (arguments.model, arguments.checkpoint):
        if folder is not None and not (folder / "config.json").is_file():
            parser.error(f"{folder} is no model folder: it has no config.json")
    return arguments


def compress(model: Path) -> Path:
    """The model at 2.5 bits, calibrated on the text that this project consists of."""
    output = ROOT / ".cache" / "bench" / f"{model.name}-2.5bit"
    if (output / "config.json").is_file():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    text = output.parent / "calibration.jsonl"
    sources = sorted((*ROOT.glob("mcmoe_vllm/**/*.py"), *ROOT.glob("docs/*.md")))
    lines = (json.dumps({"text": file.read_text(encoding="utf-8")}) + "\n" for file in sources)
    text.write_text("".join(lines), encoding="utf-8")
    say(f"compressing {model} to {output}")
    subprocess.run(
        [
            *(sys.executable, "-m", "mcmoe_vllm.cli", "quantize", str(model), "-o", str(output)),
            *("--bits", "2.5", "--calibration", str(text), "--samples", "32"),
        ],
        check=True,
        cwd=ROOT,
    )
    return output


@contextlib.contextmanager
def served(model: Path, dtype: str, flags: list[str]) -> Iterator[str]:
    """The address of a server that is ready, ended with all its processes afterwards."""
    port = server.free_port()
    command = [
        *(*server.VLLM, "serve", str(model), "--port", str(port), "--dtype", dtype),
        *("--served-model-name", "model", "--no-enable-prefix-caching", *flags),
    ]
    with tempfile.TemporaryDirectory() as folder:
        log, url = Path(folder) / "log.txt", f"http://127.0.0.1:{port}"
        process = server.start(command, log, environment())
        try:
            failure = server.wait_until_ready(process, url, START_SECONDS)
            if failure:
                tail = log.read_text(errors="replace")[-3000:]
                sys.exit(f"bench: vllm serve {model} did not come up, {failure}:\n{tail}")
            yield url
        finally:
            server.stop(process)


def measure(
    url: str, model: Path, concurrency: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """One run of `vllm bench serve` on random prompts of a fixed length."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(*server.VLLM, "bench", "serve", "--base-url", url, "--model", "model"),
            *("--tokenizer", str(model), "--dataset-name", "random", "--ignore-eos"),
            *("--random-input-len", str(arguments.input_len)),
            *("--random-output-len", str(arguments.output_len)),
            *("--num-prompts", str(arguments.requests * concurrency)),
            *("--max-concurrency", str(concurrency), "--num-warmups", str(concurrency)),
            *("--temperature", "0", "--seed", "0", "--disable-tqdm"),
            *("--save-result", "--result-dir", folder, "--result-filename", "result.json"),
        ]
        process = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        if process.returncode:
            sys.exit(f"bench: vllm bench serve failed:\n{process.stdout[-3000:]}")
        result = json.loads((Path(folder) / "result.json").read_text())
    requests = arguments.requests * concurrency
    if result["completed"] != requests:
        sys.exit(f"bench: {result['completed']} of {requests} requests completed")
    return {
        "output_tokens_per_second": result["output_throughput"],
        "ttft_ms": result["median_ttft_ms"],
        "tpot_ms": result["median_tpot_ms"],
        "input_len": arguments.input_len,
        "output_len": arguments.output_len,
        "requests": requests,
    }


def environment() -> dict[str, str]:
    """What the user set stays; caches stay inside the checkout."""
    cache = ROOT / ".cache"
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
    return {**defaults, **os.environ}


def expert_bits(model: Path) -> float:
    """Bits per expert weight, scales and zeros included; 16 for a plain model."""
    config = json.loads((model / "config.json").read_text())
    average = config.get("quantization_config", {}).get("average_bits", {})
    return float(average.get("experts", 16.0))


def surroundings() -> dict[str, str]:
    """When, where and with what a row was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": ", ".join(
            f"{name} {found}"
            for name in ("mcmoe-vllm", "vllm", "torch", "triton")
            if (found := installed(name))
        ),
        "commit": commit(),
    }


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    names = [platform.machine()]
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                names = [line.partition(":")[2].strip()]
                break
    return f"{os.cpu_count()} cores of {names[0]}"


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The checkout's commit, with -dirty if it has changes; empty outside git."""
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return result.stdout.strip()


def table(rows: list[dict[str, Any]]) -> str:
    cells = [[title for _, title, _ in COLUMNS]]
    cells += [[form.format(row[key]) for key, _, form in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def describe(row: dict[str, Any]) -> str:
    return f"{row['output_tokens_per_second']:.1f} output tokens/s"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
