"""Draw what compression costs against true bits from benchmarks/results/quality.jsonl.

python benchmarks/quality/plot.py        writes docs/quality.png, prints the README's tables
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
PEER_COLOUR = "#666666"
OLD_DEFAULT = "error_refinements=0"  # what ablations and most composed widths were measured with
BY_ERRORS = ("recipe", "pmq", "hessian")
PEER_MARKERS = {"hqq": "s", "gptqmodel": "^", "auto-round": "v", "llm-compressor": "D"}
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
    figure = Figure(figsize=(4.2 * len(models), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(panels, models, strict=True):
        draw(axes, [row for row in rows if row["model"] == model])
        axes.set_title(model)
        axes.set_xlabel("true bits per expert weight")
    panels[0].set_ylabel("loss in log-perplexity")
    # Of the panel that shows most: a quantizer may be measured on one model alone.
    fullest = max(panels, key=lambda axes: len(axes.get_legend_handles_labels()[0]))
    panels[-1].legend(*fullest.get_legend_handles_labels(), frameon=False, fontsize="small")
    figure.savefig(ROOT / "docs/quality.png", metadata={"Software": "mcmoe-vllm"})
    print_table(rows, models)
    print_peers(rows, models)
    print_allocations(rows, models)
    print_changes(rows)


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
    for recipe, colour in COLOURS.items():
        points = recipe_points(rows, recipe)
        losses = [mean_and_error([row["loss_difference"] for row in seeds]) for seeds in points]
        axes.errorbar(
            [statistics.mean(row["true_bits"] for row in seeds) for seeds in points],
            [mean for mean, _ in losses],
            yerr=[2 * error for _, error in losses],
            marker="o", markersize=4, capsize=2, color=colour, label=f"--recipe {recipe}",
        )  # fmt: skip
    for peer, marker in PEER_MARKERS.items():
        found = [row for row in rows if row["recipe"] == peer]
        if found:
            axes.plot(
                [row["true_bits"] for row in found], [row["loss_difference"] for row in found],
                marker, color=PEER_COLOUR, markersize=5, label=PEER_NAMES[peer],
            )  # fmt: skip
    axes.set_yscale("log")
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
