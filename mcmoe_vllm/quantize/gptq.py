"""GPTQ: column by column, each column's error is moved onto those still to come."""

from dataclasses import dataclass

import torch

from mcmoe_kernels.quantize.columns import compensate_torch
from mcmoe_vllm.quantize.codes import Codes
from mcmoe_vllm.quantize.precision import fast_products
from mcmoe_vllm.quantize.ranges import GroupFit

DAMPING = 0.01  # of the mean diagonal, as in GPTQ (arXiv 2210.17323, section 3)
BLOCK = 128  # columns between two updates of the whole rest of the matrix


@dataclass(frozen=True)
class FactoredHessian:
    """A batch of Hessians as GPTQ needs them; what every width of a matrix shares.

    matrix [B, K, K] float32, undamped; inverse [B, K, K]: the upper Cholesky factor of the damped
    inverse; damping [B]: as in `Quantized`.
    """

    matrix: torch.Tensor
    inverse: torch.Tensor
    damping: torch.Tensor


def factor_hessian(hessian: torch.Tensor) -> FactoredHessian:
    """hessian [B, K, K] float32, undamped."""
    return FactoredHessian(hessian, *_inverse_cholesky(hessian))


@fast_products
def gptq(
    w: torch.Tensor,
    hessian: torch.Tensor,
    inverse: torch.Tensor,
    fit: GroupFit,
    group_size: int,
    within: torch.Tensor,
) -> Codes:
    """Column by column, each column's error is moved onto the columns that are still to come
    (GPTQ, Algorithm 1). `inverse` [B, K, K] is the upper Cholesky factor of H^-1; matrices that
    `within` [B] excludes move it onto the blocks to come alone.

    Updates are lazy on two levels, which changes the memory traffic and not the result.
    """
    w = w.clone()
    moved = within.view(-1, 1, 1).to(w.dtype)
    compensate = compensate_torch
    if w.is_cuda:
        from mcmoe_kernels.quantize.columns_triton import compensate
    k = w.shape[1]
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    codes, scales, zeros = torch.empty_like(w), [], []
    scale = zero = torch.empty(0)
    for block in range(0, k, BLOCK):
        block_end = min(block + BLOCK, k)
        block_errors = torch.empty_like(w[:, block:block_end])
        for start in range(block, block_end, min(group_size, BLOCK)):
            end = min(start + group_size, block_end)
            if start % group_size == 0:
                columns = slice(start, start + group_size)
                scale, zero = fit(w[:, columns], diagonal[:, columns])
                scales.append(scale)
                zeros.append(zero)
            compensate(w, codes, block_errors, scale, zero, inverse, fit.max_code[:, 0],
                       moved[:, 0, 0], start, end - start, start - block)  # fmt: skip
            if end < block_end:
                factor = inverse[:, start:end, end:block_end].transpose(1, 2) * moved
                w[:, end:block_end] -= factor @ block_errors[:, start - block : end - block]
        w[:, block_end:].baddbmm_(
            inverse[:, block:block_end, block_end:].transpose(1, 2), block_errors, alpha=-1
        )
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1)


def _inverse_cholesky(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper Cholesky factor of the damped H^-1 [B, K, K] and the damping [B] that it took.

    A Hessian that stays indefinite in float32 is damped ten times more, until it is the
    identity in effect: an expert that calibration barely reached is rounded, never NaN.
    """
    b, k, _ = hessian.shape
    eye = torch.eye(k, device=hessian.device)
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    mean = torch.where(mean > 0, mean, 1.0)
    damping = torch.full((b,), DAMPING, device=hessian.device)
    factor = torch.empty_like(hessian)
    todo = torch.arange(b, device=hessian.device)
    while todo.numel():
        damped = hessian[todo] + (damping * mean)[todo].view(-1, 1, 1) * eye
        lower, info = torch.linalg.cholesky_ex(damped)
        inverse = torch.cholesky_inverse(lower)
        upper, info2 = torch.linalg.cholesky_ex(inverse, upper=True)
        good = (info == 0) & (info2 == 0) & upper.isfinite().all(-1).all(-1)
        factor[todo[good]] = upper[good]
        todo = todo[~good]
        damping[todo] *= 10
        if todo.numel() and float(damping[todo].min()) > 1e4:
            factor[todo] = eye
            break
    return factor, damping
