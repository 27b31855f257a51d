"""What people see: progress, tables, the heatmap and the model card. Talk goes to stderr."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcmoe_vllm.config import Plan
from mcmoe_vllm.sensitivity import describe_costs

if TYPE_CHECKING:
    from mcmoe_vllm.significance import LayerSignificance

# Okabe-Ito colours: told apart by colour-blind readers and in grey.
WIDTH_COLOURS = {0: "#000000", 1: "#D55E00", 2: "#E69F00", 3: "#56B4E9", 4: "#0072B2"}
NUMBERED_EXPERTS = 16  # above this the heatmap's cells are too small for digits


@dataclass(frozen=True)
class Sizes:
    """Bytes and parameters before and after; scales and zeros are counted."""

    original_bytes: int
    expert_bytes: int
    other_bytes: int
    expert_parameters: int
    parameters: int

    @property
    def total_bytes(self) -> int:
        return self.expert_bytes + self.other_bytes

    @property
    def expert_bits(self) -> float:
        """True bits per routed expert weight."""
        return 8 * self.expert_bytes / self.expert_parameters

    @property
    def model_bits(self) -> float:
        """True bits per weight of the whole model."""
        return 8 * self.total_bytes / self.parameters


class Progress:
    """One line per layer on stderr, below them a bar with the remaining time on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task: Any = None
        self._phase, self._total, self._done, self._first = "", 0, 0, 0
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        self._console.print(message, markup=False)

    def start(self, phase: str, total: int, done: int) -> None:
        """Begin a phase of `total` layers of which `done` were finished before."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._phase, self._total, self._done, self._first = phase, total, done, done
        self._began = time.monotonic()
        self._task = self._bar.add_task(phase, total=total, completed=done)
        if done:
            self.say(f"{phase}: resuming at layer {done + 1} of {total}")

    def layer_done(self, index: int, message: str) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        pace = (time.monotonic() - self._began) / (self._done - self._first)
        eta = time.strftime("%H:%M:%S", time.gmtime(pace * (self._total - self._done)))
        self.say(f"{self._phase} layer {index + 1}/{self._total}: {message} | ETA {eta}")


def describe_measurement(measured: LayerSignificance) -> str:
    """One line on a measured layer."""
    least = min(range(len(measured.tokens)), key=measured.tokens.__getitem__)
    line = (
        f"used {min(measured.frequency):.3f}..{max(measured.frequency):.3f}, "
        f"least sampled expert {least}: {measured.tokens[least]} tokens"
    )
    if measured.starved:
        line += f" | WARNING {len(measured.starved)} experts hardly reached: {measured.starved}"
    return line


def describe_layer(summary: Mapping[str, Any]) -> str:
    """One line on a quantized layer: widths, error, time, memory, least-sampled expert."""
    parts = []
    experts = summary.get("experts")
    if experts:
        counts = Counter(b for w13, w2 in experts["bits"] for b in (w13, w13, w2))
        widths = " ".join(f"{counts[b]}x{b}" for b in sorted(counts))
        tokens = experts["tokens"]
        least = min(range(len(tokens)), key=tokens.__getitem__)
        parts += [
            f"matrices x bits {widths}",
            f"error {experts['error']:.4f}",
            f"least sampled expert {least}: {tokens[least]} tokens",
        ]
        if experts["starved"]:
            parts.append(f"WARNING hardly reached: {experts['starved']}")
    else:
        parts.append("dense layer")
    parts += [f"{summary['seconds']:.1f} s", f"peak {size(summary['peak_rss_bytes'])}"]
    return " | ".join(parts)


def print_plan(plan: Plan, sizes: Sizes) -> None:
    """The allocation table and the expected size, on stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Bits per expert ({plan.architecture})")
    table.add_column("layer", justify="right")
    second = " (w13, w2)" if plan.w2_bits else ""
    table.add_column(f"experts 0..{plan.num_experts - 1}{second}", overflow="fold")
    for bits in plan.candidate_bits:
        table.add_column(f"{bits}-bit", justify="right")
    table.add_column("average", justify="right")
    for layer, pairs in zip(plan.layers, plan.pairs(), strict=True):
        counts = Counter(b for w13, w2 in pairs for b in (w13, w13, w2))
        lines = ["".join(map(str, row)) for row in zip(*pairs, strict=True)]
        table.add_row(
            str(layer),
            "\n".join(dict.fromkeys(lines)),
            *(f"{counts[b] / 3:.3g}" for b in plan.candidate_bits),
            f"{sum(2 * w13 + w2 for w13, w2 in pairs) / (3 * len(pairs)):.3f}",
        )
    console = Console(stderr=True, highlight=False)
    console.print(table)
    console.print(size_lines(plan, sizes), markup=False)


