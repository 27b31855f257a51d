"""Scale and zero of a group by search, and rounding to nearest under them."""

import math

import torch

from mcmoe_vllm.quantize.codes import Codes, round_scale

SHRINK_GRID = 24  # candidates for how far a group's range is clipped
SHRINK_MIN = {2: 0.40, 3: 0.55, 4: 0.70}  # the smallest range worth trying, by width
NORM_GRID = tuple(0.9 + 0.2 * i / 100 for i in range(101))  # shares of the range, range_search norm
NORM_POWER = 2.4


class GroupFit:
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
        from mcmoe_kernels.quantize.columns_triton import fit_group

        return fit_group(
            w, importance, self.shrink.expand(-1, w.shape[0], 1)[..., 0], self.max_code[:, 0],
            self.steps[:, 0],
            power=self.power, weighted=self.weighted, symmetric=self.symmetric,
            weighted_binary=self.weighted_binary,
        )  # fmt: skip

    def search(
        self, w: torch.Tensor, importance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The definition of `mcmoe_kernels.quantize.columns_triton.fit_group`."""
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


def round_to_nearest(
    w: torch.Tensor, hessian: torch.Tensor, fit: GroupFit, group_size: int
) -> Codes:
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
