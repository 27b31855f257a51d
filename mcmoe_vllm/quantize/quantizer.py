"""Weights to codes: round to nearest, GPTQ and the 1-bit case, as pure functions on batches.

All matrices of one shape are quantized in one batch, each at a width of its own: B matrices
W[B, N, K] with Hessians H[B, K, K] = X^T X of their inputs. Every width shares one formula,
w = (q - z) * s with q in 0..2^bits-1: integer zeros at 3 and 4 bits, multiples of 1/2 at 2 bits,
z = 0.5 at 1 bit, where that is sign(w) * s/2.
"""

import torch

from mcmoe_kernels.formats import FORMATS
from mcmoe_vllm.quantize.codes import Quantized, split_errors
from mcmoe_vllm.quantize.gptq import FactoredHessian, factor_hessian, gptq
from mcmoe_vllm.quantize.ranges import GroupFit, round_to_nearest
from mcmoe_vllm.quantize.refine import DENSE_DAMPING, REFINE_DAMPING, damp, refine
from mcmoe_vllm.recipes import BEST, Recipe

METHODS = ("gptq", "rtn", "minmax")


def quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor | FactoredHessian,
    bits: torch.Tensor | int,
    group_size: int,
    *,
    method: str = "gptq",
    symmetric: bool = False,
    splits: int = 1,
    recipe: Recipe = BEST,
) -> Quantized:
    """Quantize a batch of matrices with GPTQ, or with round to nearest where that is better and
    the recipe keeps it.

    weight: [B, N, K], any float dtype; hessian: [B, K, K] float32, undamped, or as factored
    for several widths;
    bits: [B] numbers of formats (FORMATS) or one for all; method: "gptq" or "rtn";
    symmetric: zero fixed at 2^(bits-1) (the dense int4 format);
    splits: stacked matrices in N that choose between GPTQ and rounding on their own;
    recipe: its traits of the quantizer, `method` apart.
    Raises ValueError for shapes that do not fit or widths out of range.
    """
    b, n, k = weight.shape
    factored = hessian if isinstance(hessian, FactoredHessian) else None
    hessian = hessian.matrix if isinstance(hessian, FactoredHessian) else hessian
    if hessian.shape != (b, k, k):
        raise ValueError(f"hessian is {tuple(hessian.shape)}, weights need {(b, k, k)}")
    if k % group_size or n % splits:
        raise ValueError(f"{k} columns in groups of {group_size}, {n} rows in {splits} matrices")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, allowed are {METHODS}")
    widths = torch.as_tensor(bits, device=weight.device).expand(b)
    if set(widths.tolist()) - set(FORMATS):
        raise ValueError(f"bits are {widths.tolist()}, allowed are {tuple(FORMATS)}")

    w = weight.float().transpose(1, 2).contiguous()  # [B, K, N]: columns lie side by side
    hessian = hessian.float()
    search = "full" if method == "minmax" else recipe.range_search
    fit = GroupFit(widths, symmetric, search, recipe.binary_scale, recipe.zeros)
    rounded = round_to_nearest(w, hessian, fit, group_size)
    rounded_error = split_errors(w, rounded, hessian, splits)
    damping = torch.zeros(b, device=w.device)
    if method != "gptq":
        kept = torch.zeros_like(rounded_error, dtype=torch.bool)
        best, error = rounded, rounded_error
    else:
        factored = factored or factor_hessian(hessian)
        damping = factored.damping
        within = widths >= (1 if symmetric else recipe.compensated_bits)
        compensated = gptq(w, hessian, factored.inverse, fit, group_size, within)
        if recipe.refinements:
            damped = damp(hessian, DENSE_DAMPING if symmetric else REFINE_DAMPING)
            compensated = refine(w, damped, compensated, fit, recipe.refinements)
        error = split_errors(w, compensated, hessian, splits)
        kept = error <= rounded_error
        if not recipe.keep_rounding:
            kept = torch.ones_like(kept)
        rows = kept.repeat_interleave(n // splits, dim=1).unsqueeze(1)  # [B, 1, N]
        best = (
            torch.where(rows, compensated[0], rounded[0]),
            torch.where(rows, compensated[1], rounded[1]),
            torch.where(rows, compensated[2], rounded[2]),
        )
        error = torch.where(kept, error, rounded_error)
    codes, scale, zero = (t.transpose(1, 2).contiguous() for t in best)
    return Quantized(codes.to(torch.uint8), scale, zero, error, kept, damping)
