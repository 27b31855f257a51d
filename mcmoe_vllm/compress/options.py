"""What `mcmoe quantize` and `mcmoe plan` can be told."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from mcmoe_vllm.disk import is_number
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.flags import (
    differing,
    flag,
    flag_names,
    json_schema,
    not_allowed,
    wrong_members,
    wrong_values,
)
from mcmoe_vllm.limits import (
    CANDIDATE_BITS,
    DEFAULT_DATASET,
    DENSE_BITS,
    GROUP_SIZES,
    MAX_DROP,
    MAX_EXPONENT,
    MAX_RANKS,
    MAX_SEED,
    MAX_WINDOWS,
    PROJECTION_GROUPS,
)
from mcmoe_vllm.plan import Plan, check_candidate_bits, same_group_size
from mcmoe_vllm.recipes import ALLOWED, RECIPES, Recipe

RESULT_FIELDS = (  # what an interrupted job may not change, the recipe's traits apart
    "bits", "group_size", "dense_bits", "calibration", "samples",
    "sequence_length", "seed", "pins",
)  # fmt: skip


PLAN_TRAITS = (  # traits that a given plan has already decided
    "alpha", "beta", "gamma", "scope", "error_method", "error_refinements", "error_norm",
    "routing_score",
)  # fmt: skip


OVERRIDES = (  # traits with a flag of their own
    "alpha", "beta", "gamma", "scope", "method", "candidate_bits", "finetune_passes",
)  # fmt: skip


EXPONENTS = ("alpha", "beta", "gamma")


DECIDED_BY_PLAN = (  # options with a flag
    "bits", "candidate_bits", "group_size", "dense_bits", "pins", "scope", *EXPONENTS,
)  # fmt: skip


TARGET = "target"
RECIPE = "recipe; its traits change one by one with the other flags"
CALIBRATION = "calibration"
RUNNING = "running"


@dataclass(frozen=True)
class QuantizeOptions:
    """Everything that `mcmoe quantize` can be told; a field is a flag with its default, its help
    and what is allowed.

    model: a local folder or a Hub name; output: the folder (quantize) or plan file (plan) to write;
    recipe: one or its name, None = the plan's or "best"; scope, candidate_bits, method, alpha,
    beta, gamma, finetune_passes: None = as the recipe says. group_size: a number for all kinds of
    matrices, or for some of them by name; the others are as the model's widths allow.
    Raises UserError listing every value out of range.
    """

    model: str
    output: str
    bits: float = flag(
        2.5,
        "average width over expert weights, scales and zeros not counted (default 2.5)",
        TARGET,
    )
    recipe: Recipe | str | None = flag(
        None,
        "best: the most accurate (default); paper: as MC-MoE was published",
        RECIPE,
        allowed=tuple(RECIPES),
    )
    scope: str | None = flag(
        None,
        "one budget per layer, as in the paper, or one over all layers",
        TARGET,
        allowed=ALLOWED["scope"],
    )
    group_size: dict[str, int] | int | None = flag(
        None,
        "columns that share a scale: 32, 64 or 128, or one for each of gate and up (w13), down "
        "(w2) and int4 linears (dense); default: the largest that fits",
        TARGET,
        metavar="64|w13=128,w2=64",
        allowed=GROUP_SIZES,
        names=PROJECTION_GROUPS,
    )
    tensor_parallel: int = flag(
        1,
        "ranks that the model is to be split over when it is served, each with whole groups "
        "(default 1)",
        TARGET,
        least=1,
        most=MAX_RANKS,
    )
    candidate_bits: tuple[int, ...] | None = flag(
        None,
        "widths to choose from, out of 0 (dropped) to 4 (default: of the recipe)",
        TARGET,
        metavar="1,2,3",
        allowed=CANDIDATE_BITS,
    )
    dense_bits: int = flag(
        4, "attention and shared experts: 4 (default) or 16", TARGET, allowed=DENSE_BITS
    )
    calibration: str = flag(
        DEFAULT_DATASET,
        "FILE.jsonl (field text), FILE.txt or a Hub dataset (default: C4 from the Hub)",
        CALIBRATION,
        metavar="SOURCE",
    )
    samples: int = flag(128, "windows of text", CALIBRATION, least=1, most=MAX_WINDOWS)
    sequence_length: int | None = flag(
        None, "tokens in a window (default: 2048 or the model's maximum)", CALIBRATION, least=2
    )
    method: str | None = flag(
        None,
        "error compensation, or rounding to nearest",
        RECIPE,
        allowed=ALLOWED["method"],
    )
    alpha: float | None = flag(
        None, "exponent of the frequency, paper only", RECIPE, least=0, most=MAX_EXPONENT
    )
    beta: float | None = flag(
        None, "exponent of the routing weight, paper only", RECIPE, least=0, most=MAX_EXPONENT
    )
    gamma: float | None = flag(
        None, "exponent of the reconstruction error, paper only", RECIPE, least=0, most=MAX_EXPONENT
    )
    finetune_passes: int | None = flag(
        None,
        "passes over the calibration text that finetune scales, norms and routers; 0 = none",
        RECIPE,
        allowed=ALLOWED["finetune_passes"],
    )
    pins: tuple[str, ...] = flag(
        (),
        "fix widths, e.g. 'layers.0.*=3' or 'layers.*.experts.5=1'; may be repeated",
        TARGET,
        metavar="PATTERN=BITS",
        name="--pin",
    )
    plan: str | None = flag(None, "use the widths of this plan.json; nothing is measured")
    target_drop: float | None = flag(
        None,
        "also calibrate online pruning: this share of expert activations is dropped when serving "
        "(default: no pruning; `mcmoe calibrate-pruning` adds it later)",
        metavar="SHARE",
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N", RUNNING)
    seed: int = flag(0, "of the choice of windows (default 0)", CALIBRATION, least=0, most=MAX_SEED)
    work_dir: str | None = flag(
        None, "unfinished work lives here (default: beside the output)", RUNNING
    )
    resume: bool = flag(False, "continue an interrupted job", RUNNING)
    revision: str | None = flag(None, "branch, tag or commit of a Hub model", RUNNING)
    trust_remote_code: bool = flag(
        False, "DANGER: run code that comes with the model's tokenizer", RUNNING
    )

    def __post_init__(self) -> None:
        _plain(self)
        wrong = wrong_members(self, "group_size") + not_allowed(self, ("dense_bits",))
        if not isinstance(self.recipe, Recipe | None):
            wrong += not_allowed(self, ("recipe",))
        wrong += check_candidate_bits((1,) if self.candidate_bits is None else self.candidate_bits)
        if not wrong:
            wrong += [*check_candidate_bits(self.traits.candidate_bits), *self.traits.problems()]
        drop = self.target_drop
        if drop is not None and is_number(drop) and not 0 < drop <= MAX_DROP:
            wrong.append(f"target_drop is {drop}, allowed are shares up to {MAX_DROP}")
        wrong += wrong_values(self)
        wrong += [
            f"{name} is {value!r:.60}, needs a text"
            for name, value in (("model", self.model), ("output", self.output))
            if not isinstance(value, str)
        ]
        if not wrong:
            wrong += self._contradictions()
        if wrong:
            raise UserError("\n".join(wrong))
        if isinstance(self.group_size, int):
            object.__setattr__(self, "group_size", same_group_size(self.group_size))

    def _contradictions(self) -> list[str]:
        """What values that are allowed one by one do not allow together, a sentence each."""
        wrong, traits = [], self.traits
        unused = [name for name in EXPONENTS if getattr(self, name) is not None]
        if unused and traits.allocation != "pmq":
            wrong.append(
                f"{', '.join(unused)} weigh the costs of --recipe paper; the recipe {traits.name} "
                "measures what widths cost, so leave them out"
            )
        candidates = traits.candidate_bits
        low, high = min(candidates), max(candidates)
        if self.plan is None and not low <= self.bits <= high:
            wrong.append(
                f"bits is {self.bits}, the candidates {sorted(candidates)} allow "
                f"{low} to {high}; choose other --candidate-bits out of {CANDIDATE_BITS}"
            )
        return wrong

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The fields as JSON Schema, for forms and for checks elsewhere."""
        return json_schema(cls)

    @property
    def traits(self) -> Recipe:
        """The recipe with what the options say otherwise."""
        given = {name: getattr(self, name) for name in OVERRIDES}
        changed = {name: value for name, value in given.items() if value is not None}
        recipe = self.recipe if isinstance(self.recipe, Recipe) else RECIPES[self.recipe or "best"]
        return replace(recipe, **changed)

    @property
    def group_sizes(self) -> dict[str, int]:
        """Those that were asked for, by kind."""
        return self.group_size if isinstance(self.group_size, dict) else {}

    @property
    def is_uniform(self) -> bool:
        """Whether one width for all is asked for: nothing is measured then."""
        traits = self.traits
        several = traits.allocation == "sensitivity" and len(traits.candidate_bits) > 1
        return self.bits in traits.candidate_bits and not self.pins and not several


