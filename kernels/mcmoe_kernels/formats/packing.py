"""The bit layout of a quantized expert matrix, in plain torch.

A matrix W[N, K] of codes q in 0..2^bits-1 with groups of G columns is stored as

    weight_packed  uint8   [N, K*bits/8]   the codes of a row as one little-endian bit stream:
                                           code k occupies stream bits k*bits .. k*bits+bits-1,
                                           stream bit i is bit i%8 of byte i//8
    weight_scale   int16   [N, K/G]        scale and zero of each group in one word

and means W = (q - zero) * scale. The word's bits, as an unsigned number:

    0..6    m, the scale's mantissa        scale = 2^(e - 24) * (1 + m / 128)
    7..11   e, its exponent
    12..15  the zero, in halves at 1 and 2 bits, in ones at 3 and 4

so that scale and zero are exact in bfloat16. Zeros are 0.5 at 1 bit (sign times half the scale)
and within the codes' range else. Eight codes always fill whole bytes, so a slice of K by whole
groups is a slice of bytes.
"""

import torch

BIT_WIDTHS = (1, 2, 3, 4)


GROUP_SIZES = (32, 64, 128)


ZERO_STEPS = {1: 2, 2: 2, 3: 1, 4: 1}  # bits -> of zeros, in one


MIN_SCALE = 2.0**-24


MAX_SCALE = 2.0**7 * (1 + 127 / 128)


_EXPONENT = (127 - 24) << 7  # of the smallest scale, in the bits of bfloat16


CODES_PER_CHUNK = 8  # the smallest run of codes that fills whole bytes at every width


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [..., K] (any integer dtype, values 0..2^bits-1) to uint8 [..., K*bits/8].

    Raises ValueError for a width outside 1..4, a K that is no multiple of 8, or codes out of
    range.
    """
    _check_bits(bits)
    k = codes.shape[-1]
    if k % CODES_PER_CHUNK:
        raise ValueError(f"the last dimension must be a multiple of {CODES_PER_CHUNK}, got {k}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(
            f"codes span {int(codes.min())}..{int(codes.max())}, allowed is 0..{(1 << bits) - 1}"
        )
    chunks = codes.to(torch.int32).unflatten(-1, (k // CODES_PER_CHUNK, CODES_PER_CHUNK))
    shifts = torch.arange(CODES_PER_CHUNK, device=codes.device, dtype=torch.int32) * bits
    words = (chunks << shifts).sum(-1, dtype=torch.int64)  # 8 codes of <= 4 bits: <= 32 bits
    bytes_ = torch.stack([(words >> (8 * i)) & 0xFF for i in range(bits)], dim=-1)
    return bytes_.to(torch.uint8).flatten(-2)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack uint8 [..., K*bits/8] to codes uint8 [..., K]; the inverse of `pack`.

    Raises ValueError for a width outside 1..4 or a last dimension that is no multiple of bits.
    """
    _check_bits(bits)
    if packed.shape[-1] % bits:
        raise ValueError(f"{packed.shape[-1]} bytes are no whole number of {bits}-byte chunks")
    chunks = packed.to(torch.int32).unflatten(-1, (packed.shape[-1] // bits, bits))
    if bits == 3:  # a chunk is 24 bits
        words = chunks[..., 0] | (chunks[..., 1] << 8) | (chunks[..., 2] << 16)
        shifts = torch.arange(CODES_PER_CHUNK, device=packed.device, dtype=torch.int32) * bits
        codes = (words.unsqueeze(-1) >> shifts) & 7
    else:  # codes do not cross bytes
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.int32)
        codes = (chunks.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
        codes = codes.flatten(-2)
    return codes.to(torch.uint8).flatten(-2)


def pack_scale(scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Scale and zero [..., K/G] (any float dtype) to the stored words int16 [..., K/G].

    Raises ValueError for a scale or zero that a word cannot hold exactly.
    """
    _check_bits(bits)
    scale = scale.float()
    steps = zero.float() * ZERO_STEPS[bits]
    problems = []
    inside = (scale >= MIN_SCALE) & (scale <= MAX_SCALE)
    if not bool((inside & (scale.bfloat16().float() == scale)).all()):
        problems.append(f"scales must be exact in bfloat16, {MIN_SCALE} to {MAX_SCALE}")
    if not bool(((steps >= 0) & (steps <= 15) & (steps == steps.round())).all()):
        problems.append(f"zeros must be multiples of {1 / ZERO_STEPS[bits]}, 0 to 15 of them")
    if problems:
        raise ValueError("; ".join(problems))
    exponent_and_mantissa = scale.bfloat16().contiguous().view(torch.int16).int() - _EXPONENT
    word = exponent_and_mantissa | (steps.int() << 12)
    return (word - ((word & 0x8000) << 1)).to(torch.int16)


def unpack_scale(weight_scale: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored words int16 [..., K/G] to scale and zero, float32 [..., K/G]: exact."""
    _check_bits(bits)
    word = weight_scale.int()
    scale = ((word & 0xFFF) + _EXPONENT) << 16
    zero = ((word >> 12) & 15).float() / ZERO_STEPS[bits]
    return scale.view(torch.float32), zero


def upgrade_scale(weight_scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The float16 [..., 2*K/G] of format version 1, scale and zero interleaved, to the stored words
    int16 [..., K/G].

    Raises ValueError for a scale or zero that a word cannot hold exactly.
    """
    pairs = weight_scale.unflatten(-1, (weight_scale.shape[-1] // 2, 2))
    return pack_scale(pairs[..., 0], pairs[..., 1], bits)


def dequantize_codes(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """(q - zero) * scale in float32: codes [..., K], scale and zero [..., K/G] -> [..., K]."""
    groups = scale.shape[-1]
    q = codes.unflatten(-1, (groups, codes.shape[-1] // groups)).float()
    return ((q - zero.float().unsqueeze(-1)) * scale.float().unsqueeze(-1)).flatten(-2)


def dequantize(packed: torch.Tensor, weight_scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The stored pair of one matrix (or a stack of them) to float32 [..., N, K]: exact."""
    return dequantize_codes(unpack(packed, bits), *unpack_scale(weight_scale, bits))


def packed_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Bytes that a [rows, columns] matrix takes in a checkpoint, scales and zeros included."""
    if bits == 0:
        return 0
    return rows * columns * bits // 8 + rows * (columns // group_size) * 2


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
    return dequantize_codes(codes, scale, torch.full_like(scale, 8.0))


def _check_bits(bits: int) -> None:
    if bits not in BIT_WIDTHS:
        raise ValueError(f"bits must be one of {BIT_WIDTHS}, got {bits}")
