"""Scale and zero of a group in one 16-bit word, the same in every format.

The word's bits, as an unsigned number:

    0..6    m, the scale's mantissa        scale = 2^(e - 24) * (1 + m / 128)
    7..11   e, its exponent
    12..15  the zero, in steps of 1 / zero_steps

so that scale and zero are exact in bfloat16.
"""

import torch

MIN_SCALE = 2.0**-24
MAX_SCALE = 2.0**7 * (1 + 127 / 128)
MAX_STEPS = 15
_EXPONENT = (127 - 24) << 7  # of the smallest scale, in the bits of bfloat16


def pack_scale(scale: torch.Tensor, zero: torch.Tensor, zero_steps: int) -> torch.Tensor:
    """Scale and zero [..., K/G] (any float dtype) to the stored words int16 [..., K/G].

    Raises ValueError for a scale or zero that a word cannot hold exactly.
    """
    scale = scale.float()
    steps = zero.float() * zero_steps
    problems = []
    inside = (scale >= MIN_SCALE) & (scale <= MAX_SCALE)
    if not bool((inside & (scale.bfloat16().float() == scale)).all()):
        problems.append(f"scales must be exact in bfloat16, {MIN_SCALE} to {MAX_SCALE}")
    if not bool(((steps >= 0) & (steps <= MAX_STEPS) & (steps == steps.round())).all()):
        problems.append(f"zeros must be multiples of {1 / zero_steps}, 0 to {MAX_STEPS} of them")
    if problems:
        raise ValueError("; ".join(problems))
    exponent_and_mantissa = scale.bfloat16().contiguous().view(torch.int16).int() - _EXPONENT
    word = exponent_and_mantissa | (steps.int() << 12)
    return (word - ((word & 0x8000) << 1)).to(torch.int16)


def unpack_scale(weight_scale: torch.Tensor, zero_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored words int16 [..., K/G] to scale and zero, float32 [..., K/G]: exact."""
    word = weight_scale.int()
    scale = ((word & 0xFFF) + _EXPONENT) << 16
    zero = ((word >> 12) & 15).float() / zero_steps
    return scale.view(torch.float32), zero


def apply_scale(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """(value - zero) * scale in float32: values [..., K], scale and zero [..., K/G]."""
    groups = scale.shape[-1]
    grouped = values.unflatten(-1, (groups, values.shape[-1] // groups)).float()
    return ((grouped - zero.float().unsqueeze(-1)) * scale.float().unsqueeze(-1)).flatten(-2)
