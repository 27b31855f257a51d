"""What GPTQ and its refinement do column by column, in one launch for a group.

Rows of a weight matrix are quantized independently of each other, so a program takes 32 rows, with
32 columns at a time in registers; in plain torch (`columns`, the definition) the same is a
dozen launches a column, and the launches take nearly all the time. Columns lie side by side:
weights are [B, K, N], B matrices of K columns and N rows.
"""

import torch
import triton
import triton.language as tl

from mcmoe_kernels.formats import scales

ROWS = 32  # of a program
COLUMNS = 32  # that it holds at a time
MAX_STEPS = tl.constexpr(float(scales.MAX_STEPS))  # of a zero


@triton.jit
def encode(value, max_code):
    """The nearest code, ties to even as in torch.round. 1.5 * 2^23 leaves no room for a fraction
    where it is added."""
    return (tl.minimum(tl.maximum(value, 0.0), max_code) + 12582912.0) - 12582912.0


@triton.jit
def round_scale(scale):
    """`quantizer.round_scale`: to the nearest value exact in bfloat16 and float16, in range."""
    # By hand: Triton's interpreter would cut the lower half off.
    bits = scale.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    exact = bits.to(tl.float32, bitcast=True)
    exact = tl.minimum(tl.maximum(exact, 5.9604644775390625e-08), 255.0)
    return exact.to(tl.float16).to(tl.float32)


@triton.jit
def column_of(tile, j):
    """Column j of a tile [columns, rows]: float32 [rows]."""
    here = tl.arange(0, tile.shape[0]) == j
    return tl.sum(tl.where(here[:, None], tile, 0.0), 0)


