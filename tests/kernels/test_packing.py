"""The bit layout: bytes pinned by hand, every width round-trips, slices are slices of bytes."""

import pytest
import torch

from mcmoe_kernels.formats import WIDTHS, packing


def test_bytes_of_every_width_are_the_little_endian_stream():
    codes = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 1]])
    assert packing.pack(codes, 1).tolist() == [[0b10001101]]
    codes = torch.tensor([[3, 0, 1, 2, 0, 0, 0, 1]])
    assert packing.pack(codes, 2).tolist() == [[0b10010011, 0b01000000]]
    codes = torch.tensor([[7, 0, 5, 1, 0, 0, 2, 4]])
    # stream, lowest bit first: 111 000 101 100 000 000 010 001
    assert packing.pack(codes, 3).tolist() == [[0b01000111, 0b00000011, 0b10001000]]
    codes = torch.tensor([[15, 1, 0, 8, 2, 3, 4, 9]])
    assert packing.pack(codes, 4).tolist() == [[0x1F, 0x80, 0x32, 0x94]]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(8,), (5, 24), (3, 7, 1408)])  # odd rows, odd group count
def test_unpack_inverts_pack(bits, shape):
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits))
    packed = packing.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape[-1] == shape[-1] * bits // 8
    assert torch.equal(packing.unpack(packed, bits), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_slice_of_groups_is_a_slice_of_bytes(bits):
    codes = torch.randint(0, 1 << bits, (4, 256), generator=torch.Generator().manual_seed(0))
    packed = packing.pack(codes, bits)
    part = packed[:, 128 * bits // 8 :]
    assert torch.equal(packing.unpack(part, bits), codes[:, 128:].to(torch.uint8))


@pytest.mark.parametrize("bits", WIDTHS)
def test_dequantize_is_exact(bits):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 1 << bits, (6, 96), generator=generator)
    scale = torch.rand(6, 3, generator=generator).to(torch.bfloat16).half()
    zero = torch.full((6, 3), 0.5) if bits == 1 else torch.randint(0, 1 << bits, (6, 3)).float()
    stored = packing.pack_scale(scale, zero, bits)
    assert stored.shape == (6, 3) and stored.dtype == torch.int16
    weight = packing.dequantize(packing.pack(codes, bits), stored, bits)
    expected = (codes.double() - zero.double().repeat_interleave(32, 1)) * (
        scale.double().repeat_interleave(32, 1)
    )
    assert torch.equal(weight.double(), expected)


def test_the_word_of_a_scale_and_zero():
    """0.0150146484375 = 2^-7 * (1 + 118 / 128): e = 17, m = 118; 5 steps of zero."""
    scale = torch.tensor([0.0150146484375])
    for bits, zero in ((2, 2.5), (3, 5.0), (4, 5.0)):
        word = packing.pack_scale(scale, torch.tensor([zero]), bits)
        assert word.item() == 5 << 12 | 17 << 7 | 118
    word = packing.pack_scale(scale, torch.tensor([15.0]), 4)
    assert word.item() == (15 << 12 | 17 << 7 | 118) - 65536  # as an unsigned number


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_word_means_a_scale_and_zero_of_its_own(bits):
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    scale, zero = packing.unpack_scale(words, bits)
    assert torch.equal(packing.pack_scale(scale, zero, bits), words)
    assert scale.min() == packing.MIN_SCALE and scale.max() == packing.MAX_SCALE == 255
    assert torch.equal(scale.bfloat16().float(), scale)
    assert zero.max() == (7.5 if bits <= 2 else 15)


@pytest.mark.parametrize("bits", WIDTHS)
def test_scales_of_version_1_become_the_same_weights(bits):
    scale = torch.tensor([[0.0150146484375, 2.0**-24, 255.0]]).half()
    zero = torch.full((1, 3), 0.5 if bits == 1 else (1 << bits) - 1.0).half()
    words = packing.upgrade_scale(torch.stack([scale, zero], -1).flatten(-2), bits)
    assert words.shape == (1, 3)
    again = packing.unpack_scale(words, bits)
    assert torch.equal(again[0], scale.float()) and torch.equal(again[1], zero.float())


@pytest.mark.parametrize(
    ("scale", "zero", "bits", "message"),
    [
        (0.0, 1.0, 3, "scales must be exact in bfloat16, 5.9.*e-08 to 255"),
        (float("nan"), 1.0, 3, "scales must be"),
        (256.0, 1.0, 3, "scales must be"),
        (1 + 2**-8, 1.0, 3, "scales must be"),
        (1.0, 0.5, 3, "zeros must be multiples of 1"),
        (1.0, 0.25, 2, "zeros must be multiples of 0.5"),
        (1.0, 8.0, 2, "0 to 15 of them"),
        (1.0, -1.0, 4, "zeros must be"),
        (0.0, float("nan"), 4, "scales must be .*; zeros must be"),
        (1.0, 1.0, 5, "must be one of"),
    ],
)
def test_pack_scale_refuses(scale, zero, bits, message):
    with pytest.raises(ValueError, match=message):
        packing.pack_scale(torch.tensor([1.0, scale]), torch.tensor([1.0, zero]), bits)


def test_int4_linear_round_trip_and_sign_bit():
    codes = torch.full((3, 16), 15)
    codes[1] = torch.arange(16)
    packed = packing.pack_int4_linear(codes)
    assert packed.shape == (2, 3) and packed.dtype == torch.int32
    assert packed[0, 0] == -1  # eight codes of 15 fill the sign bit
    assert packed[0, 1] == 0x76543210
    assert torch.equal(packing.unpack_int4_linear(packed), codes.to(torch.uint8))
    scales = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float16)
    expected = (codes.float() - 8) * torch.tensor([[0.5], [1.0], [2.0]])
    assert torch.equal(packing.dequantize_int4_linear(packed, scales), expected)


@pytest.mark.parametrize(
    "codes, bits, message",
    [
        ([[0] * 7], 2, "multiple of 8"),
        ([[0, 0, 0, 0, 0, 0, 0, 4]], 2, "0..3"),
        ([[0, 0, 0, 0, 0, 0, 0, -1]], 1, "-1..0"),
        ([[0] * 8], 5, "must be one of"),
        ([[0] * 8], 0, "must be one of"),
    ],
)
def test_pack_refuses(codes, bits, message):
    with pytest.raises(ValueError, match=message):
        packing.pack(torch.tensor(codes), bits)
