"""The definition of the experts against float64, and every CPU path against the definition."""

from dataclasses import replace

import pytest
import torch

from mcmoe_kernels.activations import Activation
from mcmoe_kernels.cpu.experts import (
    INT4_MAX_ROWS,
    MODES,
    dequantize_to,
    encode_int4,
    fused_experts_cpu,
    int4_supported,
    prepare,
    prepare_dense,
)
from mcmoe_kernels.formats import WIDTHS
from mcmoe_kernels.layer import (
    ExpertLayer,
    fused_experts_static,
    fused_experts_torch,
    packed_offsets,
    split_flat,
)
from tests.helpers.expert_layers import (
    DEEPSEEK_V4,
    GPT_OSS,
    RELU2,
    STEP,
    experts_float64,
    experts_rounded,
    random_input,
    random_layer,
    random_matrices,
    random_routing,
    relative_error,
)

MIXED13, MIXED2 = (1, 2, 3, 4, 0, 2), (2, 3, 1, 2, 0, 4)  # widths differ, one dropped


def run_mode(mode, x, layer, weights, ids):
    dense = prepare_dense(layer, x.dtype) if mode == "dense" else None
    return fused_experts_cpu(x, prepare(layer, mode, dense), weights, ids)


def run(path, x, layer, weights, ids):
    if path in MODES:
        return run_mode(path, x, layer, weights, ids)
    return {"torch": fused_experts_torch, "static": fused_experts_static}[path](
        x, layer, weights, ids
    )


PATHS = ("torch", "static", *MODES)


def test_the_definition_is_exact_in_float32():
    layer = random_layer(MIXED13, MIXED2)
    x, (weights, ids) = random_input(9, 256, torch.float32), random_routing(9, 6, 2)
    out = fused_experts_torch(x, layer, weights, ids)
    assert relative_error(out, experts_float64(x, layer, weights, ids)) < 1e-6


OTHERS = {
    "gelu": (Activation("gelu"), False),
    "gelu_tanh": (Activation("gelu_tanh"), False),
    "GPT-OSS": (GPT_OSS, True),
    "DeepSeek-V4": (DEEPSEEK_V4, False),
    "Step-3.5": (STEP, False),
    "relu2": (RELU2, False),
    "relu2, biases": (RELU2, True),
}


