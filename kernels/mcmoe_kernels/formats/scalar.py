"""The formats "scalar1" to "scalar4": codes of 1 to 4 bits that are their own values.

In a file the codes of a row are one little-endian bit stream: code k occupies stream bits
k*width .. k*width+width-1, stream bit i is bit i%8 of byte i//8. Zeros are in halves at 1 and 2
bits, in ones at 3 and 4: 0.5 at 1 bit (sign times half the scale) and within the codes' range else.

In a record (`records`)

    1 bit    the shared plane holds both tiles
    2 bits   a tile's plane holds it
    3 bits   a tile's plane holds its low two bits, the shared plane the high ones of both
    4 bits   the first of a tile's planes holds blocks 0 and 2, the second 1 and 3

at the bits that `LOW` and `HIGH` say. 3 bits become 4-bit planes after one merge:
(low & 0x33) | (high & 0x44).
"""

from functools import partial

import torch

from mcmoe_kernels.formats import records
from mcmoe_kernels.formats.format import CODES_PER_CHUNK, Device, Format, register

# Bits in a tile's own planes -> for each of the planes ((block, shift), ...).
LOW: dict[int, tuple[tuple[tuple[int, int], ...], ...]] = {
    0: (),
    2: (tuple((b, 2 * b) for b in range(4)),),
    4: tuple(tuple((p + 2 * f, 4 * f) for f in range(2)) for p in range(2)),
}
# Width -> bit of the shared plane that holds the top bit of (tile, block). 3 bits: with the low
# plane shifted right by 2 * (block % 2) and the shared one by block % 2 - 2 * tile, blocks b and
# b + 2 are nibbles.
HIGH = {1: ((0, 1, 2, 3), (4, 5, 6, 7)), 3: ((2, 3, 6, 7), (0, 1, 4, 5))}


def pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Codes uint8 [..., K] to the bit stream uint8 [..., K*width/8]."""
    chunks = codes.to(torch.int32).unflatten(-1, (-1, CODES_PER_CHUNK))
    shifts = torch.arange(CODES_PER_CHUNK, device=codes.device, dtype=torch.int32) * width
    words = (chunks << shifts).sum(-1, dtype=torch.int64)  # 8 codes of <= 4 bits: <= 32 bits
    bytes_ = torch.stack([(words >> (8 * i)) & 0xFF for i in range(width)], dim=-1)
    return bytes_.to(torch.uint8).flatten(-2)


def unpack(packed: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of `pack`, without 32-bit numbers: a CPU is bound by the memory they take."""
    chunks = packed.unflatten(-1, (-1, width))
    codes = packed.new_empty(*chunks.shape[:-1], CODES_PER_CHUNK)
    mask = (1 << width) - 1
    for i in range(CODES_PER_CHUNK):
        byte, shift = divmod(i * width, 8)
        code = chunks[..., byte] >> shift
        if shift + width > 8:  # the code continues in the next byte; uint8 drops the overflow
            code |= chunks[..., byte + 1] << (8 - shift)
        torch.bitwise_and(code, mask, out=codes[..., i])
    return codes.flatten(-2)


def tile(packed: torch.Tensor, weight_scale: torch.Tensor, width: int) -> torch.Tensor:
    """`Format.tile`."""
    codes = unpack(packed, width)
    blocks = records.to_blocks(codes)
    low, planes = width // 2 * 2, []
    if width % 2:
        places = [(t, b, HIGH[width][t][b]) for t in range(2) for b in range(4)]
        high = blocks >> low
        planes.append(sum(high[:, :, t, b] << at for t, b, at in places))
    blocks = blocks & ((1 << low) - 1)
    for t in range(2):
        planes += [sum(blocks[:, :, t, b] << at for b, at in plane) for plane in LOW[low]]
    return records.join(weight_scale, planes, codes.shape[1] // weight_scale.shape[1])


def untile(
    record: torch.Tensor, columns: int, group_size: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Format.untile`."""
    weight_scale, planes = records.split(record, columns, group_size)
    low = width // 2 * 2
    blocks = record.new_zeros(*record.shape[:2], 2, 4, records.TILE_ROWS, records.BLOCK_COLUMNS)
    for t in range(2):
        for p, plane in enumerate(LOW[low]):
            for b, at in plane:
                own = planes[:, :, width % 2 + t * len(LOW[low]) + p]
                blocks[:, :, t, b] = (own >> at) & ((1 << low) - 1)
        if width % 2:
            for b in range(4):
                blocks[:, :, t, b] |= ((planes[:, :, 0] >> HIGH[width][t][b]) & 1) << low
    return pack(records.from_blocks(blocks, columns), width), weight_scale


def device() -> Device:
    from mcmoe_kernels.formats.device.scalar8 import codes8
    from mcmoe_kernels.formats.device.scalar16 import weights16

    return Device(codes8, weights16)


def scalar(width: int, zero_steps: int) -> Format:
    return Format(
        f"scalar{width}",
        width,
        width,
        zero_steps,
        partial(pack, width=width),
        partial(unpack, width=width),
        partial(tile, width=width),
        partial(untile, width=width),
        device,
    )


register(scalar(1, 2), scalar(2, 2), scalar(3, 1), scalar(4, 1))
