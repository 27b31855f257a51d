"""Plans and sweeps as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mcmoe_vllm.plan import Plan

# Okabe-Ito colours: told apart by colour-blind readers and in grey.
WIDTH_COLOURS = {0: "#000000", 1: "#D55E00", 2: "#E69F00", 3: "#56B4E9", 4: "#0072B2"}


NUMBERED_EXPERTS = 16  # above this the heatmap's cells are too small for digits


def write_sweep(points: Sequence[tuple[float, float]], path: Path) -> None:
    """Expected KL (nats a token) against average bits as a PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bits, nats = zip(*sorted(points), strict=True)
    axes.plot(bits, nats, marker="o", color=WIDTH_COLOURS[4])
    axes.set_yscale("log")
    axes.set_xlabel("average bits of the experts' codes")
    axes.set_ylabel("expected KL, nats a token")
    axes.grid(alpha=0.3, which="both")
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", metadata={"Software": "mcmoe-vllm"})
    partial.replace(path)


def write_heatmap(plan: Plan, path: Path) -> None:
    """Widths by layer (rows) and expert (columns) as a PNG."""
    write_bits_heatmap(plan.layers, plan.bits, path)


def write_bits_heatmap(layers: Sequence[int], bits: Sequence[Sequence[int]], path: Path) -> None:
    """bits[row][expert] as a PNG, a row per entry of `layers`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows, columns = len(bits), len(bits[0])
    width, height = 2.5 + min(14.0, 0.36 * columns), 1.4 + min(16.0, 0.30 * rows)
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = ListedColormap([WIDTH_COLOURS[b] for b in sorted(WIDTH_COLOURS)])
    axes.imshow(
        bits, cmap=colours, norm=BoundaryNorm([b - 0.5 for b in range(6)], 5), aspect="auto"
    )
    if columns <= NUMBERED_EXPERTS:
        for row, widths in enumerate(bits):
            for expert, b in enumerate(widths):
                axes.text(
                    expert, row, str(b), ha="center", va="center", color="white", weight="bold"
                )
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    step = max(1, rows // 32)
    axes.set_yticks(range(0, rows, step), [str(layers[r]) for r in range(0, rows, step)])
    used = sorted({b for row in bits for b in row})
    axes.legend(
        handles=[Patch(color=WIDTH_COLOURS[b], label=f"{b} bit") for b in used],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
    )
    figure.savefig(path, format="png", metadata={"Software": "mcmoe-vllm"})
