"""After GPTQ: scales fitted to codes, codes to scales, weights to what they are given."""

import torch

from mcmoe_kernels.quantize.columns import descend_torch, round_scale
from mcmoe_vllm.quantize.codes import Codes, row_errors
from mcmoe_vllm.quantize.gptq import BLOCK
from mcmoe_vllm.quantize.precision import fast_products
from mcmoe_vllm.quantize.ranges import GroupFit

REFINE_DAMPING = 0.2  # of the mean diagonal, in experts, which see few tokens each
DENSE_DAMPING = 0.02  # the same in linears that see all tokens


def answer_inputs(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    cross: torch.Tensor,
    damping: float = REFINE_DAMPING,
) -> torch.Tensor:
    """The matrices [B, N, K] that come nearest to W y when they are given z instead of y.

    hessian: Z^T Z, cross: Y^T Z, both [B, K, K]: W (cross + d) (hessian + d)^-1 with the damping d
    of refinement, so that inputs that calibration hardly saw keep the weights they had.
    """
    extra = damp(hessian, damping) - hessian
    lower, info = torch.linalg.cholesky_ex(hessian + extra)
    wanted = weight.float() @ (cross + extra)
    solved = torch.cholesky_solve(wanted.transpose(1, 2), lower).transpose(1, 2)
    sound = (info == 0).view(-1, 1, 1) & solved.isfinite().all(-1, keepdim=True)
    return torch.where(sound, solved, weight.float()).contiguous()


@fast_products
def refine(
    w: torch.Tensor, hessian: torch.Tensor, codes: Codes, fit: GroupFit, rounds: int
) -> Codes:
    """Scales by least squares under the codes, then each code under the scales and all other
    codes, in turn; w [B, K, N]. Rows that end up worse keep what they had. Zeros stay."""
    q, scale, zero = codes
    group_size = q.shape[1] // scale.shape[1]
    target = hessian @ w
    start = row_errors(w, codes, hessian)
    for _ in range(rounds):
        scale = _refit_scales(q, scale, zero, hessian, target)
        q = _descend(w, hessian, (q, scale, zero), fit, group_size)
    better = (row_errors(w, (q, scale, zero), hessian) < start).unsqueeze(1)
    return torch.where(better, q, codes[0]), torch.where(better, scale, codes[1]), zero


def damp(hessian: torch.Tensor, share: float) -> torch.Tensor:
    """The Hessian that refinement minimises: more of the diagonal than calibration saw, because a
    minimum fits its sample closer than GPTQ's one pass does."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
    return hessian + share * mean * torch.eye(hessian.shape[1], device=hessian.device)


def _refit_scales(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    hessian: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """The scales [B, K/G, N] that minimise tr(D H D^T) under codes and zeros: for every row a
    linear system of K/G unknowns. target: H w, [B, K, N]."""
    groups = scale.shape[1]
    levels = q.unflatten(1, (groups, -1)) - zero.unsqueeze(2)  # [B, K/G, G, N]
    grams = scale.new_empty(scale.shape[0], groups, *scale.shape[1:])  # [B, K/G, K/G, N]
    scratch = torch.empty_like(levels).flatten()  # once: a block of each size would scatter memory
    for g in range(groups):
        # The matrix is symmetric: the groups from g on will do.
        begin, end = g * levels.shape[2], (g + 1) * levels.shape[2]
        rest = levels[:, g:]
        product = scratch[: rest.numel()].view(rest.shape)
        torch.bmm(hessian[:, begin:, begin:end], levels[:, g], out=product.flatten(1, 2))
        gram = product.mul_(rest).sum(2)
        grams[:, g, g:] = gram
        grams[:, g:, g] = gram
    matrix = grams.permute(0, 3, 1, 2)  # [B, N, K/G, K/G]
    right = (target.unflatten(1, (groups, -1)) * levels).sum(2).transpose(1, 2)  # [B, N, K/G]
    # A group of zero levels has no say; a little of its old scale keeps the system regular.
    ridge = 1e-4 * matrix.diagonal(dim1=2, dim2=3) + 1e-20
    matrix = matrix + torch.diag_embed(ridge)
    right = right + ridge * scale.transpose(1, 2)
    solved = torch.linalg.solve_ex(matrix, right.unsqueeze(-1))[0].squeeze(-1).transpose(1, 2)
    sound = solved.isfinite() & (solved > scale / 4) & (solved < scale * 4)
    return round_scale(torch.where(sound, solved, scale))


def _descend(
    w: torch.Tensor, hessian: torch.Tensor, codes: Codes, fit: GroupFit, group_size: int
) -> torch.Tensor:
    """One sweep of coordinate descent: codes [B, K, N], each set to its best given all others."""
    q, scale, zero = codes
    q = q.clone()
    deq = ((q.unflatten(1, (scale.shape[1], -1)) - zero.unsqueeze(2)) * scale.unsqueeze(2)).flatten(
        1, 2
    )
    slope = hessian @ (w - deq)  # [B, K, N]
    descend = descend_torch
    if w.is_cuda:
        from mcmoe_kernels.quantize.columns_triton import descend
    for block in range(0, w.shape[1], BLOCK):
        block_end = min(block + BLOCK, w.shape[1])
        moves = []
        for start in range(block, block_end, min(group_size, BLOCK)):
            end = min(start + group_size, block_end)
            group = start // group_size
            moves.append(
                descend(slope, deq, q, scale[:, group].contiguous(), zero[:, group].contiguous(),
                        hessian, fit.max_code[:, 0], start, end - start)
            )  # fmt: skip
            slope[:, end:block_end] -= hessian[:, end:block_end, start:end] @ moves[-1]
        slope[:, block_end:].baddbmm_(
            hessian[:, block_end:, block:block_end], torch.cat(moves, 1), alpha=-1
        )
    return q