@pytest.mark.parametrize(("activation", "biases"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("path", PATHS)
def test_other_activations_and_biases(path, activation, biases):
    """Dropped experts, whose biases are NaN here, padding, pruned and remote ones, a repeated id;
    gates and ups that the limits clamp."""
    layer = random_layer(MIXED13, MIXED2, 256, 192, 64, activation=activation, biases=biases)
    expert_map = torch.tensor([5, 0, -1, 1, 2, 3, 4], dtype=torch.int32)
    layer = replace(layer, expert_map=expert_map)
    dtype = torch.bfloat16 if path == "int4" else torch.float32
    for tokens in (1, 37):
        x, (weights, ids) = random_input(tokens, 256, dtype), random_routing(tokens, 7, 3)
        ids[-1], ids[tokens // 2] = -1, torch.tensor([3, 4, 3])
        out = run(path, x, layer, weights, ids)
        reference = experts_float64(x, layer, weights, ids)
        assert relative_error(out, reference) < (0.01 if path == "int4" else 1e-5)
        assert tokens == 1 or torch.equal(out[-1], torch.zeros_like(out[-1]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("tokens", "top_k"),
    [
        (1, 2),  # decode
        (7, 2),  # fewer tokens than experts have slots
        (5, 6),  # top_k = E
        (3 * INT4_MAX_ROWS, 2),  # some experts above the int4 limit, some below
    ],
)
def test_no_path_errs_more_than_plain_bfloat16(path, tokens, top_k):
    layer = random_layer(MIXED13, MIXED2)
    x, (weights, ids) = random_input(tokens, 256), random_routing(tokens, 6, top_k)
    reference = experts_float64(x, layer, weights, ids)
    granted = relative_error(experts_rounded(x, layer, weights, ids), reference)
    assert relative_error(run(path, x, layer, weights, ids), reference) <= 1.1 * granted


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("path", MODES)
def test_every_width_and_group_size(bits, group_size, path):
    layer = random_layer((bits,) * 2, group_size=group_size, seed=bits)
    x, (weights, ids) = random_input(33, 256), random_routing(33, 2, 1)
    reference = experts_float64(x, layer, weights, ids)
    granted = relative_error(experts_rounded(x, layer, weights, ids), reference)
    assert relative_error(run(path, x, layer, weights, ids), reference) <= 1.1 * granted


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("path", ["torch", "static", "dense", "packed"])
def test_other_dtypes(dtype, path):
    layer = random_layer(MIXED13, MIXED2)
    x, (weights, ids) = random_input(9, 256, dtype), random_routing(9, 6, 2)
    out = run(path, x, layer, weights, ids)
    assert out.dtype == dtype and not int4_supported(layer, dtype)
    limit = {torch.float16: 1e-3, torch.float32: 1e-6}[dtype]
    assert relative_error(out, experts_float64(x, layer, weights, ids)) < limit


@pytest.mark.parametrize("path", PATHS)
def test_skipped_slots_and_padding_rows(path):
    layer = random_layer(MIXED13, MIXED2)
    x, (weights, ids) = random_input(8, 256), random_routing(8, 6, 2)
    ids[0] = -1  # padding, whatever it holds
    x[0] = float("nan")
    weights[0] = float("nan")
    ids[1, 0] = -1  # pruned
    ids[2] = 4  # dropped alone
    before = (x.clone(), weights.clone(), ids.clone())
    out = run(path, x, layer, weights, ids)
    for value, old in zip((x, weights, ids), before, strict=True):
        assert torch.equal(value.nan_to_num(), old.nan_to_num()), "an argument was modified"
    assert out.data_ptr() != x.data_ptr()
    assert torch.equal(out[[0, 2]], torch.zeros(2, 256, dtype=x.dtype))
    clean_x, clean_weights = x.nan_to_num(), weights.nan_to_num()
    reference = experts_float64(clean_x, layer, clean_weights, ids)
    assert relative_error(out, reference) < 0.01


@pytest.mark.parametrize("path", PATHS)
def test_a_repeated_id_counts_twice(path):
    layer = random_layer(MIXED13, MIXED2)
    x, weights = random_input(4, 256), torch.full((4, 2), 0.25)
    ids = torch.full((4, 2), 3, dtype=torch.int32)  # all tokens on one expert, twice
    twice = run(path, x, layer, weights, ids)
    once = run(path, x, layer, weights[:, :1] * 2, ids[:, :1])
    torch.testing.assert_close(twice, once, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_nothing_to_compute_gives_zeros(path, tokens):
    layer = random_layer(MIXED13, MIXED2)
    ids = torch.full((tokens, 2), -1, dtype=torch.int32)
    out = run(path, random_input(tokens, 256), layer, torch.rand(tokens, 2), ids)
    assert torch.equal(out, torch.zeros(tokens, 256, dtype=torch.bfloat16))


@pytest.mark.parametrize("path", PATHS)
def test_expert_parallel_ranks_add_up(path):
    whole = random_layer(MIXED13, MIXED2)
    x, (weights, ids) = random_input(11, 256), random_routing(11, 6, 3)
    ids[4, 1] = -1
    total = torch.zeros(11, 256)
    for held in ((0, 2, 4), (1, 3, 5)):
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[list(held)] = torch.arange(3, dtype=torch.int32)
        total += run(path, x, _part(whole, held, expert_map), weights, ids).float()
    assert relative_error(total, experts_float64(x, whole, weights, ids)) < 0.01


def _part(layer: ExpertLayer, held, expert_map) -> ExpertLayer:
    def pick(m):
        return replace(
            m, **{f: tuple(getattr(m, f)[e] for e in held) for f in ("bits", "packed", "scale")}
        )

    return replace(layer, w13=pick(layer.w13), w2=pick(layer.w2), expert_map=expert_map)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_int4_form_is_the_stored_weight(bits):
    matrices = random_matrices((bits,), 64, 256, 64, seed=bits)
    exact = matrices.dequantize(0)
    rows = encode_int4(matrices, 0).matmul(torch.eye(256, dtype=torch.bfloat16))
    assert torch.equal(rows.t(), exact.bfloat16())  # one-hot input: the output rounds once
    # A constant input adds a group's errors up, if there are any.
    out = encode_int4(matrices, 0).matmul(torch.ones(1, 256, dtype=torch.bfloat16))
    torch.testing.assert_close(out[0].float(), exact.sum(-1), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("bits", WIDTHS)
def test_fast_dequantizing_is_the_definition_rounded_once(bits):
    matrices = random_matrices((bits,), 64, 256, 64, seed=bits)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(dequantize_to(matrices, 0, dtype), matrices.dequantize(0).to(dtype))


def test_flat_buffers_are_cut_at_the_offsets():
    bits = (3, 0, 1)
    source = random_matrices(bits, 64, 96, 32, seed=0)
    offsets = packed_offsets(bits, 64, 96)
    assert offsets == (0, 2304, 2304, 3072) and not any(o % 256 for o in offsets)
    flat = torch.zeros(offsets[-1], dtype=torch.uint8)
    for start, packed in zip(offsets[:-1], source.packed, strict=True):
        flat[start : start + packed.numel()] = packed.flatten()
    scale = torch.stack([source.scale[0], source.scale[2]])
    cut = split_flat(flat, scale, bits, 64, 96)
    for e in (0, 2):
        assert torch.equal(cut.dequantize(e), source.dequantize(e))
    cut.packed[0].zero_()
    assert not flat[:2304].any(), "the pieces are views"
