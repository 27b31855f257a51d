"""Weights to codes: round to nearest, GPTQ and the 1-bit case, as pure functions on batches.

All matrices of one shape are quantized in one batch, each at a width of its own: B matrices
W[B, N, K] with Hessians H[B, K, K] = X^T X of their inputs. Every width shares one formula,
w = (q - z) * s with q in 0..2^bits-1: integer zeros at 3 and 4 bits, multiples of 1/2 at 2 bits,
z = 0.5 at 1 bit, where that is sign(w) * s/2.
"""

import math
from dataclasses import dataclass, fields

import torch

from mcmoe_kernels import packing
from mcmoe_vllm.precision import fast_products
from mcmoe_vllm.recipes import BEST, Recipe

DAMPING = 0.01  # of the mean diagonal, as in GPTQ (arXiv 2210.17323, section 3)
REFINE_DAMPING = 0.2  # of the mean diagonal, in experts, which see few tokens each
DENSE_DAMPING = 0.02  # the same in linears that see all tokens
SHRINK_GRID = 24  # candidates for how far a group's range is clipped
SHRINK_MIN = {2: 0.40, 3: 0.55, 4: 0.70}  # the smallest range worth trying, by width
NORM_GRID = tuple(0.9 + 0.2 * i / 100 for i in range(101))  # shares of the range, range_search norm
NORM_POWER = 2.4
METHODS = ("gptq", "rtn", "minmax")
BLOCK = 128  # columns between two updates of the whole rest of the matrix
SUB_BLOCK = 32  # columns that are updated after each one of them


@dataclass(frozen=True)
class Quantized:
    """codes uint8 [B, N, K]; scale and zero float32 [B, N, K/G]; error float64 [B]:
    tr((W - Q) H (W - Q)^T); gptq_kept bool [B]: False where round to nearest was better;
    damping float32 [B]: the share of the mean diagonal that made the Hessian invertible."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    error: torch.Tensor
    gptq_kept: torch.Tensor
    damping: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """(q - z) * s, float32 [B, N, K]."""
        return _dequantize(self.codes, self.scale, self.zero)

    def matrix(self, position: int) -> "Quantized":
        """One matrix of the batch, as a batch of one."""
        one = slice(position, position + 1)
        return Quantized(*(getattr(self, f.name)[one].clone() for f in fields(self)))

    def select(self, rows: slice) -> "Quantized":
        """Some rows N of every matrix (w1 or w3 out of w13); error fields are the whole's."""
        return Quantized(
            self.codes[:, rows],
            self.scale[:, rows],
            self.zero[:, rows],
            self.error,
            self.gptq_kept,
            self.damping,
        )


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


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """The nearest value exact in bfloat16 and float16 and within what checkpoints hold, so that
    every engine and kernel sees the same weights; never zero. float32 in and out."""
    exact = scale.to(torch.bfloat16).float().clamp(packing.MIN_SCALE, packing.MAX_SCALE)
    return exact.to(torch.float16).float()


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
    bits: [B] integers in 1..4 or one for all; method: "gptq" or "rtn";
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
    if int(widths.min()) < 1 or int(widths.max()) > 4:
        raise ValueError(f"bits are {widths.tolist()}, allowed is 1..4")

    w = weight.float().transpose(1, 2).contiguous()  # [B, K, N]: columns lie side by side
    hessian = hessian.float()
    search = "full" if method == "minmax" else recipe.range_search
    fit = _GroupFit(widths, symmetric, search, recipe.binary_scale, recipe.zeros)
    rounded = _round_to_nearest(w, hessian, fit, group_size)
    rounded_error = _split_errors(w, rounded, hessian, splits)
    damping = torch.zeros(b, device=w.device)
    if method != "gptq":
        kept = torch.zeros_like(rounded_error, dtype=torch.bool)
        best, error = rounded, rounded_error
    else:
        factored = factored or factor_hessian(hessian)
        damping = factored.damping
        within = widths >= (1 if symmetric else recipe.compensated_bits)
        compensated = _gptq(w, hessian, factored.inverse, fit, group_size, within)
        if recipe.refinements:
            damped = _damp(hessian, DENSE_DAMPING if symmetric else REFINE_DAMPING)
            compensated = _refine(w, damped, compensated, fit, recipe.refinements)
        error = _split_errors(w, compensated, hessian, splits)
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
    extra = _damp(hessian, damping) - hessian
    lower, info = torch.linalg.cholesky_ex(hessian + extra)
    wanted = weight.float() @ (cross + extra)
    solved = torch.cholesky_solve(wanted.transpose(1, 2), lower).transpose(1, 2)
    sound = (info == 0).view(-1, 1, 1) & solved.isfinite().all(-1, keepdim=True)
    return torch.where(sound, solved, weight.float()).contiguous()


