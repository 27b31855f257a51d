"""The bit layout: bytes pinned by hand, every width round-trips, slices are slices of bytes."""

import pytest
import torch

from mcmoe_kernels import packing


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


@pytest.mark.parametrize("bits", packing.BIT_WIDTHS)
@pytest.mark.parametrize("shape", [(8,), (5, 24), (3, 7, 1408)])  # odd rows, odd group count
def test_unpack_inverts_pack(bits, shape):
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits))
    packed = packing.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape[-1] == shape[-1] * bits // 8
    assert torch.equal(packing.unpack(packed, bits), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", packing.BIT_WIDTHS)
def test_a_slice_of_groups_is_a_slice_of_bytes(bits):
    codes = torch.randint(0, 1 << bits, (4, 256), generator=torch.Generator().manual_seed(0))
    packed = packing.pack(codes, bits)
    part = packed[:, 128 * bits // 8 :]
    assert torch.equal(packing.unpack(part, bits), codes[:, 128:].to(torch.uint8))


@pytest.mark.parametrize("bits", packing.BIT_WIDTHS)
def test_dequantize_is_exact(bits):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 1 << bits, (6, 96), generator=generator)
    scale = torch.rand(6, 3, generator=generator).to(torch.bfloat16).half()
    zero = torch.full((6, 3), 0.5) if bits == 1 else torch.randint(0, 1 << bits, (6, 3)).float()
    stored = packing.interleave_scale(scale, zero)
    assert stored.shape == (6, 6) and stored.dtype == torch.float16
    weight = packing.dequantize(packing.pack(codes, bits), stored, bits)
    expected = (codes.double() - zero.double().repeat_interleave(32, 1)) * (
        scale.double().repeat_interleave(32, 1)
    )
    assert torch.equal(weight.double(), expected)


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
