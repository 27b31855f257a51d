"""The GPU layout: every code, scale and zero comes back, whatever the width and shape."""

from dataclasses import replace

import pytest
import torch

from mcmoe_kernels.formats import FORMATS, WIDTHS
from mcmoe_kernels.formats.packing import pack
from mcmoe_kernels.formats.records import column_permutation
from mcmoe_kernels.gpu import tiled
from mcmoe_kernels.gpu.tiled import (
    dequantize_slot,
    gate_up_rows,
    matrix_bytes,
    tile_layer,
    tile_matrices,
)
from mcmoe_kernels.layer import ExpertMatrices
from tests.helpers.expert_layers import GPT_OSS, RELU2, random_layer, random_matrices


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("columns", "group_size"),
    [
        (256, 128),
        (128, 128),  # half a step
        (1408, 128),  # eleven groups
        (192, 64),  # half a tile
        (160, 32),  # a quarter of a tile
    ],
)
def test_tiling_loses_nothing(bits, columns, group_size):
    codes = torch.randint(0, 1 << bits, (128, columns), dtype=torch.uint8)
    words = torch.randint(-(1 << 15), 1 << 15, (128, columns // group_size), dtype=torch.int16)
    packed = pack(codes, bits)
    records = FORMATS[bits].tile(packed, words)
    assert records.numel() == matrix_bytes(128, columns, bits, group_size)
    assert records.shape[-1] == FORMATS[bits].record_bytes(group_size)
    back = FORMATS[bits].untile(records, columns, group_size)
    assert torch.equal(back[0], packed) and torch.equal(back[1], words)


def test_a_code_lies_where_the_layout_says():
    """Column 37 of 256: tile 0, block 1, its sixth column: byte 10, bits 2 and 3 (2-bit codes)."""
    codes = torch.zeros(64, 256, dtype=torch.uint8)
    codes[3, 37] = 2
    record = FORMATS[2].tile(pack(codes, 2), torch.zeros(64, 2, dtype=torch.int16)).flatten()
    assert record.nonzero().flatten().tolist() == [256 + 3 * 32 + 10]
    assert int(record[256 + 3 * 32 + 10]) == 2 << 2
    assert column_permutation(32).tolist()[10] == 5


def test_a_scale_lies_where_the_layout_says():
    """Columns 192 to 223, row 3: tile 1, its third group of 32: the upper half of a word."""
    words = torch.zeros(64, 8, dtype=torch.int16)
    words[3, 6] = 0x1234
    record = FORMATS[3].tile(torch.zeros(64, 96, dtype=torch.uint8), words).flatten()
    assert record.nonzero().flatten().tolist() == [(2 * 64 + 3) * 4 + 2, (2 * 64 + 3) * 4 + 3]
    assert record[(2 * 64 + 3) * 4 + 2 :][:2].tolist() == [0x34, 0x12]


@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_a_layer_is_the_same_in_slots(monkeypatch, at_once):
    monkeypatch.setattr(tiled, "CODES_AT_ONCE", at_once)  # a row tile at a time, or all
    layer = random_layer((1, 3, 0, 4, 2), (2, 1, 0, 3, 4), 192, 96, 32)
    layout = tile_layer(layer)
    assert layout.slot_of.tolist() == [3, 2, -1, 0, 1]  # widest first, the dropped one nowhere
    for expert, slot in enumerate(layout.slot_of.tolist()):
        if slot < 0:
            continue
        rows = gate_up_rows(96, "cpu")
        assert torch.equal(dequantize_slot(layout.w13, slot), layer.w13.dequantize(expert)[rows])
        assert torch.equal(dequantize_slot(layout.w2, slot), layer.w2.dequantize(expert))


def test_without_a_gate_rows_keep_their_order():
    layer = random_layer((1, 3, 0), (2, 1, 0), 192, 64, 32, activation=RELU2)
    layout = tile_layer(layer)
    assert layout.slot_of.tolist() == [1, 0, -1]
    assert torch.equal(dequantize_slot(layout.w13, 0), layer.w13.dequantize(1))


@pytest.mark.parametrize("activation", [GPT_OSS, RELU2])
def test_biases_lie_as_the_rows_that_they_are_added_to(activation):
    layer = random_layer((1, 3, 0), (2, 1, 0), 192, 64, 32, activation=activation, biases=True)
    layout = tile_layer(layer)
    rows = gate_up_rows(64, "cpu") if activation.gated else slice(None)
    assert torch.equal(layout.w13.bias, layer.w13.bias[[1, 0]][:, rows])
    assert torch.equal(layout.w2.bias, layer.w2.bias[[1, 0]])
    assert all(t.is_contiguous() for t in layout.tensors) and len(layout.tensors) == 7


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_slice_of_columns_is_a_slice_of_the_matrix(bits):
    """As tensor parallelism cuts w2: whole groups, here 3 of 6."""
    whole = random_matrices((bits,), 64, 768, 128, seed=bits)
    packed, scale = whole.packed[0][:, 384 * bits // 8 :], whole.scale[0][:, 3:]
    part = ExpertMatrices((bits,), (packed.contiguous(),), (scale.contiguous(),))
    tiled = tile_matrices(part, [0])
    assert torch.equal(dequantize_slot(tiled, 0), whole.dequantize(0)[:, 384:])


def test_layers_of_one_model_are_compiled_for_the_same_formats():
    layer = random_layer((2, 3, 0))
    assert [f.number for f in tile_layer(layer).w13.formats.formats] == [2, 3]
    w13 = replace(layer.w13, model_bits=(0, 1, 3))
    assert [f.number for f in tile_layer(replace(layer, w13=w13)).w13.formats.formats] == [1, 2, 3]


def test_remote_experts_have_no_slot():
    layer = random_layer((2, 3))
    expert_map = torch.tensor([-1, 1, -1, 0], dtype=torch.int32)
    assert tile_layer(replace(layer, expert_map=expert_map)).slot_of.tolist() == [-1, 0, -1, 1]


def test_what_does_not_fit_is_refused_all_at_once():
    layer = random_layer((2, 3), hidden=96, intermediate=48, group_size=32)
    with pytest.raises(ValueError) as e:
        tile_layer(layer)
    for part in ("hidden_size", "got 96", "intermediate_size", "got 48"):
        assert part in str(e.value)
    layer = random_layer((2, 3), intermediate=96, group_size=32, activation=RELU2)
    with pytest.raises(ValueError, match="intermediate_size must be a multiple of 64, got 96"):
        tile_layer(layer)
    with pytest.raises(ValueError, match="no expert"):
        tile_layer(random_layer((0, 0)))
