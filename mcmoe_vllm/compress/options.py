"""What `mcmoe quantize` and `mcmoe plan` can be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mcmoe_vllm.checkpoint.format import CANDIDATE_BITS, DENSE_BITS, GROUP_SIZES
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.text import DEFAULT_DATASET
from mcmoe_vllm.plan import Plan, check_candidate_bits
from mcmoe_vllm.pruning.table import MAX_DROP
from mcmoe_vllm.recipes import RECIPES, Recipe

RESULT_FIELDS = (  # what an interrupted job may not change, the recipe's traits apart
    "bits", "group_size", "dense_bits", "calibration", "samples",
    "sequence_length", "seed", "pins",
)  # fmt: skip


PLAN_TRAITS = (  # traits that a given plan has already decided
    "alpha", "beta", "gamma", "scope", "error_method", "error_refinements", "error_norm",
    "routing_score",
)  # fmt: skip


OVERRIDES = (  # traits with a flag of their own
    "alpha", "beta", "gamma", "scope", "method", "candidate_bits", "tuning_passes",
)  # fmt: skip


@dataclass(frozen=True)
class QuantizeOptions:
    """Everything that `mcmoe quantize` can be told; the names are those of its flags.

    model: a local folder or a Hub name; output: the folder (quantize) or plan file (plan) to
    write; bits: average width over expert weights; recipe: one or its name, None = the plan's or
    "best";
    scope, candidate_bits, method, alpha, beta, gamma, tuning_passes: traits of the recipe, None =
    as the recipe says;
    pins: "layers.0.*=3"; plan: a plan.json to use instead of measuring; target_drop: share of
    expert activations for online pruning, None = not calibrated; sequence_length: None =
    min(2048, the model's maximum).
    Raises UserError listing every value out of range.
    """

    model: str
    output: str
    bits: float = 2.5
    recipe: Recipe | str | None = None
    scope: str | None = None
    group_size: int = 128
    candidate_bits: tuple[int, ...] | None = None
    dense_bits: int = 4
    calibration: str = DEFAULT_DATASET
    samples: int = 128
    sequence_length: int | None = None
    method: str | None = None
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    tuning_passes: int | None = None
    pins: tuple[str, ...] = ()
    plan: str | None = None
    target_drop: float | None = None
    device: str = "auto"
    seed: int = 0
    work_dir: str | None = None
    resume: bool = False
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        allowed: list[tuple[str, Any, Sequence[Any]]] = [
            ("group_size", self.group_size, GROUP_SIZES),
            ("dense_bits", self.dense_bits, DENSE_BITS),
        ]
        if isinstance(self.recipe, str):
            allowed.append(("recipe", self.recipe, tuple(RECIPES)))
        wrong = [f"{n} is {v!r}, allowed are {list(a)}" for n, v, a in allowed if v not in a]
        wrong += check_candidate_bits(self.candidate_bits or (1,))
        if not wrong:
            wrong += self.traits.problems()
        if self.target_drop is not None and not 0 < self.target_drop <= MAX_DROP:
            wrong.append(f"target_drop is {self.target_drop}, allowed are shares up to {MAX_DROP}")
        if self.samples < 1:
            wrong.append(f"samples is {self.samples}, needs at least 1")
        if self.sequence_length is not None and self.sequence_length < 2:
            wrong.append(f"sequence_length is {self.sequence_length}, needs at least 2")
        if not math.isfinite(self.bits):
            wrong.append(f"bits is {self.bits}, needs a finite number")
        elif not wrong and self.plan is None:
            candidates = self.traits.candidate_bits
            low, high = min(candidates), max(candidates)
            if not low <= self.bits <= high:
                wrong.append(
                    f"bits is {self.bits}, the candidates {sorted(candidates)} allow "
                    f"{low} to {high}; choose other --candidate-bits out of {CANDIDATE_BITS}"
                )
        if wrong:
            raise UserError("\n".join(wrong))

    @property
    def traits(self) -> Recipe:
        """The recipe with what the options say otherwise."""
        given = {name: getattr(self, name) for name in OVERRIDES}
        changed = {name: value for name, value in given.items() if value is not None}
        recipe = self.recipe if isinstance(self.recipe, Recipe) else RECIPES[self.recipe or "best"]
        return replace(recipe, **changed)

    @property
    def is_uniform(self) -> bool:
        """Whether one width for all is asked for: nothing is measured then."""
        traits = self.traits
        several = traits.allocation == "sensitivity" and len(traits.candidate_bits) > 1
        return self.bits in traits.candidate_bits and not self.pins and not several


def named_traits(recipe: Recipe) -> dict[str, Any]:
    """A recipe's traits with its name as "recipe"."""
    traits = recipe.to_dict()
    return {"recipe": traits.pop("name"), **traits}


def recipe_of(plan: Plan) -> str | None:
    """The name of the recipe that a plan was made by, if it is known here."""
    name = plan.options.get("recipe")
    return name if name in RECIPES else None
