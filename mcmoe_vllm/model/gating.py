"""How experts combine gate and up, measured on transformers' own function: no flag of a class is
believed, as several versions lack them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mcmoe_kernels.activations import Activation as Formula
from mcmoe_kernels.activations import activate
from mcmoe_vllm.model.experts import Activation, gated, interleave

BEYOND = 1e4  # every limit that is one
DIGITS = 6  # of what is measured, in float64


@dataclass(frozen=True)
class Gating:
    """interleaved: whether gate and up lie in pairs of rows, else all gates lie above all ups;
    formula: None for f(gate) * up with any f, as most families have it."""

    interleaved: bool = False
    formula: Formula | None = None

    def __str__(self) -> str:
        f = self.formula
        if f is None:
            return "no limit"
        limit = "no limit" if f.limit is None else f"limit {f.limit:g}"
        return f"{limit}, alpha {f.alpha:g} and {f.up_offset:g} added to up"


def measure_gating(experts: Any) -> Gating | None:
    """What a module of transformers does with gate and up; None for what no formula describes."""
    function = _function_of(experts)
    interleaved = next((i for i in (False, True) if _takes_pairs(function, i)), None)
    if interleaved is None:
        return None

    def at(gate: float, up: float) -> float:
        rows = torch.tensor([[gate, gate, up, up]], dtype=torch.float64)
        return float(function(interleave(rows, 1) if interleaved else rows)[0, 0])

    slope = at(0.5, 0.5) * 2 - at(0.5, 0) * 2  # f(0.5)
    if not slope:
        return None
    offset = at(0.5, 0) / slope
    limit = at(0.5, BEYOND) / slope - offset
    if math.isclose(limit, BEYOND) and abs(offset) < 10**-DIGITS:
        return Gating(interleaved)
    if not (0 < slope < 0.5 and limit > 0):  # f is no gate * sigmoid(alpha * gate)
        return None
    formula = Formula(
        "silu",
        limit=None if math.isclose(limit, BEYOND) else round(limit, DIGITS),
        alpha=round(2 * math.log(slope / (0.5 - slope)), DIGITS),
        up_offset=round(offset, DIGITS),
    )
    return Gating(interleaved, formula) if _describes(formula, at) else None


def activation_of(experts: Any, gating: Gating) -> Activation:
    """What lies between the projections of a module's experts, of gates above ups [T, 2I] whatever
    the module's own order is."""
    function = _function_of(experts)
    if not gating.interleaved:
        return function
    return lambda gate_up: function(interleave(gate_up, -1))


def _function_of(experts: Any) -> Activation:
    own: Activation | None = getattr(experts, "_apply_gate", None)
    return gated(experts.act_fn) if own is None else own


def _takes_pairs(function: Activation, interleaved: bool) -> bool:
    """Whether a function takes gates and ups that lie thus: the order of pairs must not matter to
    it, and it must be linear in up alone."""
    generator = torch.Generator().manual_seed(0)
    gate, up, other = 2 * torch.rand(3, 1, 16, generator=generator, dtype=torch.float64) - 1
    order = torch.randperm(16, generator=generator)

    def run(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([gate, up], 1)
        return function(interleave(rows, 1) if interleaved else rows)

    first = run(gate, up)
    if first.shape != gate.shape:
        return False
    in_order = torch.allclose(run(gate[:, order], up[:, order]), first[:, order])
    is_linear = torch.allclose(run(gate, (up + other) / 2), (first + run(gate, other)) / 2)
    return in_order and is_linear


def _describes(formula: Formula, at: Callable[[float, float], float]) -> bool:
    """Whether a function of a gate and an up is the formula's, within its limit and beyond."""
    far = (formula.limit or 2.0) * torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)
    pairs = torch.cartesian_prod(far, far)
    expected = activate(pairs, formula).flatten().tolist()
    found = (at(gate, up) for gate, up in pairs.tolist())
    return all(
        math.isclose(*both, rel_tol=1e-4, abs_tol=1e-9)
        for both in zip(found, expected, strict=True)
    )
