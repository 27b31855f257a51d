"""Originals that their makers quantized: what their numbers are, and that the rest of the
compressor sees nothing of it."""

from types import SimpleNamespace

import pytest
import torch

from mcmoe_vllm.checkpoint import files
from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.checkpoint.sources import with_16_bit_tensors
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.compress.pipeline import quantize
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.inspection import inspect_checkpoint
from mcmoe_vllm.model.expert_reader import StoredExperts
from mcmoe_vllm.model.experts import interleave
from mcmoe_vllm.model.gating import Gating
from mcmoe_vllm.model.moe_model import open_model
from mcmoe_vllm.model.runner import final_hidden
from tests.conftest import EXAMPLE_MODEL, make_tiny_model
from tests.families.families import save_family
from tests.helpers.sources import (
    e2m1,
    e4m3,
    from_fp8,
    low_first,
    make_fp8_pair,
    scaled,
    to_fp8,
    write_source,
)

FP8, MXFP4 = {"quant_method": "fp8"}, {"quant_method": "mxfp4"}


def int4(**changes):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": 32, **changes}  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": weights}},
    }


CHANNELS = int4(type="float", num_bits=8, strategy="channel", group_size=None)


def random_codes(*shape, dtype=torch.uint8):
    """Every bit pattern, but for NaN's where the codes are of 8 bits each."""
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.int32:
        return torch.randint(-(1 << 31), 1 << 31, shape, dtype=dtype, generator=generator)
    found = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if dtype == torch.float8_e4m3fn:
        found[found & 127 == 127] = 1  # the least subnormal
    return found.view(dtype)


def exponents(*shape):
    """Bytes of powers of two, the least and nearly the greatest among them."""
    found = torch.randint(100, 140, shape, dtype=torch.uint8)
    ends = torch.tensor([0, 1, 251], dtype=torch.uint8)[: found.numel()]
    found.view(-1)[: len(ends)] = ends
    return found


def floats(*shape, dtype=torch.float32):
    found = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found.view(-1)[0] = 2.0**-120  # products are subnormal
    return found


def powers(scale):
    return [[2.0 ** (byte - 127) for byte in row] for row in scale.view(torch.uint8).tolist()]


# What is stored, quantization_config, and the numbers [N, K] by definition.


def fp8_codes(n, k):
    codes = random_codes(n, k, dtype=torch.float8_e4m3fn)
    return codes, [[e4m3(code) for code in row] for row in codes.view(torch.uint8).tolist()]


