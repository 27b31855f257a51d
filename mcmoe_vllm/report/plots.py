"""Plans and sweeps as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcmoe_vllm.disk import replacing
from mcmoe_vllm.errors import printable
from mcmoe_vllm.plan import Plan
from mcmoe_vllm.widths import Pair, average_width, in_words

# Okabe-Ito colours: told apart by colour-blind readers and in grey.
WIDTH_COLOURS = {
    0: "#000000", 1: "#D55E00", 2: "#E69F00", 3: "#56B4E9", 4: "#0072B2", 5: "#009E73",
    6: "#CC79A7", 7: "#F0E442",
}  # fmt: skip

# Of a digit on them, with a contrast of at least 4.5 to 1.
DIGIT_COLOURS = {w: "white" if w in (0, 4) else "black" for w in WIDTH_COLOURS}
SHIPPED = 4  # the widest format

NUMBERED_EXPERTS = 16  # above this the cells of a panel are too small for digits

# Pages show pictures 800 pixels wide, where 8 inches give 100 to the inch: a letter of 9 points has
# 12 pixels. Twice as many are drawn, for screens that have them.
INCHES, DPI = 8.0, 200

NUMBERED_ROW, MOSAIC_HEIGHT = 0.27, 3.6  # inches


def write_sweep(points: Sequence[tuple[float, float]], path: Path) -> None:
    """Expected KL (nats a token) against average bits as a PNG, whole or not at all."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = _figure(5, 3.4)
    axes = figure.add_subplot()
    bits, nats = zip(*sorted(points), strict=True)
    axes.plot(bits, nats, marker="o", color=WIDTH_COLOURS[4])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("What fewer bits are expected to cost: lower is better", fontsize=10)
    axes.set_xlabel("average bits of the experts' codes")
    axes.set_ylabel("expected KL, nats a token")
    axes.grid(alpha=0.3)
    _save(figure, path)


def write_heatmap(plan: Plan, path: Path) -> None:
    """A plan's widths by layer (rows) and expert (columns) as a PNG, whole or not at all."""
    measured = plan.options.get("significance") or ()
    write_bits_heatmap(
        plan.layers,
        plan.pairs(),
        path,
        Path(plan.model).name,
        [layer["frequency"] for layer in measured] or None,
    )


def write_bits_heatmap(
    layers: Sequence[int],
    pairs: Sequence[Sequence[Pair]],
    path: Path,
    name: str,
    frequency: Sequence[Sequence[float]] | None = None,
) -> None:
    """`draw_widths` as a PNG, whole or not at all."""
    _save(draw_widths(layers, pairs, name, frequency), path)


def draw_widths(
    layers: Sequence[int],
    pairs: Sequence[Sequence[Pair]],
    name: str,
    frequency: Sequence[Sequence[float]] | None = None,
) -> Any:
    """The figure of pairs[row][expert], a row per entry of `layers`: a panel for gate and up and
    one for down, or one for all three where they agree, each with its rows' averages beside it.

    frequency[row][expert]: how often an expert is used; where the cells are too small for digits,
    it orders the experts of each layer.
    """
    columns = len(pairs[0])
    numbered = columns <= NUMBERED_EXPERTS
    sorted_by_use = not numbered and frequency is not None
    if sorted_by_use and frequency is not None:
        pairs = [_by_use(row, uses) for row, uses in zip(pairs, frequency, strict=True)]
    panels = _panels(pairs)
    across = len(panels) if numbered else 1
    down = len(panels) // across
    height = NUMBERED_ROW * len(layers) if numbered else MOSAIC_HEIGHT
    figure = _figure(INCHES, 1.7 + down * (height + 0.75))
    average = average_width(pair for row in pairs for pair in row)
    title = f"{printable(name)}: width of each expert's matrices\n{average:.2f} bits on average"
    figure.suptitle(title, fontsize=12, parse_math=False)
    ratios = [max(columns, 6), max(columns, 6) * 0.16 * across] * across
    grid = figure.add_gridspec(down, 2 * across, width_ratios=ratios)
    for number, (panel, widths) in enumerate(panels.items()):
        row, column = divmod(number, across)
        axes = figure.add_subplot(grid[row, 2 * column])
        _draw_cells(axes, widths, numbered)
        axes.set_title(panel, fontsize=11)
        axes.set_xlabel("experts, most used first" if sorted_by_use else "expert", fontsize=10)
        _label_layers(axes, layers, numbered)
        side = figure.add_subplot(grid[row, 2 * column + 1], sharey=axes)
        _draw_averages(side, [sum(row) / len(row) for row in widths], numbered)
    _draw_legend(figure, sorted({w for widths in panels.values() for row in widths for w in row}))
    return figure


