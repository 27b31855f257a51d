"""Widths from measurements: the plan of a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch

from mcmoe_vllm.allocate.budget import Scope, budget_for_bits, parse_pins
from mcmoe_vllm.allocate.factors import Factors, expert_costs
from mcmoe_vllm.allocate.pmq import Allocation, allocate_bits, uniform_allocation
from mcmoe_vllm.allocate.projections import allocate_projections, projection_costs
from mcmoe_vllm.compress.measure import measure_layers
from mcmoe_vllm.compress.options import RESULT_FIELDS, QuantizeOptions, named_traits
from mcmoe_vllm.compress.significance import LayerSignificance
from mcmoe_vllm.compress.workdirectory import WorkDirectory
from mcmoe_vllm.disk import explain_os_errors, read_json, write_json
from mcmoe_vllm.model.moe_model import MoeModel
from mcmoe_vllm.plan import Plan
from mcmoe_vllm.recipes import Recipe
from mcmoe_vllm.report.progress import Progress


def require_budget(options: QuantizeOptions, layers: Sequence[int], num_experts: int) -> None:
    """The allocation must be possible before hours are spent on measuring it.

    layers: decoder layers with experts. Raises UserError for pins or bits that leave no choice.
    """
    candidates = sorted(options.traits.candidate_bits)
    pins = parse_pins(options.pins, layers, num_experts, candidates)
    if options.is_uniform:
        return
    shape = (len(layers), num_experts, len(candidates))
    if options.traits.allocation == "pmq":
        _allocate_experts(np.zeros(shape), options, candidates, pins)
    else:
        costs, widths = projection_costs(np.zeros((*shape, 2)), np.zeros(shape[0]), candidates)
        scope = _scope(options.traits)
        allocate_projections(
            costs, widths, options.bits, options.group_sizes, scope=scope, pins=pins
        )


def measure_and_choose(
    options: QuantizeOptions,
    model: MoeModel,
    windows: torch.Tensor,
    work: WorkDirectory,
    progress: Progress,
) -> Plan:
    """The plan of a job, kept in its work directory. windows: calibration tokens [S, L]."""
    plan_file = work.path / "plan.json"
    if plan_file.exists():
        return Plan.from_dict(read_json(plan_file), str(plan_file))
    candidates = sorted(options.traits.candidate_bits)
    measured = measure_layers(
        model,
        windows,
        [] if options.is_uniform else candidates,
        options.group_sizes,
        options.traits,
        work,
        progress,
    )
    bits, w2_bits, solver, objective = _choose(options, measured, model.num_experts)
    result = Plan(
        model=options.model,
        architecture=model.name,
        layers=tuple(model.moe_layers),
        bits=bits,
        w2_bits=w2_bits,
        candidate_bits=tuple(candidates),
        group_size=options.group_sizes,
        dense_bits=options.dense_bits,
        nominal_bits=options.bits,
        options={
            **{name: getattr(options, name) for name in RESULT_FIELDS if name != "bits"},
            **named_traits(options.traits),
            "sequence_length": windows.shape[1],
            "solver": solver,
            "objective": objective,
            "significance": [asdict(m) for m in measured],
        },
    )
    with explain_os_errors(f"writing {plan_file}"):
        write_json(plan_file, result.to_dict())
    # As read back, so that a resumed job and this one hold the same values.
    return Plan.from_dict(read_json(plan_file), str(plan_file))


Rows = tuple[tuple[int, ...], ...]  # a width for each expert of each layer


def _choose(
    options: QuantizeOptions, measured: Sequence[LayerSignificance], num_experts: int
) -> tuple[Rows, Rows, str, float]:
    """Widths of w13, of w2 (empty where they are the same), the solver's name and the objective."""
    traits, layers = options.traits, [m.layer for m in measured]
    candidates = sorted(traits.candidate_bits)
    pins = parse_pins(options.pins, layers, num_experts, candidates)
    if options.is_uniform:
        costs = np.zeros((len(measured), num_experts, len(candidates)))
        chosen = uniform_allocation(costs, candidates, options.bits)
    elif traits.allocation == "sensitivity":
        w13, w2, objective = allocate_sensitivity(
            measured, candidates, options.bits, options.group_sizes, traits, pins
        )
        return w13, w2, "knapsack", objective
    else:
        factors = Factors(
            frequency=np.array([m.frequency for m in measured]),
            routing_weight=np.array([m.routing_weight for m in measured]),
            reconstruction_error=np.array([m.reconstruction_error for m in measured]),
            candidate_bits=tuple(candidates),
            layers=tuple(layers),
        )
        costs = expert_costs(factors, alpha=traits.alpha, beta=traits.beta, gamma=traits.gamma)
        chosen = _allocate_experts(costs, options, candidates, pins)
    return chosen.bits, (), chosen.solver, chosen.objective


def allocate_sensitivity(
    measured: Sequence[LayerSignificance],
    candidates: Sequence[int],
    bits: float,
    group_size: Mapping[str, int],
    recipe: Recipe,
    pins: Mapping[tuple[int, int], int] | None = None,
) -> tuple[Rows, Rows, float]:
    """Widths of w13 and of w2, a row for every layer of experts, and the KL in nats that they are
    expected to cost."""
    costs, widths = projection_costs(
        np.array([m.projection_errors for m in measured]),
        np.array([m.sensitivity for m in measured]),
        candidates,
    )
    pairs, objective = allocate_projections(
        costs, widths, bits, group_size, scope=_scope(recipe), pins=pins
    )
    w13, w2 = (tuple(tuple(pair[i] for pair in row) for row in pairs) for i in (0, 1))
    return w13, w2, objective


def _allocate_experts(
    costs: np.ndarray,
    options: QuantizeOptions,
    candidates: Sequence[int],
    pins: Mapping[tuple[int, int], int],
) -> Allocation:
    """PMQ's integer program over costs [L, E, B]."""
    scope = _scope(options.traits)
    num_layers, num_experts, _ = costs.shape
    budget, floors = budget_for_bits(options.bits, num_experts, num_layers, candidates, scope)
    return allocate_bits(
        costs,
        candidates,
        scope=scope,
        **{f"{'total' if scope == 'global' else 'layer'}_budget": budget},  # type: ignore[arg-type]
        pins=pins,
        floors=floors,
    )


def _scope(recipe: Recipe) -> Scope:
    return "global" if recipe.scope == "global" else "layer"
