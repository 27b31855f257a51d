"""Scale and zero of a group by search, and rounding to nearest under them."""

from collections.abc import Iterable

import torch

from mcmoe_kernels.formats import FORMATS
from mcmoe_kernels.quantize.columns import fit_group_torch
from mcmoe_vllm.quantize.codes import Codes

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
        formats = [FORMATS[int(b)] for b in bits]

        def column(values: Iterable[float]) -> torch.Tensor:  # broadcasts over [B, N]
            return torch.tensor(list(values), device=bits.device).view(-1, 1).float()

        self.max_code = column(f.levels - 1 for f in formats)
        self.symmetric = symmetric
        self.steps = column(f.zero_steps if zeros == "half" else 1 for f in formats)  # of zeros
        self.weighted_binary = binary_scale == "hessian"
        self.power = NORM_POWER if search == "norm" else 2.0
        self.weighted = search == "hessian"
        if search == "hessian":
            shrink_min = torch.tensor(
                [SHRINK_MIN.get(f.width, 1.0) for f in formats], device=bits.device
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
        return self.search(w, importance)

    def search(
        self, w: torch.Tensor, importance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best of the ranges, by a kernel where there is a GPU."""
        fit_group = fit_group_torch
        if w.is_cuda:
            from mcmoe_kernels.quantize.columns_triton import fit_group

        return fit_group(
            w, importance, self.shrink.expand(-1, w.shape[0], 1)[..., 0], self.max_code[:, 0],
            self.steps[:, 0],
            power=self.power, weighted=self.weighted, symmetric=self.symmetric,
            weighted_binary=self.weighted_binary,
        )  # fmt: skip


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