@triton.jit(do_not_specialize=["shrink_count"])
def fit_group_kernel(w, importance, shrinks, max_codes, zero_steps, scales, zeros, rows,
                     batch_stride, column_stride, shrink_count, GROUP_SIZE: tl.constexpr,
                     POWER: tl.constexpr, WEIGHTED: tl.constexpr, SYMMETRIC: tl.constexpr,
                     WEIGHTED_BINARY: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < rows
    k = tl.arange(0, GROUP_SIZE)
    at = batch.to(tl.int64) * batch_stride + k[:, None].to(tl.int64) * column_stride + n[None, :]
    tile = tl.load(w + at, mask=inside[None, :], other=0.0)
    weight = tl.load(importance + batch * GROUP_SIZE + k)
    max_code = tl.load(max_codes + batch)
    steps = tl.load(zero_steps + batch)
    low = tl.minimum(tl.min(tile, 0), 0.0)
    high = tl.maximum(tl.max(tile, 0), 0.0)
    middle = (max_code + 1) / 2
    if SYMMETRIC:
        high = tl.maximum(tl.div_rn(high * middle, middle - 1), -low)
        low = -high
    best_error = tl.full((BLOCK_N,), float("inf"), tl.float32)
    best_scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    best_zero = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.range(0, shrink_count):
        shrink = tl.load(shrinks + i * tl.num_programs(1) + batch)
        if SYMMETRIC:
            scale = round_scale(tl.div_rn(high * shrink, middle + tl.zeros_like(high)))
            zero = middle + tl.zeros_like(scale)
        else:
            scale = round_scale(tl.div_rn((high - low) * shrink, max_code + tl.zeros_like(high)))
            zero = tl.div_rn(-low * shrink, scale)
            zero = encode(zero * steps, tl.minimum(max_code * steps, MAX_STEPS))
            zero = tl.div_rn(zero, steps + zero * 0)
        wide = scale[None, :] + tl.zeros_like(tile)
        q = encode(tl.div_rn(tile, wide) + zero[None, :], max_code)
        difference = tl.abs((q - zero[None, :]) * scale[None, :] - tile)
        if POWER == 2:
            difference = difference * difference
        else:
            difference = tl.where(
                difference > 0, tl.exp2(POWER * tl.log2(tl.maximum(difference, 1e-37))), 0.0
            )
        if WEIGHTED:
            difference = difference * weight[:, None]
        error = tl.sum(difference, 0)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    if max_code == 1:
        if WEIGHTED_BINARY:
            total = tl.sum(weight, 0) + tl.zeros_like(best_scale)
            mean = tl.div_rn(tl.sum(tl.abs(tile) * weight[:, None], 0), total)
        else:
            mean = tl.sum(tl.abs(tile), 0) / GROUP_SIZE
        best_scale = round_scale(2 * mean)
        best_zero = tl.full((BLOCK_N,), 0.5, tl.float32)
    at = batch.to(tl.int64) * rows + n
    tl.store(scales + at, best_scale, mask=inside)
    tl.store(zeros + at, best_zero, mask=inside)


def fit_group(
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
    """Scale and zero [B, N] of one group w [B, G, N] by search, as `columns.fit_group_torch`.

    importance [B, G]; shrink [S, B]: shares of the range to try; max_code [B]; zero_steps [B]:
    zeros are multiples of 1/steps.
    """
    batch, group_size, rows = w.shape
    if w.stride(2) != 1:
        raise ValueError("rows of w must lie side by side")
    scale, zero = (torch.empty(batch, rows, device=w.device) for _ in range(2))
    fit_group_kernel[(triton.cdiv(rows, ROWS), batch)](
        w, importance.contiguous(), shrink.contiguous(), max_code.contiguous(),
        zero_steps.contiguous(), scale, zero,
        rows, w.stride(0), w.stride(1), shrink.shape[0],
        GROUP_SIZE=group_size, POWER=power, WEIGHTED=weighted, SYMMETRIC=symmetric,
        WEIGHTED_BINARY=weighted_binary, BLOCK_N=ROWS, num_warps=4,
    )  # fmt: skip
    return scale, zero


@triton.jit(do_not_specialize=["start", "count", "at_error"])
def compensate_kernel(w, codes, errors, scale, zero, inverse, max_codes, moved, rows, columns,
                      start, count, at_error, error_columns, COUNT: tl.constexpr,
                      BLOCK_N: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < rows
    k = tl.arange(0, COUNT)
    s = tl.load(scale + batch * rows + n, mask=inside, other=1.0)
    z = tl.load(zero + batch * rows + n, mask=inside, other=0.0)
    max_code = tl.load(max_codes + batch)
    share = tl.load(moved + batch)
    first = (batch * columns + start) * rows + n
    errors += (batch * error_columns + at_error) * rows + n
    inverse += (batch * columns + start) * columns + start
    for sub in tl.range(0, count, COUNT):
        at = first[None, :] + (sub + k)[:, None] * rows
        tile = tl.load(w + at, mask=inside[None, :], other=0.0)
        for before in tl.range(0, sub, COUNT):
            past = errors[None, :] + (before + k)[:, None] * rows
            past = tl.load(past, mask=inside[None, :], other=0.0)
            factor = tl.load(inverse + (before + k)[None, :] * columns + (sub + k)[:, None])
            tile -= tl.dot(factor * share, past, input_precision="ieee")
        for j in tl.range(0, COUNT):
            column = column_of(tile, j)
            q = encode(tl.div_rn(column, s) + z, max_code)
            here = inverse + (sub + j) * columns + sub
            error = tl.div_rn(column - (q - z) * s, tl.load(here + j) + tl.zeros_like(column))
            tl.store(codes + first + (sub + j) * rows, q, mask=inside)
            tl.store(errors + (sub + j) * rows, error, mask=inside)
            row = tl.load(here + k, mask=k > j, other=0.0) * share
            tile -= row[:, None] * error[None, :]
        tl.debug_barrier()  # threads read each other's errors


def compensate(
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
    """Encode columns start to start + count of w [B, K, N], each with the errors of those before
    it moved onto it, as `quantizer.compensate_torch`.

    scale, zero [B, N] of the group; inverse [B, K, K]; max_code, moved [B]: the largest code, and
    1 or 0 for matrices whose errors are moved. Writes codes [B, K, N] and, from column at_error
    on, errors [B, columns, N]; w stays as it is. count: a multiple of 32.
    """
    batch, columns, rows = w.shape
    compensate_kernel[(triton.cdiv(rows, ROWS), batch)](
        w, codes, errors, scale, zero, inverse, max_code, moved, rows, columns, start, count,
        at_error, errors.shape[1], COUNT=COLUMNS, BLOCK_N=ROWS, num_warps=1, num_stages=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["start", "count"])
def descend_kernel(slope, deq, codes, moves, scale, zero, hessian, max_codes, rows, columns,
                   start, count, COUNT: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < rows
    k = tl.arange(0, COUNT)
    s = tl.load(scale + batch * rows + n, mask=inside, other=1.0)
    z = tl.load(zero + batch * rows + n, mask=inside, other=0.0)
    max_code = tl.load(max_codes + batch)
    first = (batch * columns + start) * rows + n
    moves += batch * count * rows + n
    hessian += (batch * columns + start) * columns + start
    for sub in tl.range(0, count, COUNT):
        at = first[None, :] + (sub + k)[:, None] * rows
        local = tl.load(slope + at, mask=inside[None, :], other=0.0)
        for before in tl.range(0, sub, COUNT):
            past = moves[None, :] + (before + k)[:, None] * rows
            past = tl.load(past, mask=inside[None, :], other=0.0)
            factor = tl.load(hessian + (before + k)[None, :] * columns + (sub + k)[:, None])
            local -= tl.dot(factor, past, input_precision="ieee")
        for j in tl.range(0, COUNT):
            here = hessian + (sub + j) * columns + sub
            curvature = tl.maximum(tl.load(here + j), 1e-30)
            pull = tl.div_rn(column_of(local, j), curvature + tl.zeros_like(s))
            column = first + (sub + j) * rows
            wanted = tl.load(deq + column, mask=inside, other=0.0) + pull
            new = encode(tl.div_rn(wanted, s) + z, max_code)
            move = (new - tl.load(codes + column, mask=inside, other=0.0)) * s
            tl.store(codes + column, new, mask=inside)
            tl.store(moves + (sub + j) * rows, move, mask=inside)
            local -= tl.load(here + k)[:, None] * move[None, :]
        tl.debug_barrier()  # threads read each other's moves


def descend(
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
    """Set columns start to start + count of codes [B, K, N], in turn, to their best given all
    others, as `quantizer.descend_torch`; returns by how much their values moved, [B, count, N].

    slope [B, K, N]: H (w - deq); deq [B, K, N]: the values of `codes` as they come in; scale, zero
    [B, N] of the group; hessian [B, K, K], symmetric; max_code [B]. count: a multiple of 32.
    """
    batch, columns, rows = slope.shape
    moves = torch.empty(batch, count, rows, device=slope.device)
    descend_kernel[(triton.cdiv(rows, ROWS), batch)](
        slope, deq, codes, moves, scale, zero, hessian, max_code, rows, columns, start, count,
        COUNT=COLUMNS, BLOCK_N=ROWS, num_warps=1, num_stages=1,
    )  # fmt: skip
    return moves
