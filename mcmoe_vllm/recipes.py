"""Recipes: every choice of the method that changes figures and is no matter of size or budget.

`PAPER` is what the authors published (arXiv 2410.06270), as their code does it where paper and
code differ; `BEST` is the most accurate at the same true bits that this project knows. A field is
one trait; its comment says who does what.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from mcmoe_vllm.disk import is_number
from mcmoe_vllm.limits import MAX_EXPONENT


@dataclass(frozen=True)
class Recipe:
    """One way to compress.

    name: the value of --recipe.

    Significance and allocation
    allocation: "pmq" (the paper's integer program: one width an expert, costs by the exponents
        below) or "sensitivity" (widths for gate and up and for down of every expert, costs by
        squared error of the block's output times the measured KL that it causes, true bits).
    candidate_bits: widths to choose from.
    alpha, beta, gamma: exponents of frequency, routing weight and reconstruction error.
    scope: "layer" (a budget for every layer) or "global" (one for all).
    error_method: the quantizer whose error the allocation weighs: "minmax" (round to nearest over
        the whole range), "rtn" (with the recipe's range search) or "gptq".
    error_refinements: rounds of `refinements` in the quantizer whose error is weighed.
    error_norm: "windows" (sum over windows of each window's Frobenius norm) or "total" (the norm
        over all tokens).
    routing_score: weight of a routed expert: "softmax" (its share among all experts) or "mixed"
        (the weight its output is multiplied with).

    Quantizer
    method: "gptq" or "rtn".
    hessian_weighting: of the tokens that an expert is calibrated on: "equal", or by the square of
        the "routing" weight that its output is multiplied with.
    shared_tokens: weight, in tokens of an expert's own, of the mean over all tokens in what w13 is
        calibrated on; 0 completes experts that few tokens reach, and leaves others alone.
    compensated_bits: smallest width whose error is moved on within a block of 128 columns;
        narrower matrices move it from block to block alone.
    range_search: how a group's range is chosen: "norm" (|error|^2.4, 0.9 to 1.1 of the range),
        or "hessian" (squared error weighted by the Hessian's diagonal, clipped ranges).
    binary_scale: of a group at 1 bit, twice the "mean" of |w| or its "hessian"-weighted mean.
    refinements: rounds after GPTQ of fitting scales to codes and codes to scales and to each other
        under the whole Hessian; 0 to 99.
    zeros: "integer", or "half" (multiples of 1/2 at 2 bits, which the format stores too).
    answers: whether w2 is fitted to what the quantized w13 gives it, instead of to what w13 would.
    sequential: whether a layer is calibrated on what the quantized layers before it put out.
    exact_targets: whether int4 linears and experts are fitted to what they give the 16-bit model,
        instead of to what their weights would make of the quantized layers' outputs (QEP, arXiv
        2504.09629); no difference unless sequential.
    finetune_passes: over the calibration text, to finetune the quantized model's scales, norms and
        routers towards the 16-bit model's predictions; 0 to 99.
    finetune_rate: the largest step of finetuning, relative.
    keep_rounding: whether a matrix that rounding serves better than GPTQ is rounded.
    router_bits: 16 (untouched) or 4 (GPTQ, stored dequantized).
    """

    name: str
    allocation: str = "pmq"
    candidate_bits: tuple[int, ...] = (1, 2, 3)
    alpha: float = 1.0
    beta: float = 1.5
    gamma: float = 1.0
    scope: str = "layer"
    error_method: str = "gptq"
    error_refinements: int = 0
    error_norm: str = "total"
    routing_score: str = "mixed"
    method: str = "gptq"
    hessian_weighting: str = "routing"
    shared_tokens: int = 2000
    compensated_bits: int = 1
    range_search: str = "hessian"
    binary_scale: str = "hessian"
    refinements: int = 4
    zeros: str = "half"
    answers: bool = True
    sequential: bool = True
    exact_targets: bool = False
    finetune_passes: int = 0
    finetune_rate: float = 2e-3
    keep_rounding: bool = True
    router_bits: int = 16

    def problems(self) -> list[str]:
        """What is out of range, a sentence each."""
        return [
            *(
                f"{name} is {getattr(self, name)!r:.60}, allowed are {_in_words(allowed)}"
                for name, allowed in ALLOWED.items()
                if not _is_among(getattr(self, name), allowed)
            ),
            *(
                f"{name} is {getattr(self, name)!r:.60}, allowed are {least:g} to {most:g}"
                for name, (least, most) in RANGES.items()
                if not (is_number(value := getattr(self, name)) and least <= value <= most)
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Name to value of every trait, in JSON's types."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"candidate_bits": list(self.candidate_bits)}


ALLOWED: dict[str, Sequence[Any]] = {
    "allocation": ("pmq", "sensitivity"),
    "scope": ("layer", "global"),
    "error_method": ("minmax", "rtn", "gptq"),
    "error_norm": ("windows", "total"),
    "routing_score": ("softmax", "mixed"),
    "method": ("gptq", "rtn"),
    "hessian_weighting": ("equal", "routing"),
    "shared_tokens": range(1_000_001),
    "compensated_bits": (1, 2, 3, 4),
    "range_search": ("norm", "hessian"),
    "binary_scale": ("mean", "hessian"),
    "refinements": range(100),
    "error_refinements": range(100),
    "finetune_passes": range(100),
    "zeros": ("integer", "half"),
    "answers": (True, False),
    "sequential": (True, False),
    "exact_targets": (True, False),
    "keep_rounding": (True, False),
    "router_bits": (4, 16),
}


# Of traits that are no integers, the least and the greatest value.
RANGES: dict[str, tuple[float, float]] = {
    "alpha": (0, MAX_EXPONENT),
    "beta": (0, MAX_EXPONENT),
    "gamma": (0, MAX_EXPONENT),
    "finetune_rate": (0, 1),
}


def _is_among(value: Any, allowed: Sequence[Any]) -> bool:
    """Whether it is one of them in its type too: 1 is not True."""
    return type(value) is type(allowed[0]) and value in allowed


def _in_words(allowed: Sequence[Any]) -> str:
    return f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else str(list(allowed))


# The published widths follow from gamma = 1 (the paper's text says 2), the published accuracy from
# GPTQ that compensates inside a block at 4 bits alone.
PAPER = Recipe(
    "paper",
    allocation="pmq",
    candidate_bits=(1, 2, 3),
    alpha=1.0,
    beta=1.5,
    gamma=1.0,
    scope="layer",
    error_method="minmax",
    error_refinements=0,
    error_norm="windows",
    routing_score="softmax",
    method="gptq",
    hessian_weighting="equal",
    shared_tokens=0,
    compensated_bits=4,
    range_search="norm",
    binary_scale="mean",
    refinements=0,
    zeros="integer",
    answers=False,
    sequential=True,
    exact_targets=False,
    finetune_passes=0,
    keep_rounding=False,
    router_bits=4,
)


BEST = Recipe(
    "best",
    allocation="sensitivity",
    candidate_bits=(1, 2, 3, 4),
    scope="global",
    error_refinements=1,
    exact_targets=True,
    finetune_passes=1,
)


RECIPES = {recipe.name: recipe for recipe in (PAPER, BEST)}
