"""What calibration measured about every expert, and the cost that follows (PMQ, Eq. 4)."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mcmoe_vllm.allocate.budget import candidate_problems
from mcmoe_vllm.disk import read_json
from mcmoe_vllm.errors import UserError, some


@dataclass(frozen=True, eq=False)
class Factors:
    """What calibration measured about every expert (PMQ section 3.2).

    frequency             [L, E]     times the expert was selected, any unit
    routing_weight        [L, E]     sum of its routing scores, any unit
    reconstruction_error  [L, E, B]  output error with the expert at candidate_bits[k]
    candidate_bits        [B]        ascending widths in bits, out of 0..4
    layers                [L]        decoder layer index of each row
    """

    frequency: np.ndarray
    routing_weight: np.ndarray
    reconstruction_error: np.ndarray
    candidate_bits: tuple[int, ...]
    layers: tuple[int, ...]


def read_factors(path: str | os.PathLike[str]) -> Factors:
    """Read and validate a factors JSON file.

    The object has the fields of `Factors` as nested lists; `layers` may be absent (0..L-1),
    candidate_bits may come in any order (the errors are reordered with them), further keys are
    ignored. Raises UserError that lists every missing key, wrong shape and wrong value.
    """
    data = read_json(path, finite=False)  # all offenders are listed below
    if not isinstance(data, dict):
        raise UserError(
            f"{path} holds a JSON {type(data).__name__}, not the object of a factors file"
        )
    problems: list[str] = []
    required = ("frequency", "routing_weight", "reconstruction_error", "candidate_bits")
    problems += [f"{key}: missing" for key in required if key not in data]

    num_layers, num_experts = _leading_shape(data)
    bits = data.get("candidate_bits", [])
    bits_problems = candidate_problems(bits)
    num_bits = len(bits) if isinstance(bits, list) and bits else None
    if "candidate_bits" in data:
        problems += bits_problems
    shapes = {
        "frequency": (num_layers, num_experts),
        "routing_weight": (num_layers, num_experts),
        "reconstruction_error": (num_layers, num_experts, num_bits),
    }
    for key, shape in shapes.items():
        if key in data:
            _check_nested(data[key], shape, key, problems)
    if "layers" in data:
        problems += _layers_problems(data["layers"], num_layers)
    if problems:
        raise UserError(
            f"{path} is not a valid factors file: {some(problems)}\n"
            "Measure the factors again, or correct these entries."
        )

    order = np.argsort(bits)
    frequency = np.array(data["frequency"], dtype=np.float64)
    return Factors(
        frequency=frequency,
        routing_weight=np.array(data["routing_weight"], dtype=np.float64),
        reconstruction_error=np.array(data["reconstruction_error"], dtype=np.float64)[..., order],
        candidate_bits=tuple(sorted(bits)),
        layers=tuple(data.get("layers", range(len(frequency)))),
    )


def expert_costs(
    factors: Factors, *, alpha: float = 1.0, beta: float = 1.5, gamma: float = 1.0
) -> np.ndarray:
    """Cost [L, E, B] float64 of every width: phi^alpha * w^beta * eps^gamma (PMQ Eq. 4).

    phi and w are frequency and routing weight normalised to sum 1 over the experts of a layer; a
    layer that was never used costs nothing. The defaults give the published allocations.
    Raises UserError for exponents that are negative or not finite, and for costs that overflow.
    """
    exponents = {"alpha": alpha, "beta": beta, "gamma": gamma}
    wrong = [f"{k}={v}" for k, v in exponents.items() if not (math.isfinite(v) and v >= 0)]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: exponents must be finite and >= 0. Use 1 to 2.")
    phi = _normalise(factors.frequency)
    w = _normalise(factors.routing_weight)
    with np.errstate(over="ignore", invalid="ignore"):
        costs = (phi**alpha * w**beta)[..., None] * factors.reconstruction_error**gamma
    overflow = [
        f"layers.{factors.layers[row]}.experts.{expert}"
        for row, expert in np.argwhere(~np.isfinite(costs).all(axis=-1))
    ]
    if overflow:
        raise UserError(
            f"Costs are not finite with alpha={alpha}, beta={beta}, gamma={gamma} for "
            f"{some(overflow)}\nUse smaller exponents."
        )
    return costs


def _leading_shape(data: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Layers and experts as the first usable table has them; None where nothing tells."""
    for key in ("frequency", "routing_weight", "reconstruction_error"):
        table = data.get(key)
        if isinstance(table, list) and table and isinstance(table[0], list) and table[0]:
            return len(table), len(table[0])
    return None, None


def _check_nested(value: Any, shape: Sequence[int | None], path: str, problems: list[str]) -> None:
    """Append every entry that breaks `shape` (None = any length) or is no value >= 0."""
    if not shape:
        if isinstance(value, bool) or not isinstance(value, int | float):
            problems.append(f"{path}: {value!r:.40} is not a number")
        elif not 0 <= value <= sys.float_info.max:  # false for NaN
            problems.append(f"{path}: {value!r:.40} must be finite and >= 0")
        return
    length, *rest = shape
    if not isinstance(value, list):
        problems.append(f"{path}: {value!r:.40} is not a list")
    elif not value or len(value) != (length or len(value)):
        problems.append(f"{path}: has {len(value)} entries, expected {length or 'at least 1'}")
    else:
        for index, item in enumerate(value):
            _check_nested(item, rest, f"{path}[{index}]", problems)


def _layers_problems(layers: Any, num_layers: int | None) -> list[str]:
    if not isinstance(layers, list):
        return [f"layers: {layers!r:.40} is not a list"]
    problems = [
        f"layers[{index}]: {layer!r:.40} is not a whole number >= 0"
        for index, layer in enumerate(layers)
        if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0
    ]
    if not problems and len(set(layers)) != len(layers):
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        problems = [f"layers: {layer} is given more than once" for layer in twice]
    if num_layers is not None and len(layers) != num_layers:
        problems.append(f"layers: has {len(layers)} entries, expected {num_layers}")
    return problems


def _normalise(table: np.ndarray) -> np.ndarray:
    total = table.sum(axis=1, keepdims=True)
    return np.divide(table, total, out=np.zeros_like(table), where=total > 0)
