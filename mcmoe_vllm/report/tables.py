"""Plans, layers and results as lines and tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcmoe_vllm.checkpoint.sizes import Sizes, size
from mcmoe_vllm.compress.expected_loss import describe_costs
from mcmoe_vllm.inspection import DENSE_WIDTH, Inspection
from mcmoe_vllm.plan import Plan
from mcmoe_vllm.pruning.table import read_table
from mcmoe_vllm.report.plots import WIDTH_COLOURS

if TYPE_CHECKING:
    from mcmoe_vllm.compress.significance import LayerSignificance


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


def print_inspection(inspection: Inspection) -> None:
    """The result on stdout: totals, then the widths of every layer, coloured on a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    i = inspection
    console = Console(highlight=False)
    dense = "int4" if i.config.dense_bits == DENSE_WIDTH else "16 bits"
    nominal = i.config.average_bits.get("nominal")
    target = "" if nominal is None else f" (asked for {nominal:g})"
    lines = [
        f"{i.path}",
        f"{i.architecture}: {len(i.layers)} layers x {i.num_experts} experts, "
        f"{i.parameters:,} parameters, format version {i.config.format_version}",
        f"bits per expert weight: {i.code_bits:.3f} nominal{target}, {i.expert_bits:.3f} true "
        f"(scales and zeros counted); whole model {i.model_bits:.3f}",
        f"size: {size(i.total_bytes)} in {i.num_shards} shards: experts "
        f"{size(i.expert_bytes)}, dense linears in int4 {size(i.dense_bytes)}, "
        f"the rest in 16 bits {size(i.other_bytes)}",
        f"group size: {', '.join(f'{k} {v}' for k, v in i.config.group_size.items())}; "
        f"attention and shared experts: {dense}",
    ]
    pruning = read_table(i.config)
    ratios = {} if pruning is None else pruning.layer_ratios()
    if pruning is not None:
        lines.append(
            f"online pruning: {pruning.target_drop:.1%} of expert activations, rule "
            f"{pruning.rule}; calibrated up to {max(pruning.ratios):.1%}"
        )
    console.print("\n".join(lines), markup=False, soft_wrap=True)

    def heatmap(widths: tuple[int, ...]) -> Text:
        text = Text(overflow="fold")
        for b in widths:
            # Black is the terminal's own colour: a dropped expert needs an edge to be seen.
            colour = "grey23" if b == 0 else WIDTH_COLOURS[b]
            text.append(str(b), style=f"bold {'black' if b in (2, 3) else 'white'} on {colour}")
        return text

    differ = any(w13 != w2 for w13, w2 in i.bits.values())
    used = sorted({b for w13, w2 in i.bits.values() for b in (*w13, *w2)})
    table = Table()
    table.add_column("layer", justify="right")
    for name in ("w13 ", "w2 ") if differ else ("",):
        table.add_column(f"{name}experts 0..{i.num_experts - 1}", overflow="fold")
    for b in used:
        table.add_column(f"{b}-bit", justify="right")
    table.add_column("average", justify="right")
    if pruning is not None:
        table.add_column("drop below", justify="right")
    for layer, (w13, w2) in i.bits.items():
        counts = Counter(w13) + Counter(w2)  # half an expert each
        table.add_row(
            str(layer),
            *(heatmap(widths) for widths in ((w13, w2) if differ else (w13,))),
            *(f"{counts[b] / 2:g}" for b in used),
            f"{(2 * sum(w13) + sum(w2)) / (3 * len(w13)):.3f}",
            *([f"{ratios.get(layer, 0.0):.3f}"] if pruning is not None else []),
        )
    console.print(table)
