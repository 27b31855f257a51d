"""Widths from measurements: the plan of a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from mcmoe_vllm.allocate.budget import Scope, budget_for_bits, parse_pins
from mcmoe_vllm.allocate.factors import Factors, expert_costs
from mcmoe_vllm.allocate.pmq import Allocation, allocate_bits, uniform_allocation
from mcmoe_vllm.allocate.projections import allocate_projections, projection_costs
from mcmoe_vllm.compress.measure import measure_layers
from mcmoe_vllm.compress.options import RESULT_FIELDS, named_traits
from mcmoe_vllm.compress.recipes import Recipe
from mcmoe_vllm.compress.significance import LayerSignificance
from mcmoe_vllm.compress.workdirectory import WorkDirectory
from mcmoe_vllm.disk import explain_os_errors, read_json, write_json
from mcmoe_vllm.plan import Plan

if TYPE_CHECKING:
    from mcmoe_vllm.compress.job import Job


def require_budget(job: Job) -> None:
    """The allocation must be possible before hours are spent on measuring it."""
    options = job.options
    if options.is_uniform:
        return
    candidates = sorted(options.traits.candidate_bits)
    shape = (len(job.moe_layers), job.num_experts, len(candidates))
    if options.traits.allocation == "pmq":
        allocate_pmq(job, np.zeros(shape), candidates)
    else:
        pins = parse_pins(options.pins, job.moe_layers, job.num_experts, candidates)
        costs, widths = projection_costs(np.zeros((*shape, 2)), np.zeros(shape[0]), candidates)
        scope = _scope(options.traits)
        allocate_projections(
            costs, widths, options.bits, options.group_size, scope=scope, pins=pins
        )


def _scope(recipe: Recipe) -> Scope:
    return "global" if recipe.scope == "global" else "layer"


def measure_and_allocate(job: Job, work: WorkDirectory) -> Plan:
    plan_file = work.path / "plan.json"
    if plan_file.exists():
        return Plan.from_dict(read_json(plan_file), str(plan_file))
    options = job.options
    candidates = sorted(options.traits.candidate_bits)
    measured = measure_layers(job, work, [] if options.is_uniform else candidates)
    factors = Factors(
        frequency=np.array([m.frequency for m in measured]),
        routing_weight=np.array([m.routing_weight for m in measured]),
        reconstruction_error=np.array([m.reconstruction_error for m in measured]),
        candidate_bits=tuple(candidates),
        layers=tuple(job.moe_layers),
    )
    traits = options.traits
    w2_bits: tuple[tuple[int, ...], ...] = ()
    if options.is_uniform:
        costs = np.zeros((len(measured), job.num_experts, len(candidates)))
        chosen = uniform_allocation(costs, candidates, options.bits)
        bits, solver, objective = chosen.bits, chosen.solver, chosen.objective
    elif traits.allocation == "sensitivity":
        pins = parse_pins(options.pins, job.moe_layers, job.num_experts, candidates)
        bits, w2_bits, objective = allocate_sensitivity(
            measured, candidates, options.bits, options.group_size, traits, pins
        )
        solver = "knapsack"
    else:
        costs = expert_costs(factors, alpha=traits.alpha, beta=traits.beta, gamma=traits.gamma)
        chosen = allocate_pmq(job, costs, candidates)
        bits, solver, objective = chosen.bits, chosen.solver, chosen.objective
    result = Plan(
        model=options.model,
        architecture=job.architecture.name,
        layers=tuple(job.moe_layers),
        bits=bits,
        w2_bits=w2_bits,
        candidate_bits=tuple(candidates),
        group_size=options.group_size,
        dense_bits=options.dense_bits,
        nominal_bits=options.bits,
        options={
            **{name: getattr(options, name) for name in RESULT_FIELDS if name != "bits"},
            **named_traits(options.traits),
            "sequence_length": job.windows.shape[1],
            "solver": solver,
            "objective": objective,
            "significance": [asdict(m) for m in measured],
        },
    )
    with explain_os_errors(f"writing {plan_file}"):
        write_json(plan_file, result.to_dict())
    # As read back, so that a resumed job and this one hold the same values.
    return Plan.from_dict(read_json(plan_file), str(plan_file))


def allocate_sensitivity(
    measured: Sequence[LayerSignificance],
    candidates: Sequence[int],
    bits: float,
    group_size: int,
    recipe: Recipe,
    pins: Mapping[tuple[int, int], int] | None = None,
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...], float]:
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


def allocate_pmq(job: Job, costs: np.ndarray, candidates: Sequence[int]) -> Allocation:
    options = job.options
    scope = _scope(options.traits)
    budget, floors = budget_for_bits(
        options.bits, job.num_experts, len(job.moe_layers), candidates, scope
    )
    return allocate_bits(
        costs,
        candidates,
        scope=scope,
        **{f"{'total' if scope == 'global' else 'layer'}_budget": budget},  # type: ignore[arg-type]
        pins=parse_pins(options.pins, job.moe_layers, job.num_experts, candidates),
        floors=floors,
    )
