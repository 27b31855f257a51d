"""A format is one file: made-up ones are packed, tiled and multiplied by everything there is."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from mcmoe_kernels import formats
from mcmoe_kernels.cpu.experts import dequantize_to, encode_int4, fused_experts_cpu, int4_supported
from mcmoe_kernels.cpu.experts import prepare as prepare_cpu
from mcmoe_kernels.formats.format import FORMATS, Format, find, register
from mcmoe_kernels.formats.packing import pack, packed_bytes, unpack
from mcmoe_kernels.gpu.choice import (
    DecodeConfig,
    LayerShape,
    PrefillConfig,
    SingleConfig,
    WarpConfig,
    choose_config,
)
from mcmoe_kernels.gpu.experts import fused_experts
from mcmoe_kernels.gpu.tiled import dequantize_slot, tile_layer
from mcmoe_kernels.layer import ExpertLayer, ExpertMatrices, fused_experts_torch
from tests.helpers.expert_layers import random_input, random_routing, relative_error, to_device

MADE_UP = (5, 6, 7)
CONFIGS = {
    "decode": DecodeConfig(4, 64, 64, 2, 2, 3, 3, 2),
    "warp": WarpConfig(4, 256, 128, 16, 8, 1, 2, 2),
    "single": SingleConfig(4, 128, 128, 8, 8, 1, 2, 2),
    "prefill": PrefillConfig(16, 64, 64, 4, 2, 3),
    "prefill, scaled": PrefillConfig(64, 128, 128, 8, 2, 2, 128, 16),
}


@pytest.fixture(scope="module", autouse=True)
def made_up():
    """The file, as if it lay in formats/."""
    before, folder = dict(FORMATS), str(Path(__file__).parent / "made_up")
    formats.__path__.append(folder)
    try:
        assert formats.discover() == (*formats.WIDTHS, *MADE_UP)
        yield
    finally:
        formats.__path__.remove(folder)
        sys.modules.pop("mcmoe_kernels.formats.made_up", None)
        FORMATS.clear()
        FORMATS.update(before)


def random_matrices(numbers, rows, columns, group_size, seed) -> ExpertMatrices:
    generator = torch.Generator().manual_seed(seed)
    packed, scales = [], []
    for number in numbers:
        format_, groups = find(number), (rows, columns // group_size)
        codes = torch.randint(0, format_.levels, (rows, columns), generator=generator)
        scale = torch.rand(groups, generator=generator).add(0.1).mul(0.1 / format_.levels)
        zero = torch.randint(0, min(16, format_.levels), groups, generator=generator).float()
        if format_.values is not None:
            zero.zero_()
        packed.append(pack(codes, number))
        scales.append(format_.pack_scale(scale.bfloat16(), zero))
    return ExpertMatrices(tuple(numbers), tuple(packed), tuple(scales))


def random_layer(numbers13, numbers2, hidden=256, intermediate=128, group_size=128) -> ExpertLayer:
    w13 = random_matrices(numbers13, 2 * intermediate, hidden, group_size, 0)
    w2 = random_matrices(numbers2, hidden, intermediate, group_size, 1)
    return ExpertLayer(hidden, intermediate, w13, w2)


@pytest.mark.parametrize("number", [*formats.WIDTHS, *MADE_UP])
@pytest.mark.parametrize(("columns", "group_size"), [(256, 128), (160, 32)])
def test_what_is_packed_and_tiled_comes_back(number, columns, group_size):
    format_ = find(number)
    codes = torch.randint(0, format_.levels, (128, columns), dtype=torch.uint8)
    words = torch.randint(-(1 << 15), 1 << 15, (128, columns // group_size), dtype=torch.int16)
    packed = pack(codes, number)
    assert packed.shape == (128, columns * format_.width // 8)
    assert packed.nbytes + words.nbytes == packed_bytes(128, columns, number, group_size)
    assert torch.equal(unpack(packed, number), codes)
    records = format_.tile(packed, words)
    assert records.shape[-1] == format_.record_bytes(group_size)
    again = format_.untile(records, columns, group_size)
    assert torch.equal(again[0], packed) and torch.equal(again[1], words)


@triton.jit
def blocks_kernel(planes, metas, out8, out16, TILE: tl.constexpr, PLANES: tl.constexpr,
                  WIDTH: tl.constexpr, SCALED: tl.constexpr, CODES8: tl.constexpr,
                  WEIGHTS16: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    """One tile of 64 rows: its codes int8 [4, 64, 32] and its weights [4, 64, 32]."""
    row = tl.arange(0, 64)
    at32 = row[:, None] * 32 + tl.arange(0, 32)[None, :]
    at16 = row[:, None] * 16 + tl.arange(0, 16)[None, :]
    words, as_bytes = (), ()
    for plane in tl.static_range(PLANES):
        as_bytes += ((tl.load(planes + plane * 2048 + at32),),)
        words += (tl.load(planes.to(tl.pointer_type(tl.int16)) + plane * 1024 + at16),)
    meta = tl.load(metas + row)
    if CODES8 is not None:
        blocks = CODES8(as_bytes, TILE, WIDTH, INLINE)
        for block in tl.static_range(4):
            tl.store(out8 + block * 2048 + at32, blocks[block][0])
    for block in tl.static_range(4):
        weights = WEIGHTS16(
            words, meta, TILE, block, WIDTH, SCALED, out16.dtype.element_ty, INLINE
        )  # fmt: skip
        tl.store(out16 + block * 2048 + at32, weights)


@pytest.mark.parametrize("number", [*formats.WIDTHS, *MADE_UP])
@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("scaled", [False, True])
def test_device_functions_say_what_the_file_holds(number, tile, scaled, device):
    format_ = find(number)
    matrices = random_matrices((number,), 64, 256, 128, seed=number)
    packed, words = matrices.packed[0], matrices.scale[0]
    record = format_.tile(packed, words)[0, 0]
    metas, planes = record[:256].view(torch.int32), record[256:].view(-1, 2048)
    shared, own = format_.width % 2, format_.width // 2
    chosen = [*range(shared), *range(shared + tile * own, shared + (tile + 1) * own)]
    codes8, weights16 = format_.device()
    out8 = torch.full((4, 64, 32), -1, dtype=torch.int8, device=device)
    out16 = torch.full((4, 64, 32), torch.nan, dtype=torch.float16, device=device)
    for inline in (False, True) if device == "cuda" else (False,):
        blocks_kernel[(1,)](
            planes[chosen].contiguous().view(torch.int8).to(device), metas.contiguous().to(device),
            out8, out16, TILE=tile, PLANES=len(chosen), WIDTH=format_.width, SCALED=scaled,
            CODES8=codes8, WEIGHTS16=weights16, INLINE=inline,
        )  # fmt: skip
        here = slice(128 * tile, 128 * (tile + 1))
        if codes8 is not None:
            expected = formats.records.to_blocks(unpack(packed, number))[0, 0, tile]
            assert torch.equal(out8.cpu().view(torch.uint8), expected)
        scale, zero = (part[:, tile, None] for part in format_.unpack_scale(words))
        expected = format_.decode(unpack(packed, number))[:, here] - zero
        expected = (expected * scale if scaled else expected).half()
        assert torch.equal(out16.cpu().permute(1, 0, 2).reshape(64, 128), expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_kernels_multiply_them(config, device):
    numbers = ((5, 2, 6, 3), (6, 5, 3, 5))
    if isinstance(config, PrefillConfig):
        numbers = ((5, 2, 7, 3), (7, 5, 3, 6))
    layer = random_layer(*numbers)
    tokens = 1 if isinstance(config, SingleConfig) else 5
    x, (weights, ids) = random_input(tokens, 256, torch.float16), random_routing(tokens, 4, 2)
    tiled = tile_layer(to_device(layer, device))
    for expert, slot in enumerate(tiled.slot_of.tolist()):
        assert torch.equal(dequantize_slot(tiled.w2, slot).cpu(), layer.w2.dequantize(expert))
    out = fused_experts(x.to(device), tiled, weights.to(device), ids.to(device), config)
    assert relative_error(out.cpu(), fused_experts_torch(x, layer, weights, ids).float()) < 2e-3


def test_without_8_bit_codes_another_kernel_is_chosen(device):
    tiled = tile_layer(to_device(random_layer((7, 2), (2, 2)), device))
    x, (weights, ids) = random_input(1, 256, torch.float16), random_routing(1, 2, 1)
    arguments = (x.to(device), tiled, weights.to(device), ids.to(device))
    with pytest.raises(ValueError, match="takes 8-bit codes"):
        fused_experts(*arguments, CONFIGS["single"])
    assert not tiled.has_codes8
    shape = LayerShape(2, 1, 256, 128)
    assert isinstance(choose_config(torch.device("cpu"), shape, 1, codes8=False), PrefillConfig)


def test_a_cpu_multiplies_them():
    layer = random_layer((5, 6, 7), (7, 6, 5))
    x, (weights, ids) = random_input(5, 256, torch.float32), random_routing(5, 3, 2)
    expected = fused_experts_torch(x, layer, weights, ids)
    out = fused_experts_cpu(x, prepare_cpu(layer, "packed"), weights, ids)
    assert relative_error(out, expected) < 1e-6
    for expert in range(3):
        for dtype in (torch.bfloat16, torch.float32):
            found = dequantize_to(layer.w13, expert, dtype)
            assert torch.equal(found, layer.w13.dequantize(expert).to(dtype))
    assert not int4_supported(layer, torch.bfloat16)
    mirrored = random_layer((6,), (6,))
    assert int4_supported(mirrored, torch.bfloat16)
    rows = encode_int4(mirrored.w2, 0).matmul(torch.eye(128, dtype=torch.bfloat16))
    assert torch.equal(rows.t(), mirrored.w2.dequantize(0).bfloat16())


def test_a_number_belongs_to_one_format():
    scalar = find(2)
    for number, message in ((2, "scalar2's"), (0, "allowed is 1..7"), (8, "allowed is 1..7")):
        other = Format("other", number, *list(vars(scalar).values())[2:])
        with pytest.raises(ValueError, match=message):
            register(other)
