"""Draw the kernels' times beside their peers' from benchmarks/results/kernels.jsonl, and print the
table of every width.

python benchmarks/kernels/plot.py        writes docs/kernels.png
    --device NAME --output FILE          the same of another GPU
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
# Name in the rows: name in the plot, colour; from top to bottom.
KERNELS = {
    "mcmoe": ("mcmoe-vllm, 2.5 bits", "#0072B2"),
    "humming-uint2": ("humming, 2 bits", "#9E9E9E"),
    "humming-uint3": ("humming, 3 bits", "#9E9E9E"),
    "vllm-marlin-int4": ("vLLM Marlin, 4 bits", "#9E9E9E"),
    "vllm-bf16": ("vLLM, 16 bits", "#9E9E9E"),
}
SHAPES = {
    "mixtral-8x7b": "Mixtral-8x7B", "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "deepseek-v2-lite": "DeepSeek-V2-Lite",
}  # fmt: skip
TABLE_TOKENS = (1, 8, 64, 512, 4096)


def main() -> None:
    lines = (ROOT / "benchmarks/results/kernels.jsonl").read_text().splitlines()
    known = [json.loads(line) for line in lines]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    devices = sorted({row["device"] for row in known})
    parser.add_argument("--device", choices=devices, default="NVIDIA H100 80GB HBM3")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/kernels.png")
    arguments = parser.parse_args()
    known = [row for row in known if row["device"] == arguments.device]
    rows = [row for row in known if row["run"].endswith("peers")]
    print_widths([row for row in known if row["run"].endswith("sweep")])
    last_run = {(row["shape"], row["tokens"]): row["run"] for row in rows}
    rows = [row for row in rows if row["run"] == last_run[row["shape"], row["tokens"]]]
    draw(rows, arguments.device).savefig(arguments.output, metadata={"Software": "mcmoe-vllm"})


def print_widths(rows: list[dict]) -> None:
    """Of the last sweep: us and, in percent, the larger of the shares of the copy bandwidth and (in
    brackets) of the matrix peak; last, a kernel for all widths over one for 1, 2, 3 alone."""
    if not rows:
        return
    rows = [row for row in rows if row["run"] == rows[-1]["run"]]
    found = {(r["shape"], r["tokens"], r["bits"], r["compiled_for_all_widths"]): r for r in rows}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        for tokens in TABLE_TOKENS:
            cells = []
            for bits in (1, 2, 3, 4, 2.5):
                row = found[shape, tokens, bits, False]
                memory, matrix = (100 * row[f"{x}_fraction"] for x in ("bandwidth", "matrix"))
                share = f"{memory:.0f} %" if memory > matrix else f"({matrix:.0f} %)"
                cells.append(f"{row['median_us']:.0f}, {share}")
            mixing = (
                found[shape, tokens, bits, True]["median_us"]
                / found[shape, tokens, bits, False]["median_us"]
                for bits in (1, 2, 3)
            )
            cells.append(" / ".join(f"{ratio:.2f}" for ratio in mixing))
            print(f"| {shape}, {tokens} | {' | '.join(cells)} |")


def draw(rows: list[dict], device: str) -> Figure:
    """A column for each model's layer, a row for each number of tokens, a bar for each kernel."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    tokens = sorted({row["tokens"] for row in rows})
    size = (0.8 + 3.4 * len(shapes), 0.9 + 1.25 * len(tokens))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tokens), len(shapes), squeeze=False, sharey=True)
    for line, count in zip(panels, tokens, strict=True):
        line[0].set_ylabel(f"{count} token{'s' * (count > 1)}", fontweight="bold")
        for axes, shape in zip(line, shapes, strict=True):
            own = [row for row in rows if (row["shape"], row["tokens"]) == (shape, count)]
            draw_times(axes, {row["kernel"]: row["median_us"] for row in own})
    for axes, shape in zip(panels[0], shapes, strict=True):
        axes.set_title(SHAPES.get(shape, shape))
    figure.suptitle(
        f"Time of one MoE layer on an {device}: a longer bar is slower"
        " (in brackets: times mcmoe-vllm's)"
    )
    return figure


def draw_times(axes: Any, times: dict[str, float]) -> None:
    """Bars from zero. Beside each its time and, of others, how many times mcmoe's that is."""
    for place, (kernel, (_, colour)) in enumerate(KERNELS.items()):
        time = times[kernel]
        axes.barh(place, time, color=colour)
        label = f"{time:.0f} µs" if time >= 20 else f"{time:.1f} µs"
        if kernel != "mcmoe":
            label += f"  ({time / times['mcmoe']:.2f}x)"
        axes.annotate(
            label, (time, place), (3, 0), textcoords="offset points", va="center", fontsize="small"
        )
    axes.set_yticks(range(len(KERNELS)), [name for name, _ in KERNELS.values()], fontsize="small")
    axes.set_ylim(len(KERNELS) - 0.4, -0.6)
    axes.set_xlim(0, 1.45 * max(times.values()))
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


if __name__ == "__main__":
    main()
