"""Inline PTX and plain shifts say the same of every 16-bit word, and both what `scalar` defines."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from mcmoe_kernels.formats.device.scalar8 import codes8  # noqa: E402
from mcmoe_kernels.formats.device.scalar16 import weights_of  # noqa: E402
from mcmoe_kernels.formats.device.words import merge_words, split_meta  # noqa: E402
from mcmoe_kernels.formats.format import find  # noqa: E402
from mcmoe_kernels.formats.packing import pack_scale, unpack_scale  # noqa: E402
from mcmoe_kernels.formats.scalar import HIGH  # noqa: E402

EVERY_WORD = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(-1, 16)
BITS = [1, 2, 3, 4]
# Rows of 16 words for a program: Triton's interpreter takes as long for many as for few.
ROWS = 64 if torch.cuda.is_available() else len(EVERY_WORD)


@triton.jit
def weights_kernel(words, metas, out, BITS: tl.constexpr, TILE: tl.constexpr,
                   BLOCK: tl.constexpr, HALF: tl.constexpr, SCALED: tl.constexpr,
                   ROWS: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * 16 + tl.arange(0, 16)[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    result = weights_of(
        tl.load(words + at), tl.load(metas + row), BITS, TILE, BLOCK, HALF, SCALED, dtype, INLINE,
    )  # fmt: skip
    tl.store(out + at, result)


@triton.jit
def bytes_kernel(first, second, out, size, BITS: tl.constexpr, TILE: tl.constexpr,
                 ROWS: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * 32 + tl.arange(0, 32)[None, :]
    low, high = tl.load(first + at), tl.load(second + at)
    # 3 bits: the shared plane comes first; 4 bits: both are the tile's own.
    planes = ((high,), (low,)) if BITS == 3 else ((low,), (high,))
    blocks = codes8(planes, TILE, BITS, INLINE)
    for block in tl.static_range(4):
        tl.store(out + block * size + at, blocks[block][0])


@triton.jit
def merge_kernel(low, high, as_bytes, as_words, LOW: tl.constexpr, HIGH: tl.constexpr,
                 ROWS: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * 16 + tl.arange(0, 16)[None, :]
    words = merge_words(tl.load(low + at), tl.load(high + at), LOW, HIGH, INLINE)
    tl.store(as_words + at, words)
    at = row[:, None] * 32 + tl.arange(0, 32)[None, :]
    low8, high8 = low.to(tl.pointer_type(tl.int8)), high.to(tl.pointer_type(tl.int8))
    tl.store(as_bytes + at, merge_words(tl.load(low8 + at), tl.load(high8 + at), LOW, HIGH, INLINE))


@triton.jit
def meta_kernel(words, scale, zero, TILE: tl.constexpr, ZERO_STEPS: tl.constexpr,
                SIZE: tl.constexpr):  # fmt: skip
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    s, z = split_meta(tl.load(words + at), TILE, ZERO_STEPS, scale.dtype.element_ty)
    tl.store(scale + at, s)
    tl.store(zero + at, z)


def ways(device):
    return (False, True) if device == "cuda" else (False,)  # the interpreter has no PTX


def offset_of(bits, tile, block, half):
    """First bit of a code in its word: a code of a nibble plane for 3 and 4 bits."""
    return {1: 4 * tile + block, 2: 2 * block}.get(bits, 4 * (block // 2)) + 8 * half


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("scaled", [True, False])
def test_weights_of_every_word(bits, tile, scaled, device):
    words = EVERY_WORD.to(device)
    rows = torch.arange(len(words), device=device)
    scale = ((rows % 37 + 1) / 256).bfloat16().float()
    zero = (rows % (1 << bits)).float()
    if bits <= 2:
        zero = torch.full_like(scale, 0.5) if bits == 1 else rows % 7 / 2
    stored = pack_scale(scale, zero, bits)
    other = EVERY_WORD.flatten()[: len(stored)].to(device)  # in the half of the other tile
    metas = (
        torch.stack([other, stored] if tile else [stored, other], -1).flatten().view(torch.int32)
    )
    dtypes = [torch.float16, torch.bfloat16] if device == "cuda" else [torch.float16]
    for dtype in dtypes:
        for block, half in ((b, h) for b in range(4) for h in range(2)):
            codes = (words.int() >> offset_of(bits, tile, block, half)) & ((1 << bits) - 1)
            centered = codes - zero[:, None]
            expected = (centered * scale[:, None] if scaled else centered).to(dtype)
            for inline in ways(device):
                out = torch.full(words.shape, torch.nan, dtype=dtype, device=device)
                weights_kernel[(len(words) // ROWS,)](
                    words, metas, out, BITS=bits, TILE=tile, BLOCK=block, HALF=half,
                    SCALED=scaled, ROWS=ROWS, INLINE=inline,
                )  # fmt: skip
                assert torch.equal(out, expected), (dtype, block, half, inline)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tile", [0, 1])
def test_scale_and_zero_of_every_word(bits, tile, device):
    stored = EVERY_WORD.flatten().to(device)
    other = stored.flip(0)  # in the half of the other tile
    words = (
        torch.stack([other, stored] if tile else [stored, other], -1).flatten().view(torch.int32)
    )
    expected = unpack_scale(stored, bits)
    for dtype in (torch.float32, torch.float16):
        found = [torch.full(stored.shape, torch.nan, dtype=dtype, device=device) for _ in range(2)]
        of = {"TILE": tile, "ZERO_STEPS": find(bits).zero_steps, "SIZE": 16 * ROWS}
        meta_kernel[(len(stored) // of["SIZE"],)](words, *found, **of)
        for f, e in zip(found, expected, strict=True):
            assert torch.equal(f, e.to(dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tile", [0, 1])
def test_bytes_of_every_word(bits, tile, device):
    low = EVERY_WORD.contiguous().view(torch.int8).to(device)
    high = low.flatten()[torch.randperm(low.numel())].view_as(low).contiguous()
    expected = []
    for block in range(4):
        if bits == 3:
            two = (low.int() >> 2 * block) & 3
            expected.append(two | (((high.int() >> HIGH[3][tile][block]) & 1) << 2))
        elif bits == 4:
            expected.append(((high if block % 2 else low).int() >> 4 * (block // 2)) & 15)
        else:
            expected.append((low.int() >> offset_of(bits, tile, block, 0)) & ((1 << bits) - 1))
    for inline in ways(device):
        out = torch.full((4, *low.shape), -1, dtype=torch.int8, device=device)
        bytes_kernel[(len(low) // ROWS,)](
            low, high, out, low.numel(), BITS=bits, TILE=tile, ROWS=ROWS, INLINE=inline
        )
        assert torch.equal(out.int(), torch.stack(expected)), inline


@pytest.mark.parametrize(("low_shift", "high_shift"), [(0, 0), (2, 1), (0, -2), (2, -1)])
def test_merging_words_is_merging_their_bytes(low_shift, high_shift, device):
    low = EVERY_WORD.to(device)
    high = low.flatten()[torch.randperm(low.numel())].view_as(low).contiguous()
    results = []
    for inline in ways(device):
        as_words, as_bytes = torch.empty_like(low), torch.empty_like(low)
        merge_kernel[(len(low) // ROWS,)](
            low, high, as_bytes.view(torch.int8), as_words, LOW=low_shift, HIGH=high_shift,
            ROWS=ROWS, INLINE=inline,
        )  # fmt: skip
        results += [as_words & 0x7777, as_bytes]  # fourth bits of a word's nibbles are anything
    assert all(torch.equal(r, results[0]) for r in results)
