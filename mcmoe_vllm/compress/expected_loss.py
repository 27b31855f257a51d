"""Where a plan's loss is expected: which layers, experts and projections cost most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mcmoe_vllm.plan import Plan

PROJECTIONS = ("w13", "w2")
LISTED = 20  # of the costliest matrices, in report.json


@dataclass(frozen=True)
class Cost:
    """What one matrix is expected to cost at its width: KL to the 16-bit model, nats a token."""

    layer: int
    expert: int
    projection: str
    bits: int
    nats: float


def matrix_costs(plan: Plan) -> list[Cost]:
    """The cost of every expert's w13 and w2, in order; empty if the plan holds no KL (recipe
    "paper", uniform widths, an allocation made elsewhere)."""
    costs = []
    for measured, row in zip(plan.options.get("significance", ()), plan.pairs(), strict=False):
        if measured.get("sensitivity") is None:
            return []
        for expert, widths in enumerate(row):
            for number, (projection, bits) in enumerate(zip(PROJECTIONS, widths, strict=True)):
                candidate = plan.candidate_bits.index(bits)
                change = measured["projection_errors"][expert][candidate][number]
                nats = measured["sensitivity"] * change**2
                costs.append(Cost(measured["layer"], expert, projection, bits, nats))
    return costs


def summarize_costs(costs: Sequence[Cost]) -> dict[str, Any] | None:
    """What report.json says of them; None if there are none or they cost nothing.

    nats: their sum, which finetuning has not lessened yet; layers, projections: shares of it,
    largest first; matrices: the costliest.
    """
    total = sum(cost.nats for cost in costs)
    if total <= 0:
        return None
    by_layer: dict[int, float] = defaultdict(float)
    by_projection: dict[str, float] = defaultdict(float)
    for cost in costs:
        by_layer[cost.layer] += cost.nats
        by_projection[cost.projection] += cost.nats
    return {
        "nats": total,
        "layers": [
            {"layer": layer, "share": nats / total} for layer, nats in _largest_first(by_layer)
        ],
        "projections": {name: nats / total for name, nats in _largest_first(by_projection)},
        "matrices": [asdict(c) for c in sorted(costs, key=lambda c: c.nats, reverse=True)[:LISTED]],
    }


def describe_costs(summary: Mapping[str, Any]) -> str:
    """One line for people."""
    layers = ", ".join(f"{e['layer']} ({e['share']:.0%})" for e in summary["layers"][:3])
    first = summary["matrices"][0]
    return (
        f"expected KL of the experts {summary['nats']:.4f} nats a token; costliest layers "
        f"{layers}; costliest matrix {first['projection']} of expert {first['expert']} in layer "
        f"{first['layer']} ({first['bits']}-bit, {first['nats'] / summary['nats']:.0%})"
    )


def _largest_first(shares: Mapping[Any, float]) -> list[tuple[Any, float]]:
    return sorted(shares.items(), key=lambda item: item[1], reverse=True)