def relative_error(weight: torch.Tensor, hessian: torch.Tensor, error: torch.Tensor) -> float:
    """sqrt(tr(E H E^T) / tr(W H W^T)) over a batch: the share of the output that was lost."""
    w = weight.float()
    signal = ((w @ hessian) * w).sum().item()
    return math.sqrt(max(error.sum().item(), 0.0) / signal) if signal > 0 else 0.0


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    q = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return ((q - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2)


class _GroupFit:
    """Scale and zero of a group by search, for B matrices of different widths at once.

    search: "hessian", "norm" (as `Recipe.range_search`) or "full" (the range as it is).
    """

    def __init__(
        self,
        bits: torch.Tensor,
        symmetric: bool,
        search: str = "hessian",
        binary_scale: str = "hessian",
        zeros: str = "integer",
    ):
        column = bits.view(-1, 1).float()  # broadcasts over [B, N]
        self.max_code = 2**column - 1
        self.binary = column == 1
        self.symmetric = symmetric
        self.steps = torch.where(column == 2, 2.0 if zeros == "half" else 1.0, 1.0)  # of zeros
        self.weighted_binary = binary_scale == "hessian"
        self.power = NORM_POWER if search == "norm" else 2.0
        self.weighted = search == "hessian"
        if search == "hessian":
            shrink_min = torch.tensor(
                [SHRINK_MIN.get(int(b), 1.0) for b in bits], device=bits.device
            )
            steps = torch.linspace(0, 1, SHRINK_GRID, device=bits.device).view(-1, 1, 1)
            self.shrink = 1 - steps * (1 - shrink_min.view(1, -1, 1))  # [grid, B, 1]
        else:
            grid = NORM_GRID if search == "norm" else (1.0,)
            self.shrink = torch.tensor(grid, device=bits.device).view(-1, 1, 1)

    def __call__(
        self, w: torch.Tensor, importance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """w [B, G, N], importance [B, G] >= 0 (the Hessian's diagonal) -> scale, zero [B, N].

        Minimises sum importance * |w - deq|^power over ranges; 1 bit in closed form.
        """
        # A group that no input reaches still needs a sensible scale.
        importance = importance + 1e-6 * importance.mean(1, keepdim=True) + 1e-20
        if not w.is_cuda:
            return self.search(w, importance)
        from mcmoe_kernels.columns import fit_group

        return fit_group(
            w, importance, self.shrink.expand(-1, w.shape[0], 1)[..., 0], self.max_code[:, 0],
            self.steps[:, 0],
            power=self.power, weighted=self.weighted, symmetric=self.symmetric,
            weighted_binary=self.weighted_binary,
        )  # fmt: skip

    def search(
        self, w: torch.Tensor, importance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The definition of `mcmoe_kernels.columns.fit_group`."""
        importance = importance.unsqueeze(-1)
        low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
        if self.symmetric:
            middle = (self.max_code + 1) / 2
            high = torch.maximum(high * middle / (middle - 1), -low)
            low = -high
        best_error = torch.full_like(low, math.inf)
        best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
        for shrink in self.shrink:
            if self.symmetric:
                scale = round_scale(high * shrink / middle)
                zero = middle.expand_as(scale)
            else:
                scale = round_scale((high - low) * shrink / self.max_code)
                zero = -low * shrink / scale
                zero = (zero * self.steps).round() / self.steps
                zero = torch.minimum(zero.clamp(min=0), self.max_code)
            q = torch.round(w / scale.unsqueeze(1) + zero.unsqueeze(1)).clamp_(min=0)
            q = torch.minimum(q, self.max_code.unsqueeze(1))
            difference = (q - zero.unsqueeze(1)) * scale.unsqueeze(1) - w
            if self.power == 2:
                difference = difference.square_()
            else:
                difference = difference.abs_().pow_(self.power)
            error = (difference * importance if self.weighted else difference).sum(1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        if bool(self.binary.any()):
            mean = w.abs().mean(1)
            if self.weighted_binary:
                mean = (w.abs() * importance).sum(1) / importance.sum(1)
            best_scale = torch.where(self.binary, round_scale(2 * mean), best_scale)
            best_zero = torch.where(self.binary, 0.5, best_zero)
        return best_scale, best_zero


def encode(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, max_code: torch.Tensor
) -> torch.Tensor:
    """Codes of w, all [B, N], as floats; max_code [B, 1]."""
    return torch.minimum(torch.round(w / scale + zero).clamp(min=0), max_code)


_Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # codes [B,K,N], scale, zero [B,K/G,N]


def _round_to_nearest(
    w: torch.Tensor, hessian: torch.Tensor, fit: _GroupFit, group_size: int
) -> _Codes:
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    codes, scales, zeros = torch.empty_like(w), [], []
    for start in range(0, w.shape[1], group_size):
        columns = slice(start, start + group_size)
        scale, zero = fit(w[:, columns], diagonal[:, columns])
        q = torch.round(w[:, columns] / scale.unsqueeze(1) + zero.unsqueeze(1)).clamp_(min=0)
        codes[:, columns] = torch.minimum(q, fit.max_code.unsqueeze(1))
        scales.append(scale)
        zeros.append(zero)
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1)


@fast_products
def _gptq(
    w: torch.Tensor,
    hessian: torch.Tensor,
    inverse: torch.Tensor,
    fit: _GroupFit,
    group_size: int,
    within: torch.Tensor,
) -> _Codes:
    """Column by column, each column's error is moved onto the columns that are still to come
    (GPTQ, Algorithm 1). `inverse` [B, K, K] is the upper Cholesky factor of H^-1; matrices that
    `within` [B] excludes move it onto the blocks to come alone.

    Updates are lazy on two levels, which changes the memory traffic and not the result.
    """
    w = w.clone()
    moved = within.view(-1, 1, 1).to(w.dtype)
    compensate = compensate_torch
    if w.is_cuda:
        from mcmoe_kernels.columns import compensate
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
    """The definition of `mcmoe_kernels.columns.compensate`."""
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


@fast_products
def _refine(
    w: torch.Tensor, hessian: torch.Tensor, codes: _Codes, fit: _GroupFit, rounds: int
) -> _Codes:
    """Scales by least squares under the codes, then each code under the scales and all other
    codes, in turn; w [B, K, N]. Rows that end up worse keep what they had. Zeros stay."""
    q, scale, zero = codes
    group_size = q.shape[1] // scale.shape[1]
    target = hessian @ w
    start = _row_errors(w, codes, hessian)
    for _ in range(rounds):
        scale = _refit_scales(q, scale, zero, hessian, target)
        q = _descend(w, hessian, (q, scale, zero), fit, group_size)
    better = (_row_errors(w, (q, scale, zero), hessian) < start).unsqueeze(1)
    return torch.where(better, q, codes[0]), torch.where(better, scale, codes[1]), zero


def _damp(hessian: torch.Tensor, share: float) -> torch.Tensor:
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
    w: torch.Tensor, hessian: torch.Tensor, codes: _Codes, fit: _GroupFit, group_size: int
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
        from mcmoe_kernels.columns import descend
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
    """The definition of `mcmoe_kernels.columns.descend`."""
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


def _split_errors(
    w: torch.Tensor, codes: _Codes, hessian: torch.Tensor, splits: int
) -> torch.Tensor:
    """tr(D H D^T) of each stacked matrix, [B, splits], with the undamped Hessian."""
    return _row_errors(w, codes, hessian).unflatten(1, (splits, -1)).sum(-1)


@fast_products
def _row_errors(w: torch.Tensor, codes: _Codes, hessian: torch.Tensor) -> torch.Tensor:
    """d H d^T of each row, [B, N]."""
    q, scale, zero = codes
    grouped = q.unflatten(1, (scale.shape[1], -1))
    d = w - ((grouped - zero.unsqueeze(2)) * scale.unsqueeze(2)).flatten(1, 2)  # [B, K, N]
    return ((hessian @ d) * d).sum(1)
