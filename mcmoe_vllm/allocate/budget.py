"""Bits to spend, and widths that are fixed in advance."""

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from mcmoe_vllm.errors import UserError, some
from mcmoe_vllm.widths import candidate_bits

Scope = Literal["layer", "global"]
SCOPES: tuple[Scope, ...] = ("layer", "global")
BUDGET_SLACK = 1e-6  # 2.3 * 100 must give 230 although it is 229.99... in binary


def budget_for_bits(
    bits: float,
    num_experts: int,
    num_layers: int,
    candidate_bits: Sequence[int],
    scope: Scope,
) -> tuple[int, bool]:
    """Turn average bits per expert into (budget in summed bits, whether floors apply).

    The budget is per layer in scope "layer" and for all layers in scope "global". False says
    that `bits` is itself a candidate: the allocation is then uniform (`uniform_allocation`).
    Raises UserError for bits outside the candidates' range.
    """
    require_scope(scope)
    candidates = require_candidates(candidate_bits)
    low, high = candidates[0], candidates[-1]
    if not low <= bits <= high:
        raise UserError(
            f"bits={bits} is out of range: candidate bits {list(candidates)} allow {low} to {high}."
            " Choose a value in that range or other candidates."
        )
    count = num_experts * (num_layers if scope == "global" else 1)
    uniform = float(bits) in candidates
    return math.floor(bits * count + BUDGET_SLACK), not uniform


def parse_pins(
    specs: Sequence[str],
    layers: Sequence[int],
    num_experts: int,
    candidate_bits: Sequence[int],
) -> dict[tuple[int, int], int]:
    """Turn specs such as `layers.0.*=3` into {(row, expert): bits}.

    The left side is a shell pattern for `layers.{decoder layer}.experts.{expert}`; `layers` gives
    the decoder layer of each row; later specs win. Raises UserError that lists every spec which is
    malformed, matches no expert, or asks for a width that is no candidate.
    """
    candidates = require_candidates(candidate_bits)
    names = {
        f"layers.{layer}.experts.{expert}": (row, expert)
        for row, layer in enumerate(layers)
        for expert in range(num_experts)
    }
    pins: dict[tuple[int, int], int] = {}
    problems = []
    for spec in specs:
        parts = re.fullmatch(r"\s*([^=\s]{1,999})\s*=\s*([0-9]{1,9})\s*", spec)
        if parts is None:
            problems.append(f"{spec!r:.80}: not of the form PATTERN=BITS")
            continue
        pattern, bits = parts[1], int(parts[2])
        matched = [place for name, place in names.items() if fnmatchcase(name, pattern)]
        if not matched:
            problems.append(f"{spec!r:.80}: matches no expert")
        if bits not in candidates:
            problems.append(f"{spec!r:.80}: {bits} bits is not one of {list(candidates)}")
        pins.update(dict.fromkeys(matched, bits))
    if problems:
        raise UserError(
            f"Pins are wrong: {some(problems)}\n"
            "Write for example layers.0.*=3 or layers.*.experts.5=2; layers are "
            f"{_ranges(layers)}, experts 0..{num_experts - 1}, bits {list(candidates)}."
        )
    return pins


def require_scope(scope: str) -> None:
    if scope not in SCOPES:
        raise UserError(f"scope={scope!r} is unknown: choose one of {', '.join(SCOPES)}.")


def require_candidates(candidate_bits: Sequence[int]) -> tuple[int, ...]:
    problems = candidate_problems(list(candidate_bits))
    candidates = tuple(candidate_bits)
    if not problems and list(candidates) != sorted(candidates):
        problems = [f"candidate_bits: {list(candidates)} is not ascending"]
    if problems:
        raise UserError(f"Candidate bits are wrong: {some(problems)}\nUse for example 1 2 3.")
    return candidates


def candidate_problems(bits: Any) -> list[str]:
    if not isinstance(bits, list) or not bits:
        return [
            f"candidate_bits: {bits!r:.40} is not a list of widths out of {list(candidate_bits())}"
        ]
    problems = [
        f"candidate_bits[{index}]: {width!r:.40} is not one of {list(candidate_bits())}"
        for index, width in enumerate(bits)
        if not isinstance(width, int) or isinstance(width, bool) or width not in candidate_bits()
    ]
    if not problems:
        twice = sorted({width for width in bits if bits.count(width) > 1})
        problems = [f"candidate_bits: {width} is given more than once" for width in twice]
    return problems


def _ranges(layers: Sequence[int]) -> str:
    contiguous = list(layers) == list(range(layers[0], layers[0] + len(layers)))
    return f"{layers[0]}..{layers[-1]}" if contiguous else ", ".join(map(str, layers))
