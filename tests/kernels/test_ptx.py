"""The inline PTX of dequantization, executed instruction by instruction in torch: no GPU needed.

`test_dequantization` runs the same strings on a GPU. Here a small machine of 32-bit registers,
int64 tensors [words], does what the PTX manual says of the few instructions that they use.
"""

import re

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from mcmoe_kernels.formats.device.scalar16 import (  # noqa: E402
    _magic,
    _place,
    _scale_lost,
    _weights_asm,
    _zero_base,
    split_bfloat16,
)
from mcmoe_kernels.formats.device.words import split_meta  # noqa: E402
from mcmoe_kernels.formats.packing import pack_scale, unpack_scale  # noqa: E402
from tests.kernels.test_dequantization import offset_of  # noqa: E402

WORD = (1 << 32) - 1
HALVES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
DTYPES = [torch.bfloat16, torch.float16]


def from_bits(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The low 16 bits as a number, float64."""
    return bits.to(torch.int16).view(dtype).double()


def to_bits(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype).view(torch.int16).long() & 0xFFFF


def fma(dtype: torch.dtype, *operands: torch.Tensor) -> torch.Tensor:
    """a * b + c of both halves. float64 holds it exactly here, and rounds once."""
    halves = []
    for shift in (0, 16):
        a, b, c = (from_bits(x >> shift, dtype) for x in operands)
        halves.append(to_bits(a * b + c, dtype))
    return halves[0] | halves[1] << 16


def execute(assembly: str, *inputs: torch.Tensor) -> torch.Tensor:
    """The register $0; inputs are $1, $2, ..., int64 [n] of 32-bit words."""
    registers = {f"${i}": value for i, value in enumerate(inputs, 1)}
    names = re.search(r"\.reg \.b32 ([^;]*);", assembly)[1].split(", ")
    assert not set(names) & set(registers)
    body = assembly[assembly.index(";") + 1 :].strip(" }")
    for line in filter(None, (part.strip() for part in body.split(";"))):
        operation, rest = line.split(" ", 1)
        target, *sources = rest.split(", ")
        values = [
            registers[s] if s in registers else torch.full_like(inputs[0], int(s, 0))
            for s in sources
            if s in registers or s[0].isdigit()
        ]
        assert len(values) == len(sources), f"{line!r} reads a register that nothing wrote"
        registers[target] = OPERATIONS[operation](*values) & WORD
    return registers["$0"]


OPERATIONS = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lambda a, b, c, table: (a & b) | c if bool((table == 0xEA).all()) else None,
    "fma.rn.bf16x2": lambda a, b, c: fma(torch.bfloat16, a, b, c),
    "fma.rn.f16x2": lambda a, b, c: fma(torch.float16, a, b, c),
}


@triton.jit
def operands_kernel(metas, scale, zero, TILE: tl.constexpr, BITS: tl.constexpr,
                    SCALED: tl.constexpr, BFLOAT16: tl.constexpr):  # fmt: skip
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    meta = tl.load(metas + at)
    if BFLOAT16:
        s, z = split_bfloat16(meta, TILE, BITS, SCALED)
    else:
        s, z = split_meta(meta, TILE, 2 if BITS <= 2 else 1, tl.float16)
    tl.store(scale + at, s.to(tl.int16, bitcast=True))
    tl.store(zero + at, z.to(tl.int16, bitcast=True))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_every_word(bits, tile, scaled, dtype, device):
    bfloat16 = dtype == torch.bfloat16
    words = torch.arange(1 << 16)
    pairs = words | words.flip(0) << 16
    scale = ((words % 37 + 1) / 256).bfloat16().float()
    zero = (words % (1 << bits)).float()
    if bits <= 2:
        zero = torch.full_like(scale, 0.5) if bits == 1 else words % 7 / 2
    stored, other = pack_scale(scale, zero, bits), (words - (1 << 15)).to(torch.int16)
    metas = torch.stack([other, stored] if tile else [stored, other], -1).flatten()
    assert all(map(torch.equal, unpack_scale(stored, bits), (scale, zero)))
    found = [torch.zeros(1 << 16, dtype=torch.int16, device=device) for _ in range(2)]
    operands_kernel[(64,)](
        metas.view(torch.int32).to(device), *found, TILE=tile, BITS=bits, SCALED=scaled,
        BFLOAT16=bfloat16,
    )  # fmt: skip
    factor, base = (f.cpu().view(dtype) for f in found)
    for block, half in ((b, h) for b in range(4) for h in range(2)):
        shift, position = _place(bits, tile, block, half, bfloat16, scaled)
        offset = _magic(bfloat16)[1] / (1 << position)
        constant = -offset
        if bfloat16:
            gain = 1 << _scale_lost(True, scaled)
            constant = _zero_base(bits, scaled)[0] - gain * offset
        addend = constant - base
        assembly = _weights_asm(shift, position, (1 << bits) - 1, bfloat16, scaled)
        twice = [to_bits(x.double(), dtype) * 0x00010001 for x in (addend, factor)]
        result = execute(assembly, pairs, *twice)
        for part, codes in ((0, words), (16, words.flip(0))):
            q = (codes >> offset_of(bits, tile, block, half)) & ((1 << bits) - 1)
            expected = (q - zero) * scale if scaled else q - zero
            assert torch.equal(from_bits(result >> part, dtype), expected.to(dtype).double())
