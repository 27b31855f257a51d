"""Plans, layers and results as lines and tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcmoe_vllm.checkpoint.sizes import Sizes, size
from mcmoe_vllm.plan import Plan
from mcmoe_vllm.report.plots import DIGIT_COLOURS, WIDTH_COLOURS
from mcmoe_vllm.widths import Pair, average_width, count_matrices, describe_group_sizes, in_words

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def describe_measurement(
    tokens: Sequence[int], frequency: Sequence[float], starved: Sequence[int]
) -> str:
    """One line on a measured layer: tokens and share of all tokens by expert."""
    line = f"used {min(frequency):.3f}..{max(frequency):.3f}, {_least_sampled(tokens)}"
    if starved:
        line += f" | WARNING {len(starved)} experts hardly reached: {list(starved)}"
    return line


def describe_layer(summary: Mapping[str, Any]) -> str:
    """One line on a quantized layer: widths, error, time, memory, least-sampled expert."""
    parts = []
    experts = summary.get("experts")
    if experts:
        parts += [
            f"matrices: {describe_counts(experts['bits'])}",
            f"error {experts['error']:.4f}",
            _least_sampled(experts["tokens"]),
        ]
        if experts["starved"]:
            parts.append(f"WARNING hardly reached: {experts['starved']}")
    else:
        parts.append("no experts")
    parts += [f"{summary['seconds']:.1f} s", f"peak {size(summary['peak_rss_bytes'])}"]
    return " | ".join(parts)


def _least_sampled(tokens: Sequence[int]) -> str:
    least = min(range(len(tokens)), key=tokens.__getitem__)
    return f"least sampled expert {least}: {tokens[least]} tokens"


def describe_counts(pairs: Sequence[Pair]) -> str:
    """'12 of 2 bits, 6 of 3 bits': whole matrices."""
    return ", ".join(f"{n} of {in_words(width)}" for width, n in count_matrices(pairs).items())


def print_plan(plan: Plan, sizes: Sizes) -> None:
    """The allocation table and the expected size, on stderr."""
    from mcmoe_vllm.report.console import Console

    console = Console(stderr=True)
    console.print(widths_table(dict(zip(plan.layers, plan.pairs(), strict=True))))
    console.print(size_lines(plan, sizes))


def widths_table(
    layers: Mapping[int, Sequence[Pair]], last: tuple[str, Mapping[int, str]] | None = None
) -> Table:
    """The widths of every expert by layer, coloured on a terminal, and how many matrices have each.

    last: heading and cells of one more column.
    """
    from rich.table import Table

    pairs = [pair for row in layers.values() for pair in row]
    differ = any(w13 != w2 for w13, w2 in pairs)
    table = Table(title="Width of each expert's matrices", caption="N bits: matrices of that width")
    table.add_column("layer", justify="right", no_wrap=True)
    experts = len(next(iter(layers.values())))
    for group in ("gate and up, ", "down, ") if differ else ("",):
        heading = f"{group}experts 0..{experts - 1}"
        table.add_column(heading, overflow="fold", min_width=min(experts, 8))
    widths = list(count_matrices(pairs))
    for width in widths:
        table.add_column(in_words(width).replace(" ", "\n"), justify="right", no_wrap=True)
    table.add_column("average", justify="right", no_wrap=True)
    if last is not None:
        table.add_column(last[0], justify="right")
    for layer, row in layers.items():
        counts = count_matrices(row)
        columns = list(zip(*row, strict=True))
        table.add_row(
            str(layer),
            *(_digits(column) for column in (columns if differ else columns[:1])),
            *(str(counts.get(width, 0)) for width in widths),
            f"{average_width(row):.3f}",
            *([last[1].get(layer, "")] if last is not None else []),
        )
    return table


def _digits(widths: Sequence[int]) -> Text:
    from rich.text import Text

    text = Text(overflow="fold")
    for width in widths:
        # Black is the terminal's own colour: a dropped expert needs an edge to be seen.
        colour = WIDTH_COLOURS[width] if width else "grey23"
        text.append(str(width), style=f"bold {DIGIT_COLOURS[width]} on {colour}")
    return text


def size_lines(plan: Plan, sizes: Sizes) -> str:
    """Nominal and true bits, the size and the group sizes, a line each."""
    ratio = sizes.original_bytes / sizes.total_bytes
    return (
        f"bits per expert weight: {plan.average_bits():.3f} nominal, "
        f"{sizes.expert_bits:.3f} true (scales and zeros counted); "
        f"whole model {sizes.model_bits:.3f}\n"
        f"size: {size(sizes.original_bytes)} -> {size(sizes.total_bytes)} ({ratio:.2f}x smaller)\n"
        f"group sizes: {describe_group_sizes(plan.group_size)}"
    )


def print_result(result: Mapping[str, Any], output: Path, costs: str | None = None) -> None:
    """What was made, on stderr; costs: a line on what it is expected to cost."""
    from mcmoe_vllm.report.console import Console

    console = Console(stderr=True, soft_wrap=True)
    layers = [layer["experts"] for layer in result["layers"] if "experts" in layer]
    rounding = sum(layer["rounding_kept"] for layer in layers)
    matrices = sum(layer["matrices"] for layer in layers)
    if costs is not None:
        console.print(costs)
    console.print(
        f"rounding to nearest beat GPTQ in {rounding} of {matrices} expert matrices\n"
        f"{result['seconds']:.0f} s, peak memory {size(result['peak_rss_bytes'])}\n"
        f"wrote {output}; serve it with: vllm serve {output} --quantization mcmoe"
    )
