"""What a format of weight codes is, and the table of those there are.

A matrix W[N, K] of codes with groups of G columns is stored as

    weight_packed  uint8   [N, K*width/8]   the codes, as the format packs them
    weight_scale   int16   [N, K/G]         scale and zero of each group (`scales`)

and means W = (value of the code - zero) * scale. Everything that depends on how codes lie and what
they mean is in one `Format`; the rest of the package, and what compresses, asks `FORMATS`. Eight
codes always fill whole bytes, so a slice of K by whole groups is a slice of bytes.

Products take weights in one of two forms, and a format offers a device function for each that it
can give:

    codes8     int8 [N, 32] of a block of 32 columns, values that zero and scale apply to
    weights16  [N, 32] of a block in the activations' dtype, less zero or, asked for, times scale
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mcmoe_kernels.formats import scales
from mcmoe_kernels.formats.records import frame_bytes

CODES_PER_CHUNK = 8  # the smallest run of codes that fills whole bytes at every width
NUMBERS = 8  # an entry of a table of experts has three bits for the number, 0 for none


class Device(NamedTuple):
    """What a format does in kernels: functions for Triton.

    planes: those of one tile of a step (`records`), its width % 2 shared ones before its
    width // 2 own ones. TILE: 0 or 1, which tile. INLINE: whether inline PTX may be used.

    codes8(planes, TILE, WIDTH, INLINE): the four blocks of 32 columns. A plane is a tuple of
    elements, int8 or int32 of four bytes, and so is each block. None: the format has only
    `weights16`, and runs where that is used.
    weights16(planes, meta, TILE, BLOCK, WIDTH, SCALED, DTYPE, INLINE): block BLOCK. planes: int16
    [N, 16] each; meta: int32 [N], scale and zero of the block's group. SCALED: times the scale.
    """

    codes8: Any
    weights16: Any


@dataclass(frozen=True)
class Format:
    """name: for people. number: what tables hold for it, 1 to 7. width: bits of a stored code.
    zero_steps: zeros are multiples of 1 / zero_steps, 0 to 15 of them.

    pack: codes uint8 [..., K] -> uint8 [..., K*width/8]. unpack: its inverse.
    tile: weight_packed [N, K*width/8], weight_scale [N, K/G] -> records uint8 [N/64, steps,
    record_bytes(G)], N a multiple of 64 (`records`). untile: (records, K, G) -> what was tiled.
    device: its functions on a GPU; called only where Triton is installed.
    values: what each code stands for, before zero and scale; None: the codes themselves.
    """

    name: str
    number: int
    width: int
    zero_steps: int
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor]
    tile: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    untile: Callable[[torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]
    device: Callable[[], Device]
    values: tuple[float, ...] | None = None

    @property
    def levels(self) -> int:
        """How many codes there are, from 0 on."""
        return 1 << self.width

    @property
    def exact16(self) -> bool:
        """Whether a code less its zero is exact in bfloat16, which holds integers up to 2^8."""
        return self.values is None and self.levels * self.zero_steps <= 1 << 8

    def packed_bytes(self, rows: int, columns: int, group_size: int) -> int:
        """Bytes of a [rows, columns] matrix in a checkpoint, scales and zeros included."""
        return rows * columns * self.width // 8 + rows * (columns // group_size) * 2

    def record_bytes(self, group_size: int) -> int:
        """Bytes of 64 rows of two tiles of 128 columns."""
        return frame_bytes(self.width, group_size)

    def pack_scale(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return scales.pack_scale(scale, zero, self.zero_steps)

    def unpack_scale(self, weight_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return scales.unpack_scale(weight_scale, self.zero_steps)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes [...] stand for, before zero and scale: float32 [...]."""
        if self.values is None:
            return codes.float()
        return torch.tensor(self.values, device=codes.device)[codes.long()]

    def dequantize(self, packed: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
        """What is stored of one matrix (or a stack of them) to float32 [..., N, K]: exact."""
        values = self.decode(self.unpack(packed))
        return scales.apply_scale(values, *self.unpack_scale(weight_scale))


FORMATS: dict[int, Format] = {}


def register(*formats: Format) -> None:
    """Add formats to the table. Raises ValueError for a number that is taken or out of range."""
    for added in formats:
        if not 0 < added.number < NUMBERS:
            raise ValueError(f"{added.name} has number {added.number}, allowed is 1..{NUMBERS - 1}")
        if FORMATS.setdefault(added.number, added) is not added:
            raise ValueError(
                f"number {added.number} of {added.name} is {FORMATS[added.number].name}'s"
            )


def find(number: int) -> Format:
    """The format of a number. Raises ValueError naming those there are."""
    if number not in FORMATS:
        raise ValueError(f"bits must be one of {tuple(sorted(FORMATS))}, got {number}")
    return FORMATS[number]