def size_lines(plan: Plan, sizes: Sizes) -> str:
    """Nominal and true bits, and the size, in two lines."""
    ratio = sizes.original_bytes / sizes.total_bytes
    return (
        f"bits per expert weight: {plan.average_bits():.3f} nominal, "
        f"{sizes.expert_bits:.3f} true (scales and zeros counted); "
        f"whole model {sizes.model_bits:.3f}\n"
        f"size: {size(sizes.original_bytes)} -> {size(sizes.total_bytes)} ({ratio:.2f}x smaller)"
    )


def print_result(result: Mapping[str, Any], output: Path) -> None:
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    layers = [layer["experts"] for layer in result["layers"] if "experts" in layer]
    rounding = sum(layer["rounding_kept"] for layer in layers)
    matrices = sum(layer["matrices"] for layer in layers)
    if result["sensitivity"] is not None:
        console.print(describe_costs(result["sensitivity"]), markup=False)
    console.print(
        f"rounding to nearest beat GPTQ in {rounding} of {matrices} expert matrices\n"
        f"{result['seconds']:.0f} s, peak memory {size(result['peak_rss_bytes'])}\n"
        f"wrote {output}; serve it with: vllm serve {output} --quantization mcmoe",
        markup=False,
    )


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


def write_model_card(
    folder: Path, result: Mapping[str, Any], plan: Plan, sizes: Sizes, has_licence: bool
) -> None:
    """README.md of the checkpoint, with the metadata that the Hub reads."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=plan.model if "/" in plan.model and not plan.model.startswith("/") else None,
        base_model_relation="quantized",
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=["mcmoe", "vllm", "moe", "quantized"],
        license="other" if has_licence else None,
        license_link="LICENSE" if has_licence else None,
    )
    counts = Counter(b for row in plan.pairs() for w13, w2 in row for b in (w13, w13, w2))
    widths = "\n".join(f"| {b} | {counts[b]} |" for b in sorted(counts))
    calibration = result["calibration"]
    name = Path(plan.model).name
    starved = result["starved_experts"]
    starved_line = (
        "Experts that calibration hardly reached (fewer than 256 tokens): "
        + "; ".join(f"layer {layer}: {experts}" for layer, experts in starved.items())
        if starved
        else "Calibration reached every expert."
    )
    content = f"""---
{data.to_yaml()}
---

# {name}, {plan.average_bits():.2f} bits per expert weight

Compressed with [mcmoe-vllm](https://arxiv.org/abs/2410.06270) {result["mcmoe_version"]}: every
expert has a width of its own, chosen by an integer program over its measured importance.

```
pip install "mcmoe-vllm[vllm]"
vllm serve {name}-mcmoe
```

| | original | this checkpoint |
|---|---|---|
| bytes | {result["bytes"]["original"]:,} | {result["bytes"]["compressed"]:,} |
| bits per expert weight, scales and zeros counted | 16 | {sizes.expert_bits:.3f} |
| bits per weight of the whole model | 16 | {sizes.model_bits:.3f} |

| bits | expert matrices |
|---|---|
{widths}

![bits by layer and expert](allocation.png)

Attention (and shared experts): {plan.dense_bits} bits. Router gates, norms, embeddings and the
head: 16 bits. Calibration: {calibration["samples"]} windows of {calibration["sequence_length"]}
tokens of {Path(calibration["source"]).name}, seed {calibration["seed"]}. {starved_line}
plan.json and report.json hold every decision and error.
"""
    ModelCard(content).save(folder / "README.md")


def size(nbytes: float) -> str:
    """12345678 -> '11.8 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def some(offenders: Sequence[str], most: int = 20) -> str:
    """A list of offenders, one a line, the rest counted."""
    shown = [f"\n  - {line}" for line in offenders[:most]]
    if len(offenders) > most:
        shown.append(f"\n  - and {len(offenders) - most} more")
    return "".join(shown)