def require_undecided(options: QuantizeOptions, plan: Plan) -> None:
    """Raises UserError for options that say other than the plan which is to be carried out.

    What is as by default was not asked for, as far as can be told.
    """
    agrees = {**plan.group_size, **options.group_sizes} == plan.group_size
    decided = {
        "bits": plan.nominal_bits,
        "group_size": options.group_size if agrees else plan.group_size,
        "dense_bits": plan.dense_bits,
        "candidate_bits": tuple(plan.candidate_bits),
    }
    asked = differing(options, DECIDED_BY_PLAN)
    against = {
        name: value
        for name, value in asked.items()
        if value != decided.get(name, _as_options(plan.options.get(name)))
    }
    if against:
        raise UserError(plan_decides(against))


def plan_decides(names: Collection[str]) -> str:
    """Why a plan and these options cannot be given together."""
    return (
        f"{flag_names(QuantizeOptions, names)} cannot be given with --plan, which has decided "
        "already; make another plan with `mcmoe plan`, or leave out one of the two"
    )


def _as_options(value: Any) -> Any:
    """A value of plan.json as options hold it."""
    return tuple(value) if isinstance(value, list) else value


def _plain(options: QuantizeOptions) -> None:
    """Paths become their text, lists become tuples: options travel into JSON."""
    for name in options.__dataclass_fields__:
        value = getattr(options, name)
        if isinstance(value, os.PathLike):
            object.__setattr__(options, name, os.fspath(value))
        elif isinstance(value, list):
            object.__setattr__(options, name, tuple(value))


def named_traits(recipe: Recipe) -> dict[str, Any]:
    """A recipe's traits with its name as "recipe"."""
    traits = recipe.to_dict()
    return {"recipe": traits.pop("name"), **traits}


def recipe_of(plan: Plan) -> str | None:
    """The name of the recipe that a plan was made by, if it is known here."""
    name = plan.options.get("recipe")
    return name if isinstance(name, str) and name in RECIPES else None