def _by_use(row: Sequence[Pair], uses: Sequence[float]) -> list[Pair]:
    return [row[e] for e in sorted(range(len(row)), key=lambda e: -uses[e])]


def _panels(pairs: Sequence[Sequence[Pair]]) -> dict[str, list[list[int]]]:
    """Title -> widths by row and expert."""
    gate_and_up, down = ([[pair[side] for pair in row] for row in pairs] for side in (0, 1))
    if gate_and_up == down:
        return {"gate, up and down": down}
    return {"gate and up": gate_and_up, "down": down}


def _draw_cells(axes: Any, widths: list[list[int]], numbered: bool) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    rows, columns = len(widths), len(widths[0])
    colours = ListedColormap([WIDTH_COLOURS[w] for w in sorted(WIDTH_COLOURS)])
    edges = [w - 0.5 for w in range(len(WIDTH_COLOURS) + 1)]
    norm = BoundaryNorm(edges, len(WIDTH_COLOURS))
    axes.imshow(widths, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axes.tick_params(labelsize=9)
    if not numbered:
        return
    axes.set_xticks(range(0, columns, 1 + columns // 10))
    axes.set_xticks([c - 0.5 for c in range(1, columns)], minor=True)
    axes.set_yticks([r - 0.5 for r in range(1, rows)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    for row, line in enumerate(widths):
        for expert, w in enumerate(line):
            place = {"ha": "center", "va": "center_baseline", "fontsize": 10, "weight": "bold"}
            axes.text(expert, row, str(w), color=DIGIT_COLOURS[w], **place)


def _label_layers(axes: Any, layers: Sequence[int], numbered: bool) -> None:
    step = 1 if numbered else -(-len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), [str(i) for i in layers[::step]])
    axes.set_ylabel("layer", fontsize=10)


def _draw_averages(axes: Any, averages: Sequence[float], numbered: bool) -> None:
    """Beside a panel: a bar for each row's average, with its number where there is room."""
    axes.barh(range(len(averages)), averages, height=0.8 if numbered else 1.0, color="#BBBBBB")
    widest = max(SHIPPED, math.ceil(max(averages)))
    axes.set_xlim(0, widest)
    axes.set_xlabel("average", fontsize=10)
    axes.tick_params(axis="y", which="both", left=False, labelleft=False)
    axes.spines[["top", "right"]].set_visible(False)
    if numbered:
        axes.set_xticks([])
        for row, average in enumerate(averages):
            axes.text(0.15, row, f"{average:.2f}", va="center_baseline", fontsize=9)
    else:
        axes.set_xticks(range(widest + 1))
        axes.tick_params(axis="x", labelsize=9)
        axes.grid(axis="x", color="white", linewidth=1)


def _draw_legend(figure: Any, widths: Sequence[int]) -> None:
    from matplotlib.patches import Patch

    labels = [in_words(w) if w else "dropped (0 bits)" for w in widths]
    figure.legend(
        handles=[
            Patch(color=WIDTH_COLOURS[w], label=label)
            for w, label in zip(widths, labels, strict=True)
        ],
        loc="outside lower center",
        ncols=len(widths),
        frameon=False,
        fontsize=10,
    )


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": "mcmoe-vllm"})
