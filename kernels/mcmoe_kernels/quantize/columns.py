"""What GPTQ and its refinement do column by column, in plain torch: the definition.

Columns lie side by side: weights are [B, K, N], B matrices of K columns and N rows.
"""

import torch

SUB_BLOCK = 32  # columns that are updated after each one of them


def encode(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, max_code: torch.Tensor
) -> torch.Tensor:
    """Codes of w, all [B, N], as floats; max_code [B, 1]."""
    return torch.minimum(torch.round(w / scale + zero).clamp(min=0), max_code)


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
