"""What GPTQ and its refinement do column by column, in plain torch: the definition.

Columns lie side by side: weights are [B, K, N], B matrices of K columns and N rows.
"""

import math

import torch

from mcmoe_kernels.formats.scales import MAX_SCALE, MAX_STEPS, MIN_SCALE

SUB_BLOCK = 32  # columns that are updated after each one of them


def encode(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, max_code: torch.Tensor
) -> torch.Tensor:
    """Codes of w, all [B, N], as floats; max_code [B, 1]."""
    return torch.minimum(torch.round(w / scale + zero).clamp(min=0), max_code)


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """The nearest value exact in bfloat16 and float16 and within what checkpoints hold, so that
    every engine and kernel sees the same weights; never zero. float32 in and out."""
    exact = scale.to(torch.bfloat16).float().clamp(MIN_SCALE, MAX_SCALE)
    return exact.to(torch.float16).float()


def fit_group_torch(
    w: torch.Tensor,
    importance: torch.Tensor,
    shrink: torch.Tensor,
    max_code: torch.Tensor,
    zero_steps: torch.Tensor,
    *,
    power: float,
    weighted: bool,
    symmetric: bool,
    weighted_binary: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `mcmoe_kernels.quantize.columns_triton.fit_group`."""
    importance = importance.unsqueeze(-1)
    max_code, steps = max_code.unsqueeze(1), zero_steps.unsqueeze(1)  # broadcast over [B, N]
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    middle = (max_code + 1) / 2
    if symmetric:
        high = torch.maximum(high * middle / (middle - 1), -low)
        low = -high
    best_error = torch.full_like(low, math.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for share in shrink.unsqueeze(-1):
        if symmetric:
            scale = round_scale(high * share / middle)
            zero = middle.expand_as(scale)
        else:
            scale = round_scale((high - low) * share / max_code)
            zero = (-low * share / scale * steps).round()
            zero = torch.minimum(zero.clamp(min=0), (max_code * steps).clamp(max=MAX_STEPS)) / steps
        q = torch.round(w / scale.unsqueeze(1) + zero.unsqueeze(1)).clamp_(min=0)
        q = torch.minimum(q, max_code.unsqueeze(1))
        difference = (q - zero.unsqueeze(1)) * scale.unsqueeze(1) - w
        difference = difference.square_() if power == 2 else difference.abs_().pow_(power)
        error = (difference * importance if weighted else difference).sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    binary = max_code == 1
    if bool(binary.any()):
        mean = w.abs().mean(1)
        if weighted_binary:
            mean = (w.abs() * importance).sum(1) / importance.sum(1)
        best_scale = torch.where(binary, round_scale(2 * mean), best_scale)
        best_zero = torch.where(binary, 0.5, best_zero)
    return best_scale, best_zero


def compensate_torch(
    w: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    inverse: torch.Tensor,
    max_code: torch.Tensor,
    moved: torch.Tensor,
    start: int,
    count: int,
    at_error: int,
) -> None:
    """The definition of `mcmoe_kernels.quantize.columns_triton.compensate`."""
    for sub in range(0, count, SUB_BLOCK):
        begin, end = start + sub, start + min(sub + SUB_BLOCK, count)
        factor = inverse[:, start:begin, begin:end].transpose(1, 2) * moved.view(-1, 1, 1)
        part = w[:, begin:end] - factor @ errors[:, at_error : at_error + sub]
        for i, j in enumerate(range(begin, end)):
            q = encode(part[:, i], scale, zero, max_code.unsqueeze(1))
            codes[:, j] = q
            error = (part[:, i] - (q - zero) * scale) / inverse[:, j, j].unsqueeze(1)
            errors[:, at_error + sub + i] = error
            row = (inverse[:, j, j + 1 : end] * moved.unsqueeze(1)).unsqueeze(2)
            part[:, i + 1 :].addcmul_(row, error.unsqueeze(1), value=-1)


def descend_torch(
    slope: torch.Tensor,
    deq: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    hessian: torch.Tensor,
    max_code: torch.Tensor,
    start: int,
    count: int,
) -> torch.Tensor:
    """The definition of `mcmoe_kernels.quantize.columns_triton.descend`."""
    moves = torch.empty_like(slope[:, start : start + count])
    for sub in range(0, count, SUB_BLOCK):
        begin, end = start + sub, start + min(sub + SUB_BLOCK, count)
        columns = slice(begin, end)
        local = slope[:, columns] - hessian[:, columns, start:begin] @ moves[:, :sub]
        for i, j in enumerate(range(begin, end)):
            curvature = hessian[:, j, j].view(-1, 1).clamp(min=1e-30)
            wanted = deq[:, j] + local[:, i] / curvature
            new = encode(wanted, scale, zero, max_code.unsqueeze(1))
            moves[:, sub + i] = (new - codes[:, j]) * scale
            codes[:, j] = new
            row = hessian[:, columns, j].unsqueeze(2)
            local.addcmul_(row, moves[:, sub + i].unsqueeze(1), value=-1)
    return moves
