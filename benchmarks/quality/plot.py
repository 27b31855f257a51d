"""Draw what compression costs against true bits from benchmarks/results/quality.jsonl.

python benchmarks/quality/plot.py        writes docs/quality.png, prints docs/quality.md's tables
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
GROUP_SIZE = 128
COLOURS = {"paper": "#D55E00", "best": "#0072B2"}
LABELS = {"paper": "the paper's method", "best": "mcmoe-vllm"}
PEER_COLOUR = "#555555"
PEER_NUDGES = {"llm-compressor": 3, "gptqmodel": -3}  # points up, where names would meet
OLD_DEFAULT = "error_refinements=0"  # what ablations and most composed widths were measured with
CANNOT_BE_MADE = "zeros=real"  # rows of a trait that recipes do not have
BY_ERRORS = ("recipe", "pmq", "hessian")
PEER_NAMES = {
    "hqq": "HQQ", "gptqmodel": "GPTQModel", "auto-round": "AutoRound",
    "llm-compressor": "llm-compressor",
}  # fmt: skip
ALLOCATIONS = {
    "recipe": "`--recipe best`",
    "frequency": "frequency",
    "weight": "routing weight",
    "hessian": "Hessian trace",
    "pmq": "paper's formula",
    "uniform": "uniform",
    "random": "random, mean of 5",
}


def main() -> None:
    lines = (ROOT / "benchmarks/results/quality.jsonl").read_text().splitlines()
    rows = [in_this_format(row) for row in map(json.loads, lines) if "loss_difference" in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.4 * len(models), 4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), squeeze=False, sharex=True, sharey=True)[0]
    for axes, model in zip(panels, models, strict=True):
        draw(axes, [row for row in rows if row["model"] == model])
        axes.set_title(model, fontsize="medium")
        axes.set_xlabel("bits per expert weight, scales and zeros included")
    panels[0].set_ylabel("loss in log-perplexity (log scale)")
    low, high = shares_of_the_papers_loss(rows, models)
    figure.suptitle(
        f"At equal size mcmoe-vllm loses {low:.0%} to {high:.0%} of what the paper's method loses"
        " (lower is better)"
    )
    figure.savefig(ROOT / "docs/quality.png", metadata={"Software": "mcmoe-vllm"})
    print_table(rows, models)
    print_peers(rows, models)
    print_allocations(rows, models)
    print_changes(rows)


def shares_of_the_papers_loss(rows: list[dict[str, Any]], models: list[str]) -> tuple[float, float]:
    """The smallest and the largest ratio of the two recipes' losses, of the points drawn."""
    ratios = []
    for model in models:
        own = [row for row in rows if row["model"] == model]
        ours, theirs = (
            [mean_and_error([r["loss_difference"] for r in seeds])[0] for seeds in points]
            for points in (recipe_points(own, "best"), recipe_points(own, "paper"))
        )
        ratios += [our / their for our, their in zip(ours, theirs, strict=True)]
    return min(ratios), max(ratios)


