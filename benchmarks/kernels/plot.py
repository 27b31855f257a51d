"""Draw the kernels' times beside their peers' from benchmarks/results/kernels.jsonl, and print the
table of every width.

python benchmarks/kernels/plot.py        writes docs/kernels.png, the README's plot
    --device NAME --output FILE          the same of another GPU
"""

import argparse
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
COLOURS = {
    "vllm-bf16": "#999999", "vllm-marlin-int4": "#E69F00", "humming-uint3": "#56B4E9",
    "humming-uint2": "#0072B2",
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
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(3.6 * len(shapes), 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shapes), squeeze=False)[0]
    last_run = {(row["shape"], row["tokens"]): row["run"] for row in rows}
    rows = [row for row in rows if row["run"] == last_run[row["shape"], row["tokens"]]]
    for axes, shape in zip(panels, shapes, strict=True):
        draw(axes, [row for row in rows if row["shape"] == shape])
        axes.set_title(shape)
    panels[0].set_ylabel("time of one layer, mcmoe = 1")
    panels[-1].legend(frameon=False, fontsize="small")
    figure.savefig(arguments.output, metadata={"Software": "mcmoe-vllm"})


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


def draw(axes, rows: list[dict]) -> None:
    tokens = sorted({row["tokens"] for row in rows})
    times = {(row["kernel"], row["tokens"]): row["median_us"] for row in rows}
    width = 0.8 / len(COLOURS)
    for i, (kernel, colour) in enumerate(COLOURS.items()):
        left = [j - 0.4 + (i + 0.5) * width for j in range(len(tokens))]
        heights = [times[kernel, m] / times["mcmoe", m] for m in tokens]
        axes.bar(left, heights, width, color=colour, label=kernel)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_xticks(range(len(tokens)), [str(m) for m in tokens])
    axes.set_xlabel("tokens")
    axes.grid(alpha=0.3, axis="y")


if __name__ == "__main__":
    main()
