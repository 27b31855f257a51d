"""Codes, scales and zeros of a batch of matrices, and what they lose."""

import math
from dataclasses import dataclass, fields

import torch

from mcmoe_vllm.quantize.precision import fast_products


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

    def select(self, rows: torch.Tensor) -> "Quantized":
        """Some rows N of every matrix, by their numbers; error fields are the whole's."""
        return Quantized(
            self.codes[:, rows],
            self.scale[:, rows],
            self.zero[:, rows],
            self.error,
            self.gptq_kept,
            self.damping,
        )


def relative_error(weight: torch.Tensor, hessian: torch.Tensor, error: torch.Tensor) -> float:
    """sqrt(tr(E H E^T) / tr(W H W^T)) over a batch: the share of the output that was lost."""
    w = weight.float()
    signal = ((w @ hessian) * w).sum().item()
    return math.sqrt(max(error.sum().item(), 0.0) / signal) if signal > 0 else 0.0


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    q = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return ((q - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2)


Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # codes [B,K,N], scale, zero [B,K/G,N]


def split_errors(w: torch.Tensor, codes: Codes, hessian: torch.Tensor, splits: int) -> torch.Tensor:
    """tr(D H D^T) of each stacked matrix, [B, splits], with the undamped Hessian."""
    return row_errors(w, codes, hessian).unflatten(1, (splits, -1)).sum(-1)


@fast_products
def row_errors(w: torch.Tensor, codes: Codes, hessian: torch.Tensor) -> torch.Tensor:
    """d H d^T of each row, [B, N]."""
    q, scale, zero = codes
    grouped = q.unflatten(1, (scale.shape[1], -1))
    d = w - ((grouped - zero.unsqueeze(2)) * scale.unsqueeze(2)).flatten(1, 2)  # [B, K, N]
    return ((hessian @ d) * d).sum(1)
