"""tests/golden holds the bytes of every format version for good: these tests may only grow.

The first reader below is written from docs/FORMAT.md in plain Python, so that a mistake in
packing.py cannot hide itself. Versions 1 and 2 hold the same weights, version 3 others.
"""

import hashlib
import importlib.util
import json
import re
import struct
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from mcmoe_kernels.formats import WIDTHS, packing
from mcmoe_vllm.checkpoint.files import open_checkpoint, read_config
from mcmoe_vllm.checkpoint.format import QuantizationConfig, stored_scale
from mcmoe_vllm.checkpoint.manifest import tensor_sha256
from mcmoe_vllm.inspection import inspect_checkpoint
from mcmoe_vllm.model.agreement import open_layout
from mcmoe_vllm.model.packed import PackedExperts

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = {version: GOLDEN / f"format_v{version}" for version in (1, 2, 3)}
BEHIND = {1: ".", 2: ".", 3: "_"}  # the name of a matrix
BLOCK = "model.layers.0.block_sparse_moe.experts"

# Of the whole file, and of each matrix in float32, row-major, little-endian.
BIASED = "model.layers.0.mlp.experts"  # of version 3
SHARD_SHA256 = {
    1: "89aa9ea6c4439d836addca81f389f444da95d41ec5a4ae8705fe6f30199e285e",
    2: "b54e59244935f155eee0587eba63c9218c271b121a1e95d3df873b8044dfa0ee",
    3: "8a3c8313749453d91f5cbc43adf0d2d057d4a580dbe5e5648e0b66b3f4a4724c",
}
WEIGHT_SHA256 = {
    f"{BLOCK}.1.w1": "96da934411c6b59604d9bd98af983098525b792e30fd982f5931539e480f60d6",
    f"{BLOCK}.1.w3": "2779185d0da37f0746c027e99cd7348e9b636d8098a4e86928f7a35441d16cc7",
    f"{BLOCK}.1.w2": "03eadfc79e494f5bedc2108751183df97e321c51e9a7628be6920d2ebfd14ee8",
    f"{BLOCK}.2.w1": "15d14f9ba3144fe505b35e87d6a55fb50cbe527fcf60eb6cdd364c596792073d",
    f"{BLOCK}.2.w3": "6fb020a162763096099d556067d3cf8c66477a4b889b1f20847257fbcd1481a6",
    f"{BLOCK}.2.w2": "acad3be4b330b7f0f5e3ba4464de4191910f47c8c237a3e5ff4785fec979439a",
    f"{BLOCK}.3.w1": "181be6f8d678defd60606445661d92c3f7c35d33ebc706071e2111d90fcc6706",
    f"{BLOCK}.3.w3": "57ce507d2e25760792d37751fd6dfd600d00cb7f1e2b691f1102da082b44bf73",
    f"{BLOCK}.3.w2": "3c3822ae0d60bfdbad3125f1fbaceb74d0b1fe395c1871d0d52b2473cc114ae4",
    f"{BLOCK}.4.w1": "6396aa6c8ed471335efc5e3637e876f68ee53cf9302f06095f462ce83fbe8243",
    f"{BLOCK}.4.w3": "176e15d1d09a84c56e3b597a70e4d15fe7bcf8d1f8ea6ec00598eae1597e47b2",
    f"{BLOCK}.4.w2": "81531e98d50b6964b2b12371e60b20a5cfee43fde9be0abc6834a0b1781fa6d0",
}
LINEAR_SHA256 = {
    "q_proj": "f45b0c1a102d60224bbabdea55f72c1c53f860d007aa7630674f5f89950a6708",
    "k_proj": "5152b276197663da60edc2f91e07c48f46aceb600311c0aebd157055764ccc78",
    "v_proj": "ab0b055afa854823f2508be2808bbdc719f3e1a5a5be94b5dec5d6182a937554",
    "o_proj": "a655c622cb617638b9953098e5bcc36d52fbdae1efbb95fd0df5c3e61dc12c7b",
}
# Row 1 of w1 [32, 64], groups of 32: the first bytes, then scale * 4096 and zero of both groups,
# then the first eight weights of both groups times 4096.
FIRST_BYTES = {1: "33", 2: "c56b", 3: "9312fc", 4: "c4b3a291"}
SCALES_AND_ZEROS = {
    1: (143, 0.5, 146, 0.5),
    2: (153, 1, 156, 2),
    3: (163, 7, 166, 0),
    4: (173, 9, 176, 10),
}
WEIGHTS = {
    1: (
        (71.5, 71.5, -71.5, -71.5, 71.5, 71.5, -71.5, -71.5),
        (73, -73, -73, 73, 73, -73, -73, 73),
    ),
    2: (
        (0, 0, -153, 306, 306, 153, 153, 0),
        (-312, -312, 156, 156, 0, 0, -156, -156),
    ),
    3: (
        (-652, -815, -815, -978, -978, -1141, 0, 0),
        (332, 166, 166, 0, 0, 1162, 1162, 996),
    ),
    4: (
        (-865, 519, -1038, 346, -1211, 173, -1384, 0),
        (-1232, 176, -1408, 0, -1584, -176, -1760, -352),
    ),
}
# Column 1 of q_proj.qweight, word 0, and the eight weights of row 1 in it times 4096.
QWEIGHT_WORD = 725372254
QWEIGHT_WEIGHTS = (798, -399, 665, -532, 532, -665, 399, -798)


