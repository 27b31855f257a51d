"""Draw what pruning costs against what it drops, from benchmarks/results/pruning.jsonl.

python benchmarks/quality/plot_pruning.py        writes docs/pruning.png, prints tables
"""

import json
from collections import defaultdict
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from plot import print_cells, print_header

ROOT = Path(__file__).parents[2]
RULES = {  # name in the rows: name in the plot, colour, line
    "default": ("mcmoe", "#0072B2", "o-"),
    "paper": ("the paper's medians", "#D55E00", "D"),
    "fixed": ("one ratio for all layers, renormalised", "#E69F00", "s-"),
    "random": ("by chance", "#999999", "^-"),
}


def main() -> None:
    lines = (ROOT / "benchmarks/results/pruning.jsonl").read_text().splitlines()
    everything = list(map(json.loads, lines))
    rows = [row for row in everything if row["bits"] == 16 and row["phase"] == "both"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.2 * len(models), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(panels, models, strict=True):
        for rule, (label, colour, style) in RULES.items():
            curve = latest_curve([r for r in rows if r["model"] == model and r["rule"] == rule])
            if not curve:
                continue
            points = sorted((row["dropped_fraction"], lost(row)) for row in curve)
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
        axes.set_title(model)
        axes.set_yscale("log")
        ticks = (0.1, 0.3, 1, 3, 10, 30)
        axes.set_yticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("share of expert activations dropped")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity lost, %")
    panels[0].legend(frameon=False, fontsize="small")
    figure.savefig(ROOT / "docs/pruning.png", metadata={"Software": "mcmoe-vllm"})
    print_importance([row for row in everything if row["phase"] != "both"])
    print_compressed([row for row in everything if row["bits"] < 16 and row["rule"] == "default"])


def latest_curve(rows: list[dict]) -> list[dict]:
    """The rows of the newest run."""
    run = max((row["run"] for row in rows), default=None)
    return [row for row in rows if row["run"] == run and row["importance"] == "none"]


def lost(row: dict) -> float:
    return 100 * (row["perplexity"] / row["base_perplexity"] - 1)


def print_importance(rows: list[dict]) -> None:
    """KL divergences by what protects tokens, in the order of the shares that were dropped."""
    found = defaultdict(list)
    for row in rows:
        if row["rule"] == "default":
            found[row["importance"], row["phase"], row["model"]].append(row)
    columns = list(dict.fromkeys((phase, model) for _, phase, model in sorted(found)))
    print_header("protected by", *(f"{m}, {p}" for p, m in columns))
    for importance in dict.fromkeys(row["importance"] for row in rows):
        points = (found[importance, *column] for column in columns)
        cells = [
            " / ".join(f"{r['kl']:.5f}" for r in sorted(p, key=lambda r: r["dropped_fraction"]))
            for p in points
        ]
        print_cells(importance, *cells)


def print_compressed(rows: list[dict]) -> None:
    for row in sorted(rows, key=lambda row: (row["model"], row["dropped_fraction"])):
        print(
            f"{row['model']} at {row['bits']} bits: {row['dropped_fraction']:.3f} dropped, "
            f"{lost(row):.2f} % ({200 * row['paired_stderr']:.2f}), KL {row['kl']:.4f}"
        )


if __name__ == "__main__":
    main()
