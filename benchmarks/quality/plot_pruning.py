"""Draw what pruning costs against what it drops, from benchmarks/results/pruning.jsonl.

python benchmarks/quality/plot_pruning.py        writes docs/pruning.png, prints tables
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from plot import print_cells, print_header

ROOT = Path(__file__).parents[2]
RULES = {  # name in the rows: name in the plot, colour, line
    "random": ("by chance", "#777777", "^-"),
    "paper": ("the paper's rule, medians", "#D55E00", "D"),
    "fixed": ("one ratio for all layers, renormalised", "#B87700", "s-"),
    "default": ("mcmoe-vllm", "#0072B2", "o-"),
}
RECOMMENDED = 15


def main() -> None:
    lines = (ROOT / "benchmarks/results/pruning.jsonl").read_text().splitlines()
    everything = list(map(json.loads, lines))
    rows = [row for row in everything if row["bits"] == 16 and row["phase"] == "both"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.4 * len(models), 4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), squeeze=False, sharex=True, sharey=True)[0]
    for axes, model in zip(panels, models, strict=True):
        draw(axes, [row for row in rows if row["model"] == model])
        axes.set_title(model, fontsize="medium")
        axes.set_xlabel("expert activations dropped, %")
    panels[0].set_ylabel("perplexity lost, % (log scale)")
    panels[0].legend(loc="lower right", fontsize="small")
    figure.suptitle("A threshold of its own for each layer loses least (lower is better)")
    figure.savefig(ROOT / "docs/pruning.png", metadata={"Software": "mcmoe-vllm"})
    print_importance([row for row in everything if row["phase"] != "both"])
    print_compressed([row for row in everything if row["bits"] < 16 and row["rule"] == "default"])


def draw(axes: Any, rows: list[dict]) -> None:
    """A curve for each rule, with two standard errors."""
    axes.axvline(RECOMMENDED, color="#0072B2", linestyle=":", linewidth=1)
    axes.text(RECOMMENDED + 0.7, 16, f"recommended:\n{RECOMMENDED} %", fontsize="small")
    for rule, (label, colour, style) in RULES.items():
        curve = latest_curve([row for row in rows if row["rule"] == rule])
        if not curve:
            continue
        points = sorted((100 * r["dropped_fraction"], lost(r), error_of(r)) for r in curve)
        dropped, losses, errors = zip(*points, strict=True)
        axes.errorbar(
            dropped, losses, yerr=errors, fmt=style, color=colour, markersize=4, capsize=2,
            label=label,
        )  # fmt: skip
    axes.set_yscale("log", nonpositive="clip")
    axes.set_xlim(0, 70)
    axes.set_ylim(0.002, 40)
    ticks = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def latest_curve(rows: list[dict]) -> list[dict]:
    """The rows of the newest run."""
    run = max((row["run"] for row in rows), default=None)
    return [row for row in rows if row["run"] == run and row["importance"] == "none"]


def lost(row: dict) -> float:
    return 100 * (row["perplexity"] / row["base_perplexity"] - 1)


def error_of(row: dict) -> float:
    """Two standard errors of what is lost, in percent."""
    return 200 * row["paired_stderr"]


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
            f"{lost(row):.2f} % ({error_of(row):.2f}), KL {row['kl']:.4f}"
        )


if __name__ == "__main__":
    main()