@pytest.fixture(scope="module", params=(1, 2))
def version(request):
    return request.param


@pytest.fixture(scope="module")
def tensors(version):
    checkpoint = open_checkpoint(FOLDERS[version])
    return checkpoint.read(checkpoint.names())


def shard(version: int) -> Path:
    return FOLDERS[version] / "model-00001-of-00001.safetensors"


def read_raw(version: int, name: str) -> tuple[list[int], bytes]:
    """Shape and bytes of a tensor, without safetensors and torch."""
    data = shard(version).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    entry = json.loads(data[8 : 8 + length])[name]
    start, end = entry["data_offsets"]
    return entry["shape"], data[8 + length + start : 8 + length + end]


def decode_scales(version: int, matrix: str, row: int, bits: int) -> list[tuple]:
    """Scale and zero of each group of a row, by the words of docs/FORMAT.md."""
    (_, numbers), stored = read_raw(version, f"{matrix}{BEHIND[version]}weight_scale")
    stored = stored[row * numbers * 2 : (row + 1) * numbers * 2]
    if version == 1:
        pairs = struct.unpack(f"<{numbers}e", stored)
        return [tuple(map(Fraction, pair)) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
    found = []
    for word in struct.unpack(f"<{numbers}H", stored):
        mantissa, exponent, steps = word % 128, word // 128 % 32, word // 4096
        scale = Fraction(2) ** (exponent - 24) * (1 + Fraction(mantissa, 128))
        found.append((scale, Fraction(steps, 2 if bits <= 2 else 1)))
    return found


def decode_expert(
    version: int, matrix: str, bits: int, group_size: int = 32
) -> list[list[Fraction]]:
    """Every weight of an expert matrix, exactly, by the words of docs/FORMAT.md."""
    (rows, row_bytes), packed = read_raw(version, f"{matrix}{BEHIND[version]}weight_packed")
    columns = row_bytes * 8 // bits
    weights = []
    for n in range(rows):
        stream = int.from_bytes(packed[n * row_bytes : (n + 1) * row_bytes], "little")
        scales = decode_scales(version, matrix, n, bits)
        row = []
        for k in range(columns):
            code = stream >> (k * bits) & ((1 << bits) - 1)
            scale, zero = scales[k // group_size]
            row.append((code - zero) * scale)
        weights.append(row)
    return weights


def float32_sha256(rows: list[list[Fraction]]) -> str:
    flat = [float(w) for row in rows for w in row]
    return hashlib.sha256(struct.pack(f"<{len(flat)}f", *flat)).hexdigest()


@pytest.mark.parametrize("version", FOLDERS)
def test_the_golden_file_has_not_changed(version):
    assert hashlib.sha256(shard(version).read_bytes()).hexdigest() == SHARD_SHA256[version]


@pytest.mark.parametrize("matrix", WEIGHT_SHA256, ids=lambda m: m.split("experts.")[1])
def test_expert_weights_by_the_written_format(version, matrix):
    bits = int(matrix.split(".")[-2])
    assert float32_sha256(decode_expert(version, matrix, bits)) == WEIGHT_SHA256[matrix]


@pytest.mark.parametrize("bits", WIDTHS)
def test_literal_numbers_of_one_row(version, bits):
    matrix = f"{BLOCK}.{bits}.w1"
    (_, row_bytes), packed = read_raw(version, f"{matrix}.weight_packed")
    assert packed[row_bytes : row_bytes + bits].hex() == FIRST_BYTES[bits]
    (scale0, zero0), (scale1, zero1) = decode_scales(version, matrix, 1, bits)
    assert (scale0 * 4096, zero0, scale1 * 4096, zero1) == SCALES_AND_ZEROS[bits]
    row = [w * 4096 for w in decode_expert(version, matrix, bits)[1]]
    assert (tuple(row[:8]), tuple(row[32:40])) == WEIGHTS[bits]


def test_literal_words_of_scales():
    """Row 1 of w1 at 3 bits: 163 / 4096 and 7, 166 / 4096 and 0."""
    _, stored = read_raw(2, f"{BLOCK}.3.w1.weight_scale")
    assert stored[4:8].hex() == "a379a609"


@pytest.mark.parametrize("matrix", WEIGHT_SHA256, ids=lambda m: m.split("experts.")[1])
def test_packing_reads_and_writes_the_same_bytes(tensors, matrix):
    bits = int(matrix.split(".")[-2])
    packed, name = tensors[f"{matrix}.weight_packed"], f"{matrix}.weight_scale"
    words = stored_scale(tensors[name], bits, name)
    weights = packing.dequantize(packed, words, bits)
    assert tensor_sha256(weights) == WEIGHT_SHA256[matrix]
    again = packing.pack(packing.unpack(packed, bits), bits)
    assert torch.equal(again, packed) and again.dtype == packed.dtype
    again = packing.pack_scale(*packing.unpack_scale(words, bits), bits)
    assert torch.equal(again, words) and again.dtype == torch.int16


@pytest.mark.parametrize("linear", LINEAR_SHA256)
def test_int4_linears(tensors, linear):
    prefix = f"model.layers.0.self_attn.{linear}"
    qweight, scales = tensors[f"{prefix}.qweight"], tensors[f"{prefix}.scales"]
    weights = packing.dequantize_int4_linear(qweight, scales)
    assert tensor_sha256(weights) == LINEAR_SHA256[linear]
    assert torch.equal(packing.pack_int4_linear(packing.unpack_int4_linear(qweight)), qweight)
    rows = [
        [
            (((int(qweight[k // 8, n]) >> (4 * (k % 8))) & 15) - 8) * Fraction(float(s))
            for k in range(8 * qweight.shape[0])
            for s in [scales[k // 32, n]]
        ]
        for n in range(qweight.shape[1])
    ]
    assert float32_sha256(rows) == LINEAR_SHA256[linear]


def test_literal_numbers_of_an_int4_linear(tensors):
    qweight = tensors["model.layers.0.self_attn.q_proj.qweight"]
    scales = tensors["model.layers.0.self_attn.q_proj.scales"]
    assert qweight.shape == (8, 32) and scales.shape == (2, 32)
    assert int(qweight[0, 1]) == QWEIGHT_WORD and float(scales[0, 1]) * 4096 == 133
    found = packing.dequantize_int4_linear(qweight, scales)[1, :8] * 4096
    assert tuple(found.tolist()) == QWEIGHT_WEIGHTS


@pytest.mark.parametrize("version", FOLDERS)
def test_the_golden_checkpoint_passes_every_check(version):
    found = inspect_checkpoint(FOLDERS[version], check=True)
    assert found.bits == {0: ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4))}
    assert found.config.format_version == version
    assert not any("experts.0." in name for name in open_checkpoint(FOLDERS[version]).tensors)


@pytest.mark.parametrize("bits", WIDTHS)
def test_pairs_of_rows_and_biases_by_the_written_format(bits):
    """Expert `bits` of version 3: row 2i is gate's row i, row 2i + 1 is up's."""
    checkpoint = open_checkpoint(FOLDERS[3])
    config = read_config(checkpoint)
    found = PackedExperts(checkpoint, open_layout(checkpoint, config), config).read(0, bits)
    rows = decode_expert(3, f"{BIASED}.{bits}.w13", bits)
    by_hand = [[float(w) for w in row] for row in (*rows[::2], *rows[1::2])]
    assert found.w13.tolist() == by_hand
    down = decode_expert(3, f"{BIASED}.{bits}.w2", bits)
    assert found.w2.tolist() == [[float(w) for w in row] for row in down]
    for name, bias, pairs in (
        ("gate_up_proj_bias", found.w13_bias, True),
        ("down_proj_bias", found.w2_bias, False),
    ):
        (_, width), stored = read_raw(3, f"{BIASED}.{name}")
        halves = struct.unpack(f"<{5 * width}H", stored)[bits * width : (bits + 1) * width]
        numbers = struct.unpack(f"<{width}f", struct.pack(f"<{width}I", *(h << 16 for h in halves)))
        assert bias.tolist() == list((*numbers[::2], *numbers[1::2]) if pairs else numbers)


@pytest.mark.parametrize("version", (2, 3))
def test_the_script_still_makes_the_same_tensors(tmp_path, version):
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.make_golden(tmp_path / "made", version)
    made, kept = open_checkpoint(tmp_path / "made"), open_checkpoint(FOLDERS[version])
    hashes, again = (
        {name: tensor_sha256(t) for name, t in c.read(c.names()).items()} for c in (kept, made)
    )
    assert again == hashes
    assert made.config == kept.config


def test_the_examples_in_the_written_format_are_true():
    text = (GOLDEN.parents[1] / "docs" / "FORMAT.md").read_text(encoding="utf-8")
    example = re.search(r"```json\n(.*?)```", text, re.DOTALL)[1]
    QuantizationConfig.from_dict(json.loads("{" + example + "}")["quantization_config"])
    rows = re.findall(r"^\| (\d) \| ([\d ]+) \| [`01 ]+ \| `([0-9a-f ]+)` \|$", text, re.MULTILINE)
    assert [int(bits) for bits, _, _ in rows] == list(WIDTHS)
    for bits, codes, expected in rows:
        packed = packing.pack(torch.tensor([int(c) for c in codes.split()]), int(bits))
        assert bytes(packed.tolist()) == bytes.fromhex(expected)
