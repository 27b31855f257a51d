"""How makers store the quantized weights of their own models, and what numbers these are.

    codes [..., N, K], packed or not  x  a scale for each block  ->  weights [..., N, K]

A row of SOURCES says how names, types and shapes of codes and scales follow from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from mcmoe_vllm.disk import is_integer
from mcmoe_vllm.errors import UserError

Shape = tuple[int, ...]
Block = tuple[int, int]  # rows and columns that share a scale
Settings = Mapping[str, Any]  # quantization_config

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
INT4 = tuple(float(code - 8) for code in range(16))
WHOLE = 1 << 62  # columns of a block where a row has one scale
FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class SourceFormat:
    """How a quantized matrix [..., N, K] is stored.

    says: the format in words. codes, scale, weight: what the names of its codes and scales end
    with, and what that of the 16-bit tensor ends with instead; redundant: what others end with
    that say nothing new. numbers: codes -> float32 [..., N, K]; shape: the same, of their shapes.
    block: given quantization_config; the scales are [..., N / rows, K / columns], rounded up.
    transposed: whether the 16-bit tensor is [..., K, N].
    """

    says: str
    codes: str
    codes_dtype: str
    scale: str
    scale_dtypes: tuple[str, ...]
    weight: str
    numbers: Callable[[torch.Tensor], torch.Tensor]
    shape: Callable[[Shape], Shape]
    block: Callable[[Settings], Block]
    transposed: bool = False
    redundant: tuple[str, ...] = ()

    def beside(self, codes: str, suffix: str) -> str:
        """The name of a tensor that belongs to the codes of that name."""
        return codes.removesuffix(self.codes) + suffix

    def weight_shape(self, codes: Shape) -> Shape:
        """Of the 16-bit tensor."""
        *lead, n, k = self.shape(codes)
        return (*lead, k, n) if self.transposed else (*lead, n, k)

    def scale_shape(self, codes: Shape, block: Block) -> Shape:
        *lead, n, k = self.shape(codes)
        return (*lead, -(-n // block[0]), -(-k // block[1]))


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    format: SourceFormat,
    block: Block,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A matrix, or several [E, ...], as it is stored -> the 16-bit tensor in `dtype`.

    codes, scale: with the format's types and shapes. Products are made in float32, which holds most
    of them exactly, and are rounded to `dtype` at the end.
    """
    found = format.numbers(codes)
    (rows, columns), (n, k) = block, found.shape[-2:]
    scale = scale_values(scale).repeat_interleave(min(rows, n), -2)[..., :n, :]
    found *= scale.repeat_interleave(min(columns, k), -1)[..., :k]
    return (found.transpose(-1, -2) if format.transposed else found).to(dtype).contiguous()


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Scales as they are stored to float32. Bytes are exponents: 0 is 2^-127, 255 is NaN."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()


def nibbles(values: Sequence[float], packed: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits in integers [..., C], the first code lowest -> their values, float32
    [..., C * codes in an integer]."""
    pairs = torch.tensor([(values[byte & 15], values[byte >> 4]) for byte in range(256)])
    return pairs[packed.contiguous().view(torch.uint8).int()].flatten(-2)


def _block_size(settings: Settings) -> Block:
    """Of fp8 weights: 128 x 128 unless weight_block_size says otherwise."""
    size = settings.get("weight_block_size", [128, 128])
    if (block := _block(size)) is None:
        raise UserError(
            f"quantization_config has the weight_block_size {size!r:.60}; readable are fp8 weights "
            "with a scale for each block, such as [128, 128]"
        )
    return block


def _scheme(kind: str, bits: int, settings: Settings) -> Block:
    """What config_groups of compressed-tensors says of weights of a kind, "int" or "float"."""
    groups = settings.get("config_groups")
    members = groups.values() if isinstance(groups, dict) else ()
    schemes = [g.get("weights") for g in members if isinstance(g, dict)]
    of_kind = [s for s in schemes if isinstance(s, dict) and s.get("type", "int") == kind]
    blocks = {_scheme_block(scheme, bits) for scheme in of_kind}
    if len(blocks) != 1 or (block := blocks.pop()) is None:
        raise UserError(
            f"quantization_config has the config_groups {groups!r:.300}; readable are symmetric "
            f"weights of type {kind}, num_bits {bits}, of one strategy: group, channel or block"
        )
    return block


def _scheme_block(scheme: Settings, bits: int) -> Block | None:
    """None: it is not readable."""
    sizes = {
        "group": [1, scheme.get("group_size")],
        "channel": [1, WHOLE],
        "block": scheme.get("block_structure"),
    }
    known = scheme.get("num_bits") == bits and scheme.get("symmetric", True) is True
    return _block(sizes.get(str(scheme.get("strategy")))) if known else None


def _block(size: Any) -> Block | None:
    """None for what is not two positive whole numbers."""
    if not (isinstance(size, list) and len(size) == 2 and all(map(is_integer, size))):
        return None
    return (size[0], size[1]) if min(size) > 0 else None


def _as_stored(shape: Shape) -> Shape:
    return shape


def _columns(codes: int, shape: Shape) -> Shape:
    """Of integers that hold so many codes each."""
    return (*shape[:-1], shape[-1] * codes)


def _block_columns(shape: Shape) -> Shape:
    """Of blocks of bytes, two codes each."""
    return (*shape[:-2], 2 * shape[-2] * shape[-1])


def _block_numbers(blocks: torch.Tensor) -> torch.Tensor:
    return nibbles(E2M1, blocks).flatten(-2)


def _by_32(settings: Settings) -> Block:
    return 1, 32


_FP8 = SourceFormat(
    "fp8 blocks", "", "F8_E4M3", "_scale_inv", (*FLOATS, "F8_E8M0", "U8"), "",
    torch.Tensor.float, _as_stored, _block_size,
)  # fmt: skip
# quant_method -> the formats that it stores matrices in.
SOURCES: dict[str, tuple[SourceFormat, ...]] = {
    "compressed-tensors": (
        SourceFormat(
            "pack-quantized int4", ".weight_packed", "I32", ".weight_scale", FLOATS, ".weight",
            partial(nibbles, INT4), partial(_columns, 8), partial(_scheme, "int", 4),
            # The model's shape, which agreement holds against that of the codes.
            redundant=(".weight_shape",),
        ),
        SourceFormat(
            "float-quantized fp8", ".weight", "F8_E4M3", ".weight_scale", FLOATS, ".weight",
            torch.Tensor.float, _as_stored, partial(_scheme, "float", 8),
        ),
    ),
    "fp8": (
        _FP8,
        replace(_FP8, codes=".weight", scale=".scale", scale_dtypes=("F8_E8M0",), weight=".weight"),
        SourceFormat(
            "fp4 e2m1", ".weight", "I8", ".scale", ("F8_E8M0",), ".weight",
            partial(nibbles, E2M1), partial(_columns, 2), _by_32,
        ),
    ),
    "mxfp4": (
        SourceFormat(
            "blocks and scales", "_blocks", "U8", "_scales", ("U8",), "",
            _block_numbers, _block_columns, _by_32, transposed=True,
        ),
    ),
}  # fmt: skip
