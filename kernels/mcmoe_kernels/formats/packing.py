"""What is stored of a matrix, by the number of its format; and dense linears of 4 bits.

A number is what `FORMATS` has: 1 to 4 are codes of as many bits, which is why it is called `bits`
here, as in a checkpoint.
"""

import torch

from mcmoe_kernels.formats.format import CODES_PER_CHUNK, find
from mcmoe_kernels.formats.scales import MAX_SCALE as MAX_SCALE
from mcmoe_kernels.formats.scales import MIN_SCALE as MIN_SCALE
from mcmoe_kernels.formats.scales import apply_scale


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [..., K] (any integer dtype, values 0..levels-1) to uint8 [..., K*width/8].

    Raises ValueError for a format that does not exist, a K that is no multiple of 8, or codes out
    of range.
    """
    format_, k = find(bits), codes.shape[-1]
    if k % CODES_PER_CHUNK:
        raise ValueError(f"the last dimension must be a multiple of {CODES_PER_CHUNK}, got {k}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= format_.levels):
        raise ValueError(
            f"codes span {int(codes.min())}..{int(codes.max())}, allowed is 0..{format_.levels - 1}"
        )
    return format_.pack(codes.to(torch.uint8))


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack uint8 [..., K*width/8] to codes uint8 [..., K]; the inverse of `pack`.

    Raises ValueError for a format that does not exist or a last dimension that is no multiple of
    the width.
    """
    format_ = find(bits)
    if packed.shape[-1] % format_.width:
        raise ValueError(
            f"{packed.shape[-1]} bytes are no whole number of {format_.width}-byte chunks"
        )
    return format_.unpack(packed)


def pack_scale(scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Scale and zero [..., K/G] (any float dtype) to the stored words int16 [..., K/G].

    Raises ValueError for a scale or zero that a word cannot hold exactly.
    """
    return find(bits).pack_scale(scale, zero)


def unpack_scale(weight_scale: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored words int16 [..., K/G] to scale and zero, float32 [..., K/G]: exact."""
    return find(bits).unpack_scale(weight_scale)


def upgrade_scale(weight_scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The float16 [..., 2*K/G] of format version 1, scale and zero interleaved, to the stored words
    int16 [..., K/G].

    Raises ValueError for a scale or zero that a word cannot hold exactly.
    """
    pairs = weight_scale.unflatten(-1, (weight_scale.shape[-1] // 2, 2))
    return pack_scale(pairs[..., 0], pairs[..., 1], bits)


def dequantize(packed: torch.Tensor, weight_scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The stored pair of one matrix (or a stack of them) to float32 [..., N, K]: exact."""
    return find(bits).dequantize(packed, weight_scale)


def packed_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Bytes that a [rows, columns] matrix takes in a checkpoint, scales and zeros included."""
    return find(bits).packed_bytes(rows, columns, group_size) if bits else 0


def pack_int4_linear(codes: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] in 0..15 of a dense linear to int32 [K/8, N], eight codes of K in a word,
    the lowest first: the layout that GPTQ checkpoints use and vLLM's int4 kernels load."""
    if codes.shape[-1] % 8:
        raise ValueError(f"in_features must be a multiple of 8, got {codes.shape[-1]}")
    words = codes.t().to(torch.int64).unflatten(0, (-1, 8))  # [K/8, 8, N]
    shifts = (torch.arange(8, device=codes.device) * 4).view(1, 8, 1)
    packed = (words << shifts).sum(1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def unpack_int4_linear(qweight: torch.Tensor) -> torch.Tensor:
    """Int32 [K/8, N] to codes uint8 [N, K]; the inverse of `pack_int4_linear`."""
    shifts = (torch.arange(8, device=qweight.device, dtype=torch.int32) * 4).view(1, 8, 1)
    codes = (qweight.unsqueeze(1) >> shifts) & 15
    return codes.flatten(0, 1).t().to(torch.uint8).contiguous()


def dequantize_int4_linear(qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(q - 8) * scale in float32: qweight int32 [K/8, N], scales [K/G, N] -> [N, K]."""
    codes = unpack_int4_linear(qweight)
    scale = scales.t().float()
    return apply_scale(codes, scale, torch.full_like(scale, 8.0))