def fp8_blocks(n, k):
    (codes, numbers), scale = fp8_codes(n, k), floats(-(-n // 128), -(-k // 128))
    stored = {"a.weight": codes, "a.weight_scale_inv": scale}
    return stored, FP8, scaled(numbers, scale.double().tolist(), 128, 128)


def fp8_powers(n, k):
    (codes, numbers), scale = fp8_codes(n, k), exponents(-(-n // 128), -(-k // 128))
    stored = {"a.weight": codes, "a.scale": scale.view(torch.float8_e8m0fnu)}
    return stored, FP8, scaled(numbers, powers(scale), 128, 128)


def fp8_channels(n, k):
    (codes, numbers), scale = fp8_codes(n, k), floats(n, 1, dtype=torch.bfloat16)
    stored = {"a.weight": codes, "a.weight_scale": scale}
    return stored, CHANNELS, scaled(numbers, scale.double().tolist(), 1, k)


def fp4(n, k):
    codes, scale = random_codes(n, k // 2), exponents(n, k // 32)
    numbers = [[e2m1(c) for byte in row for c in low_first(byte, 2)] for row in codes.tolist()]
    stored = {"a.weight": codes.view(torch.int8), "a.scale": scale.view(torch.float8_e8m0fnu)}
    return stored, FP8, scaled(numbers, powers(scale), 1, 32)


def packed_int4(n, k):
    codes = random_codes(n, k // 8, dtype=torch.int32)
    scale = floats(n, k // 32, dtype=torch.bfloat16)
    numbers = [[c - 8.0 for word in row for c in low_first(word, 8)] for row in codes.tolist()]
    stored = {"a.weight_packed": codes, "a.weight_scale": scale,
              "a.weight_shape": torch.tensor([n, k])}  # fmt: skip
    return stored, int4(), scaled(numbers, scale.double().tolist(), 1, 32)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (fp8_blocks, (256, 128)),
        (fp8_blocks, (200, 160)),  # the last blocks are smaller; a half of 200 is no block
        (fp8_blocks, (6, 10)),  # one block, not full
        (fp8_powers, (130, 64)),
        (fp8_channels, (5, 64)),
        (fp4, (5, 64)),
        (packed_int4, (5, 96)),
    ],
)  # fmt: skip
def test_every_number_is_what_the_format_says(tmp_path, make, shape):
    stored, settings, wanted = make(*shape)
    folder = write_source(
        tmp_path / "a",
        {**stored, "b": torch.ones(2)},
        dtype="float32",
        quantization_config=settings,
    )
    view = with_16_bit_tensors(open_checkpoint(folder))
    assert set(view.tensors) == {"a.weight", "b"} and view.config == {"dtype": "float32"}
    info, found = view.tensors["a.weight"], view.read_weights(["b", "a.weight"])
    assert (info.dtype, info.shape, info.nbytes) == ("F32", shape, 4 * shape[0] * shape[1])
    # One rounding, to float32, here as there.
    assert torch.equal(found["a.weight"], wanted.float()) and torch.equal(found["b"], torch.ones(2))
    assert view.num_parameters == shape[0] * shape[1] + 2
    assert view.on_disk.nbytes == sum(t.nbytes for t in stored.values()) + 8


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    """gpt-oss's tensors with two experts, three groups of columns; and what they mean [E, N, K]."""
    torch.manual_seed(0)
    tensors, meaning = {}, {}
    for name, (n, groups) in {"gate_up_proj": (8, 3), "down_proj": (96, 1)}.items():
        blocks, scales = random_codes(2, n, groups, 16), exponents(2, n, groups)
        tensors |= {f"x.{name}_blocks": blocks, f"x.{name}_scales": scales}
        tensors[f"x.{name}_bias"] = torch.ones(2, n, dtype=torch.bfloat16)
        meaning[name] = torch.stack(
            [
                scaled(
                    [[e2m1(c) for byte in row for c in low_first(byte, 2)] for row in rows],
                    powers(scales[e]), 1, 32,
                )
                for e, rows in enumerate(blocks.flatten(2).tolist())
            ]
        )  # fmt: skip
    folder = write_source(
        tmp_path_factory.mktemp("mxfp4") / "a", tensors, quantization_config=MXFP4
    )
    return folder, meaning


def test_an_expert_of_a_fused_source_is_read_alone(fused, monkeypatch):
    folder, meaning = fused
    view = with_16_bit_tensors(open_checkpoint(folder))
    names = ("x.gate_up_proj", "x.down_proj")
    assert [view.tensors[n].shape for n in names] == [(2, 96, 8), (2, 32, 96)]
    assert {t.dtype for t in view.tensors.values()} == {"BF16"}  # without a word in config.json
    together = view.read_weights(names)
    for name in names:
        wanted = meaning[name.removeprefix("x.")].transpose(1, 2)
        assert torch.equal(together[name], wanted.to(torch.bfloat16))
    skeleton = SimpleNamespace(are_transposed=lambda layer: True, gatings={0: Gating(True)})
    layout = SimpleNamespace(
        has_fused_experts=lambda layer: True,
        fused_experts=lambda layer: names,
        expert_biases=lambda layer: (),
        skeleton=skeleton,
    )
    monkeypatch.setattr(files.Checkpoint, "read", None)  # whole tensors
    expert = StoredExperts(view, layout).read(0, 1)
    for weight, name in ((interleave(expert.w13), "gate_up_proj"), (expert.w2, "down_proj")):
        assert torch.equal(weight, meaning[name][1].to(torch.bfloat16))


# The same by the libraries that define the formats


def test_fp8_and_fp4_are_as_transformers_reads_them(tmp_path):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    read = getattr(fp8.Fp8Dequantize(None), "_dequantize_one", None)
    if read is None:
        pytest.skip("this version of transformers has no such function")
    for number, (make, shape) in enumerate([(fp8_blocks, (256, 384)), (fp4, (8, 64))]):
        stored, settings, _ = make(*shape)
        folder = write_source(
            tmp_path / str(number), stored, dtype="float32", quantization_config=settings
        )
        found = with_16_bit_tensors(open_checkpoint(folder)).read(["a.weight"])["a.weight"]
        assert torch.equal(found, read(*stored.values(), torch.float32))


def test_mxfp4_is_as_transformers_reads_it(fused):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    folder, _ = fused
    checkpoint = open_checkpoint(folder)
    pair = checkpoint.read(["x.gate_up_proj_blocks", "x.gate_up_proj_scales"]).values()
    found = with_16_bit_tensors(checkpoint).read(["x.gate_up_proj"])["x.gate_up_proj"]
    assert torch.equal(found, mxfp4.convert_moe_packed_tensors(*pair, dtype=torch.bfloat16))


@pytest.mark.nightly
def test_int4_is_as_compressed_tensors_packs_it(tmp_path):
    packing = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="compressed-tensors comes with vLLM",
    )
    codes = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    scale = torch.rand(6, 2)
    tensors = {"a.weight_packed": packing.pack_to_int32(codes, 4), "a.weight_scale": scale}
    folder = write_source(tmp_path / "a", tensors, dtype="float32", quantization_config=int4())
    found = with_16_bit_tensors(open_checkpoint(folder)).read(["a.weight"])["a.weight"]
    assert torch.equal(found, codes * scale.repeat_interleave(32, 1))


# What is refused


@pytest.mark.parametrize(
    ("settings", "without", "tensors", "messages"),
    [
        ({"quant_method": "gptq"}, [], {}, ["quant_method 'gptq'", "compressed-tensors (pack-"
            "quantized int4, float-quantized fp8), fp8 (fp8 blocks, fp4 e2m1), mxfp4"]),
        ({"bits": 4}, [], {}, ["quant_method 'none'", "readable are"]),
        (["fp8"], [], {}, ["quant_method ['fp8']"]),
        (None, [], {}, ["a.weight with a.weight_scale_inv", "has no quantization_config",
            "of the quant_method 'fp8'"]),
        (MXFP4, [], {}, ["has the quant_method 'mxfp4' in config.json, but no tensor is stored "
            "so; a.weight is stored as fp8 has it"]),
        (FP8, ["a.weight", "a.weight_scale_inv"], {}, ["no tensor is stored so. Give"]),
        (FP8, ["a.weight_scale_inv"], {}, ["in 1 place:", "a.weight is F8_E4M3, and "
            "a.weight_scale_inv is missing"]),
        (FP8, [], {"b.weight": torch.ones(128, 128), "b.weight_scale_inv": torch.ones(1, 1),
            "c.weight_scale_inv": torch.ones(1, 1)}, ["in 2 places:", "b.weight_scale_inv holds "
            "scales, and there are no codes", "c.weight_scale_inv holds scales"]),
        (FP8, [], {"a.weight_scale_inv": torch.ones(1, 2), "b.weight": torch.zeros(
            3, dtype=torch.float8_e4m3fn)}, ["in 2 places:", "a.weight_scale_inv is F32 [1, 2], "
            "those of a.weight, [256, 128], are F32 or BF16 or F16 or F8_E8M0 or U8 [2, 1]",
            "b.weight is F8_E4M3 [3], needs rows and columns"]),
        ({**FP8, "weight_block_size": [64, 64]}, [], {}, ["or F8_E8M0 or U8 [4, 2]"]),
        ({**FP8, "weight_block_size": None}, [], {}, ["weight_block_size None", "[128, 128]"]),
        ({**FP8, "weight_block_size": [128, 0]}, [], {}, ["weight_block_size [128, 0]"]),
        (MXFP4, [], {"g_blocks": torch.zeros(2, 4, 3, 16, dtype=torch.uint8), "g": torch.ones(2),
            "g_scales": torch.zeros(2, 4, 3, dtype=torch.int8)}, ["in 2 places:", "g_blocks and g "
            "are one weight, stored twice", "g_scales is I8 [2, 4, 3]"]),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_listed(tmp_path, settings, without, tensors, messages):
    stored = {**fp8_blocks(256, 128)[0], **tensors}
    stored = {name: t for name, t in stored.items() if name not in without} | {"n": torch.ones(1)}
    config = {} if settings is None else {"quantization_config": settings}
    folder = write_source(tmp_path / "a", stored, **config)
    with pytest.raises(UserError) as refused:
        with_16_bit_tensors(open_checkpoint(folder))
    for message in messages:
        assert message in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [{"num_bits": 8}, {"symmetric": False}, {"group_size": 0}, {"strategy": "tensor"},
     {"type": "float"}],
)  # fmt: skip
def test_other_schemes_of_compressed_tensors_are_refused(tmp_path, change):
    stored, _, _ = packed_int4(4, 64)
    folder = write_source(tmp_path / "a", stored, quantization_config=int4(**change))
    with pytest.raises(UserError, match="readable are symmetric weights of type int, num_bits 4"):
        with_16_bit_tensors(open_checkpoint(folder))


@pytest.mark.parametrize(("name", "value"), [("a.scale", 255), ("a.weight", 127)])
def test_codes_and_scales_that_are_nan_are_named(tmp_path, name, value):
    stored, settings, _ = fp8_powers(128, 64)
    stored[name].view(torch.uint8)[0, 0] = value
    folder = write_source(tmp_path / "a", stored, quantization_config=settings)
    view = with_16_bit_tensors(open_checkpoint(folder))
    with pytest.raises(UserError, match=f"NaN or infinite weights in 1 tensor: {name};"):
        view.read_weights(["a.weight"])


def test_16_bits_are_opened_as_they_are(tmp_path):
    checkpoint = open_checkpoint(write_source(tmp_path / "a", {"a": torch.ones(1)}))
    assert with_16_bit_tensors(checkpoint) is checkpoint.on_disk


def test_the_language_models_own_config_counts(tmp_path):
    stored, settings, _ = packed_int4(4, 64)
    config = {"text_config": {"dtype": "float16", "n": 1, "quantization_config": settings}}
    view = with_16_bit_tensors(open_checkpoint(write_source(tmp_path / "a", stored, **config)))
    assert view.config == {"text_config": {"dtype": "float16", "n": 1}}
    assert view.tensors["a.weight"].dtype == "F16"
    assert view.read(["a.weight"])["a.weight"].dtype == torch.float16


# The whole way


def test_an_fp8_model_compresses_as_the_same_model_in_16_bits(tmp_path, calibration_text):
    """Width 192: the last blocks of experts are half as wide."""
    source = make_tiny_model(tmp_path / "source", "mixtral", layers=1, intermediate_size=192)
    made = make_fp8_pair(source, tmp_path)
    for folder in made:
        report = quantize(
            QuantizeOptions(
                model=str(folder), output=str(folder.with_name(f"{folder.name}-out")),
                calibration=str(calibration_text), samples=2, sequence_length=32, bits=2,
                recipe="paper", group_size=64, dense_bits=16,
            )
        )  # fmt: skip
        assert report["bytes"]["original"] == open_checkpoint(folder).nbytes
    ours, plain = (open_checkpoint(folder.with_name(f"{folder.name}-out")) for folder in made)
    assert ours.config == plain.config
    assert {n: (t.dtype, t.shape) for n, t in ours.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in plain.tensors.items()
    }
    theirs = plain.read(plain.names())
    assert all(torch.equal(t, theirs[n]) for n, t in ours.read(ours.names()).items())
    inspect_checkpoint(ours.path, check=True)
    with pytest.raises(UserError, match="is compressed already; give the original model"):
        quantize(QuantizeOptions(model=str(ours.path), output=str(tmp_path / "twice")))


@pytest.mark.nightly
def test_a_deepseek_model_in_fp8_runs_as_in_16_bits(tmp_path):
    made = make_fp8_pair(save_family("deepseek_v3", tmp_path / "source", EXAMPLE_MODEL), tmp_path)
    windows = torch.arange(32).view(1, 32)
    ours, plain = (final_hidden(open_model(open_checkpoint(f), "cpu"), windows) for f in made)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_by_hand_and_back():
    weight = torch.randn(200, 160)
    codes, scale = to_fp8(weight)
    # Three bits of mantissa: half a step of 1/8 of the power of two below; the last ones are
    # subnormal, in steps of 2^-9 of a scale.
    error = (from_fp8(codes, scale) - weight).abs()
    assert bool((error <= weight.abs() / 16 + scale.max() * 2.0**-10).all())