def in_this_format(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the true bits that its weights take in format version 2, which holds those of
    version 1 unchanged in 16 bits less for each group."""
    if row["recipe"] not in COLOURS or row.get("format_version", 1) == 2:
        return row
    return {**row, "true_bits": row["true_bits"] - 16 / GROUP_SIZE}


def recipe_rows(rows: list[dict[str, Any]], recipe: str) -> list[dict[str, Any]]:
    """What the recipe gives by its own choice of widths; not the composed ones."""
    own = [row for row in rows if (row["recipe"], row["method"]) == (recipe, "recipe")]
    return [row for row in own if row["sequential"] or "sequential=" in row["changes"]]


def recipe_points(rows: list[dict[str, Any]], recipe: str) -> list[list[dict[str, Any]]]:
    """The rows of each average width, one a seed, in order of width."""
    found = defaultdict(list)
    for row in recipe_rows(rows, recipe):
        if not row["changes"]:
            found[row["nominal_bits"]].append(row)
    return [found[bits] for bits in sorted(found)]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error, 0 of one seed."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Curves of the recipes and points of the others, each with its name beside it."""
    for recipe, colour in COLOURS.items():
        points = recipe_points(rows, recipe)
        bits = [statistics.mean(row["true_bits"] for row in seeds) for seeds in points]
        losses = [mean_and_error([row["loss_difference"] for row in seeds]) for seeds in points]
        axes.errorbar(
            bits, [mean for mean, _ in losses], yerr=[2 * error for _, error in losses],
            marker="o", markersize=4, capsize=2, color=colour,
        )  # fmt: skip
        end, offset = (0, (-6, 9)) if recipe == "paper" else (-1, (7, -4))
        axes.annotate(
            LABELS[recipe], (bits[end], losses[end][0]), offset, textcoords="offset points",
            color=colour, fontweight="bold",
        )  # fmt: skip
    for peer, name in PEER_NAMES.items():
        for row in (row for row in rows if row["recipe"] == peer):
            point = row["true_bits"], row["loss_difference"]
            axes.plot(*point, "D", color=PEER_COLOUR, markersize=4)
            axes.annotate(
                name, point, (7, PEER_NUDGES.get(peer, 0)), textcoords="offset points",
                va="center", fontsize="small", color=PEER_COLOUR,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    axes.set_xlim(1.5, 3.9)
    axes.set_yscale("log")
    axes.set_ylim(0.007, 0.32)
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def print_header(*cells: str) -> None:
    print_cells(*cells)
    print("|---" * len(cells) + "|")


def print_cells(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def print_table(rows: list[dict[str, Any]], models: list[str]) -> None:
    print_header("bits: nominal (true)", *(c for m in models for c in (f"{m}: paper", "best")))
    of = {
        (model, recipe): recipe_points([r for r in rows if r["model"] == model], recipe)
        for model in models
        for recipe in COLOURS
    }
    for i, seeds in enumerate(of[models[0], "best"]):
        cells = [f"{seeds[0]['nominal_bits']:g} ({seeds[0]['true_bits']:.3f})"]
        for model in models:
            for recipe in COLOURS:
                point = of[model, recipe][i]
                mean, error = mean_and_error([row["loss_difference"] for row in point])
                perplexity = statistics.mean(row["perplexity"] for row in point)
                spread = f" ± {2 * error:.4f}" if len(point) > 1 else ""
                cells.append(f"{perplexity:.3f} ({mean:.4f}{spread})")
        print_cells(*cells)


def print_peers(rows: list[dict[str, Any]], models: list[str]) -> None:
    print()
    print_header("quantizer, bits (true)", *models)
    for recipe, name in PEER_NAMES.items():
        of = {(r["nominal_bits"], r["model"]): r for r in rows if r["recipe"] == recipe}
        for bits in sorted({bits for bits, _ in of}):
            points = [of.get((bits, model)) for model in models]
            true = next(point["true_bits"] for point in points if point)
            cells = [f"{p['loss_difference']:.4f}" if p else "" for p in points]
            print_cells(f"{name}, {bits:g} ({true:.2f})", *cells)


def print_allocations(rows: list[dict[str, Any]], models: list[str]) -> None:
    """Widths chosen in several ways, put together from the same compressed experts."""
    found = defaultdict(list)
    for row in rows:
        if row["method"] == "none" or row.get("sequential", True):
            continue
        current = row["method"] in BY_ERRORS and OLD_DEFAULT not in row["changes"]
        if "sequential=" not in row["changes"] and not current:
            found[row["method"], row["model"], row["nominal_bits"]].append(row["loss_difference"])
    columns = [(m, b) for m in models for b in sorted({k[2] for k in found if k[1] == m})]
    print()
    print_header("widths chosen by", *(f"{m}, {b:g} bits" for m, b in columns))
    for method, name in ALLOCATIONS.items():
        losses = [found[method, *column] for column in columns]
        cells = [f"{statistics.mean(values):.4f}" if values else "" for values in losses]
        print_cells(name, *cells)


def print_changes(rows: list[dict[str, Any]]) -> None:
    """The KL divergence of `best` as it was, seed 0, and with one trait changed."""
    rows = [row for row in recipe_rows(rows, "best") if row["seed"] == 0]
    rows = [row for row in rows if OLD_DEFAULT in row["changes"]]
    rows = [row for row in rows if CANNOT_BE_MADE not in row["changes"]]
    found = {
        (r["changes"].replace(OLD_DEFAULT, "").strip(), r["model"], r["nominal_bits"]): r["kl"]
        for r in rows
    }
    columns = sorted({key[1:] for key in found if key[0]})
    print()
    print_header("change", *(f"{m}, {b:g} bits" for m, b in columns))
    for change in sorted({key[0] for key in found}):  # "", nothing changed, comes first
        values = [found.get((change, *column)) for column in columns]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        print_cells(f"`{change}`" if change else "none", *cells)


if __name__ == "__main__":
    main()
