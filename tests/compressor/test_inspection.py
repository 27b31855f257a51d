"""Inspection believes tensors, not config.json: a sound checkpoint, then one damage at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mcmoe_kernels.formats import packing
from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.checkpoint.format import (
    FORMAT_VERSION,
    INDEX_FILE,
    MANIFEST_FILE,
    QuantizationConfig,
)
from mcmoe_vllm.checkpoint.manifest import write_manifest
from mcmoe_vllm.checkpoint.writing import shard_name, write_index, write_shard
from mcmoe_vllm.cli import main
from mcmoe_vllm.disk import read_json, write_json
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.inspection import inspect_checkpoint, print_inspection

HIDDEN, WIDTH, GROUP, EXPERTS, LAYERS = 64, 32, 32, 5, 2
BITS = {0: ("01234", "01243"), 1: ("32211", "32211")}
SHARDS = [shard_name(i + 1, LAYERS + 1) for i in range(LAYERS + 1)]
FIRST = "model.layers.0.mlp.experts"


def expert_tensors(prefix, rows, columns, bits, version):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    shape = (rows, columns // GROUP)
    scale, zero = torch.full(shape, 0.25), torch.full(shape, 0.5 if bits == 1 else 1.0)
    if version == 1:
        stored = torch.stack((scale, zero), dim=-1).flatten(1).half()
    else:
        stored = packing.pack_scale(scale, zero, bits)
    return {f"{prefix}.weight_packed": packing.pack(codes, bits), f"{prefix}.weight_scale": stored}


def linear_tensors(prefix, rows, columns, dense_bits):
    if dense_bits == 16:
        return {f"{prefix}.weight": torch.zeros(rows, columns, dtype=torch.bfloat16)}
    return {
        f"{prefix}.qweight": packing.pack_int4_linear(torch.full((rows, columns), 9)),
        f"{prefix}.scales": torch.full((columns // GROUP, rows), 0.5, dtype=torch.float16),
    }


def make_checkpoint(path: Path, dense_bits: int = 4, version: int = FORMAT_VERSION) -> Path:
    """A Qwen2-MoE checkpoint: dropped experts, widths that differ, attention and shared experts."""
    path.mkdir()
    plain = {"dtype": torch.bfloat16}
    write_shard(
        path / SHARDS[0],
        {
            "model.embed_tokens.weight": torch.ones(16, HIDDEN, **plain),
            "model.norm.weight": torch.ones(HIDDEN, **plain),
            "lm_head.weight": torch.ones(16, HIDDEN, **plain),
        },
    )
    for layer, (w13, w2) in BITS.items():
        block = f"model.layers.{layer}"
        tensors = {
            f"{block}.mlp.gate.weight": torch.ones(EXPERTS, HIDDEN, **plain),
            f"{block}.mlp.shared_expert_gate.weight": torch.ones(1, HIDDEN, **plain),
            f"{block}.self_attn.q_proj.bias": torch.ones(HIDDEN, **plain),
            f"{block}.self_attn.k_proj.bias": torch.ones(8, **plain),
            f"{block}.self_attn.v_proj.bias": torch.ones(8, **plain),
            f"{block}.input_layernorm.weight": torch.ones(HIDDEN, **plain),
            f"{block}.post_attention_layernorm.weight": torch.ones(HIDDEN, **plain),
        }
        for name, rows in (("q", HIDDEN), ("k", 8), ("v", 8), ("o", HIDDEN)):
            prefix = f"{block}.self_attn.{name}_proj"
            tensors |= linear_tensors(prefix, rows, HIDDEN, dense_bits)
        for name, shape in (
            ("gate_proj", (WIDTH, HIDDEN)),
            ("up_proj", (WIDTH, HIDDEN)),
            ("down_proj", (HIDDEN, WIDTH)),
        ):
            tensors |= linear_tensors(f"{block}.mlp.shared_expert.{name}", *shape, dense_bits)
        for expert, (b13, b2) in enumerate(zip(map(int, w13), map(int, w2), strict=True)):
            prefix = f"{block}.mlp.experts.{expert}"
            if b13:
                tensors |= expert_tensors(f"{prefix}.gate_proj", WIDTH, HIDDEN, b13, version)
                tensors |= expert_tensors(f"{prefix}.up_proj", WIDTH, HIDDEN, b13, version)
                tensors |= expert_tensors(f"{prefix}.down_proj", HIDDEN, WIDTH, b2, version)
        write_shard(path / SHARDS[layer + 1], tensors)
    quantization = QuantizationConfig(
        group_size=dict.fromkeys(("w13", "w2", "dense"), GROUP),
        expert_bits=BITS,
        dense_bits=dense_bits,
        dense_modules=("self_attn", "shared_expert") if dense_bits == 4 else (),
        average_bits={"nominal": 2.0},
        format_version=version,
    )
    write_json(
        path / "config.json",
        {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "dtype": "bfloat16",
            "vocab_size": 16,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": WIDTH,
            "hidden_size": HIDDEN,
            "moe_intermediate_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_experts": EXPERTS,
            "quantization_config": quantization.to_dict(),
        },
    )
    write_index(path, SHARDS)
    write_manifest(path, SHARDS)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture
def old(tmp_path):
    """A checkpoint of format version 1: scale, zero, scale, zero, ... of a row in float16."""
    return make_checkpoint(tmp_path / "old", version=1)


def edit_shard(folder, layer, edit, hashes=True):
    """Change a layer's tensors; `hashes`: make index and manifest anew to match them."""
    checkpoint = open_checkpoint(folder)
    shard = SHARDS[layer + 1]
    tensors = checkpoint.read([n for n, t in checkpoint.tensors.items() if t.shard == shard])
    edit(tensors)
    write_shard(folder / shard, tensors)
    if hashes:
        write_index(folder, SHARDS)
        write_manifest(folder, SHARDS)


def edit_config(folder, edit):
    config = read_json(folder / "config.json")
    edit(config)
    write_json(folder / "config.json", config)


def refusal(folder, check=False) -> str:
    with pytest.raises(UserError) as e:
        inspect_checkpoint(folder, check=check)
    return str(e.value)


# A sound checkpoint


def test_numbers_are_those_of_the_tensors(sound):
    found = inspect_checkpoint(sound, check=True)
    assert found.layers == (0, 1) and found.num_experts == EXPERTS and found.num_shards == 3
    assert found.bits[0] == ((0, 1, 2, 3, 4), (0, 1, 2, 4, 3))
    matrix = HIDDEN * WIDTH
    assert found.expert_parameters == LAYERS * EXPERTS * 3 * matrix
    dense = LAYERS * (2 * HIDDEN * HIDDEN + 2 * 8 * HIDDEN + 3 * matrix)
    rest = (2 * 16 + 1) * HIDDEN + LAYERS * ((EXPERTS + 1 + 1 + 2) * HIDDEN + 2 * 8)
    assert found.parameters == found.expert_parameters + dense + rest
    assert found.other_bytes == 2 * rest
    assert found.dense_bytes == dense // 2 + dense // GROUP * 2
    codes = sum(2 * int(a) + int(b) for w in BITS.values() for a, b in zip(*w, strict=True))
    kept = 3 * (4 + 5)  # matrices; one expert of layer 0 is dropped
    assert found.expert_bytes == codes * matrix // 8 + kept * matrix // GROUP * 2
    assert found.expert_bits == 8 * found.expert_bytes / found.expert_parameters
    assert found.code_bits == codes / (3 * LAYERS * EXPERTS)
    assert found.total_bytes == open_checkpoint(sound).nbytes
    assert found.model_bits == 8 * found.total_bytes / found.parameters


def test_parameters_are_those_of_the_model_without_int4(sound, tmp_path):
    plain = inspect_checkpoint(make_checkpoint(tmp_path / "plain", dense_bits=16), check=True)
    assert plain.parameters == inspect_checkpoint(sound).parameters
    assert plain.dense_bytes == 0
    assert plain.model_bits > inspect_checkpoint(sound).model_bits


def test_a_layer_without_experts_has_no_shared_expert(folder):
    def make_plain(tensors):
        for name in [n for n in tensors if ".mlp." in n]:
            del tensors[name]
        for name, shape in (("gate", (4, HIDDEN)), ("up", (4, HIDDEN)), ("down", (HIDDEN, 4))):
            tensors[f"model.layers.1.mlp.{name}_proj.weight"] = torch.zeros(shape)

    edit_shard(folder, 1, make_plain)
    edit_config(folder, lambda c: c["quantization_config"]["expert_bits"].pop("1"))
    edit_config(folder, lambda c: c.update(mlp_only_layers=[1], intermediate_size=4))
    found = inspect_checkpoint(folder, check=True)
    assert found.layers == (0,) and found.pairs() == {0: [(0, 0), (1, 1), (2, 2), (3, 4), (4, 3)]}
    assert found.to_dict()["matrices"] == {"0": 3, "1": 3, "2": 3, "3": 3, "4": 3}


def test_to_dict_is_json(sound):
    value = json.loads(json.dumps(inspect_checkpoint(sound).to_dict()))
    assert value["bits"]["0"]["w2"] == [0, 1, 2, 4, 3]
    assert value["checked"] is False and value["quantization_config"]["quant_method"] == "mcmoe"
    assert sum(value["bytes"][k] for k in ("experts", "dense", "other")) == value["bytes"]["total"]


def test_printed_table_is_plain_in_a_pipe(sound, capsys):
    print_inspection(inspect_checkpoint(sound))
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    for part in ("Qwen2MoeForCausalLM: 2 layers x 5 experts", "01234", "01243", "32211", "true"):
        assert part in out


def test_printed_table_is_coloured_on_a_terminal(sound, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_inspection(inspect_checkpoint(sound))
    assert "\x1b[" in capsys.readouterr().out


def test_the_table_counts_whole_matrices(sound, capsys):
    print_inspection(inspect_checkpoint(sound))
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["0", "01234", "01243", "3", "3", "3", "3", "3", "2.000"],
        ["1", "32211", "32211", "0", "6", "6", "3", "0", "1.800"],
    ]


def test_a_missing_folder_is_refused_before_the_work(sound, capsys, tmp_path):
    missing = tmp_path / "missing"
    assert main(["inspect", str(sound), "--heatmap", str(missing / "bits.png")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"{missing}, the folder for bits.png, does not exist" in err


def test_command_line(sound, folder, capsys, tmp_path):
    picture = tmp_path / "bits.png"
    assert main(["inspect", str(sound), "--check", "--json", "--heatmap", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["checked"] is True and "all checks passed" in err
    assert picture.read_bytes()[:4] == b"\x89PNG"
    edit_shard(folder, 0, lambda t: t.pop(f"{FIRST}.1.up_proj.weight_scale"))
    assert main(["inspect", str(folder)]) == 2
    assert f"{FIRST}.1.up_proj.weight_scale is missing" in capsys.readouterr().err


# What is no mcmoe checkpoint


def test_plain_checkpoint(folder):
    edit_config(folder, lambda c: c.pop("quantization_config"))
    message = refusal(folder)
    assert "is not compressed" in message and f"mcmoe quantize {folder}" in message


def test_checkpoint_of_another_tool(folder):
    edit_config(folder, lambda c: c["quantization_config"].update(quant_method="gptq"))
    assert "quantized by another tool (quant_method 'gptq'" in refusal(folder)


@pytest.mark.parametrize("value", [3, [], {}, {"quant_method": "mcmoe", "format_version": 3}])
def test_unusable_quantization_config(folder, value):
    edit_config(folder, lambda c: c.update(quantization_config=value))
    assert "config.json: " in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "'hidden_size' expected int"),
        ({"moe_intermediate_size": "32"}, "'moe_intermediate_size' expected int"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776, there are"),
        ({"num_experts": 6}, "the model has 6 experts, quantization_config has widths of 5"),
        ({"num_hidden_layers": 1}, "layer 1 has widths in expert_bits but no routed experts"),
        ({"hidden_size": 48}, "the hidden size is 48, no multiple of the group size 32 of w13"),
    ],
)
def test_model_config_that_does_not_fit(folder, change, message):
    edit_config(folder, lambda c: c.update(change))
    assert message in refusal(folder)


# Tensors against the config


def set_widths(layer, widths):
    return lambda c: c["quantization_config"]["expert_bits"].update({str(layer): widths})


def test_width_that_contradicts_the_tensor(folder):
    edit_config(folder, set_widths(0, ["02234", "01243"]))
    message = refusal(folder)
    for name in ("gate_proj", "up_proj"):
        assert (
            f"{FIRST}.1.{name}.weight_packed is U8 [32, 8] (1 bit), config says U8 [32, 16] "
            "(2 bits)" in message
        )
    assert "in 2 places" in message and "down_proj" not in message


def test_dropped_expert_that_has_tensors(folder):
    edit_config(folder, set_widths(1, ["32210", "32210"]))
    message = refusal(folder)
    assert "in 6 places" in message
    assert "model.layers.1.mlp.experts.4.up_proj.weight_packed is not expected" in message


def test_expert_without_tensors(folder):
    edit_config(folder, set_widths(0, ["11234", "11243"]))
    message = refusal(folder)
    assert "in 6 places" in message
    assert f"{FIRST}.0.gate_proj.weight_packed is missing, config says 1 bit" in message


def test_layer_that_the_config_forgets(folder):
    edit_config(folder, lambda c: c["quantization_config"]["expert_bits"].pop("1"))
    message = refusal(folder)
    assert "layer 1 has routed experts but no widths in expert_bits" in message


def test_layer_without_a_router(folder):
    edit_shard(folder, 1, lambda t: t.pop("model.layers.1.mlp.gate.weight"))
    assert "model.layers.1.mlp.gate.weight is missing" in refusal(folder)


def replace(name, edit):
    return lambda tensors: tensors.update({name: edit(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{FIRST}.2.up_proj.weight_packed"), "weight_packed is missing"),
        (lambda t: t.pop(f"{FIRST}.2.up_proj.weight_scale"), "weight_scale is missing"),
        (
            replace(f"{FIRST}.2.up_proj.weight_packed", lambda t: t.to(torch.int16)),
            "is I16 [32, 16] (2 bits), config says U8 [32, 16]",
        ),
        (replace(f"{FIRST}.2.up_proj.weight_packed", lambda t: t[:8]), "is U8 [8, 16], config"),
        (replace(f"{FIRST}.2.up_proj.weight_packed", lambda t: t[:, :9]), "is U8 [32, 9], config"),
        (replace(f"{FIRST}.2.up_proj.weight_packed", torch.flatten), "is U8 [512], config"),
        (
            replace(f"{FIRST}.2.up_proj.weight_scale", lambda t: t.float()),
            "weight_scale is F32 [32, 2], config says I16 [32, 2] (group size 32)",
        ),
        (replace(f"{FIRST}.2.up_proj.weight_scale", lambda t: t[:, :1]), "is I16 [32, 1], config"),
        (
            lambda t: t.update({f"{FIRST}.5.up_proj.weight_packed": torch.zeros(1)}),
            f"{FIRST}.5.up_proj.weight_packed is not expected",
        ),
        (
            lambda t: t.update({f"{FIRST}.2.up_proj.weight": torch.zeros(1)}),
            f"{FIRST}.2.up_proj.weight is not expected",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.gate.qweight": torch.zeros(1)}),
            "model.layers.0.mlp.gate.qweight is not expected: config says 16 bits",
        ),
    ],
)
def test_expert_tensors_that_contradict_the_config(folder, edit, message):
    edit_shard(folder, 0, edit)
    assert message in refusal(folder)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{Q}.qweight"), f"{Q}.qweight is missing"),
        (lambda t: t.pop(f"{Q}.scales"), f"{Q}.scales is missing"),
        (
            lambda t: t.update({f"{Q}.weight": torch.zeros(HIDDEN, HIDDEN)}),
            f"{Q}.weight is not expected: config says int4",
        ),
        (replace(f"{Q}.qweight", lambda t: t.long()), "qweight is I64 [8, 64], config says I32"),
        (replace(f"{Q}.qweight", torch.flatten), "qweight is I32 [512], config says I32 [8, 64]"),
        (
            replace(f"{Q}.qweight", lambda t: t[:3]),
            "qweight is I32 [3, 64], config says I32 [8, 64]",
        ),
        (replace(f"{Q}.scales", lambda t: t.t()), "scales is F16 [64, 2], config says F16 [2, 64]"),
        (replace(f"{Q}.scales", lambda t: t.bfloat16()), "scales is BF16 [2, 64], config says F16"),
        (
            lambda t: t.pop("model.layers.0.mlp.shared_expert.up_proj.qweight"),
            "shared_expert.up_proj.qweight is missing",
        ),
    ],
)
def test_int4_linears_that_contradict_the_config(folder, edit, message):
    edit_shard(folder, 0, edit)
    found = refusal(folder)
    assert message in found and "in 1 place:" in found


def test_config_that_denies_int4(folder):
    edit_config(folder, lambda c: c["quantization_config"].update(dense_bits=16))
    message = refusal(folder)
    assert f"{Q}.weight is missing" in message
    assert "in 42 places" in message


def test_modules_that_the_architecture_lacks(folder):
    edit_config(folder, lambda c: c["quantization_config"]["dense_modules"].append("lm_head"))
    assert "dense_modules names 'lm_head', Qwen2MoeForCausalLM has self_attn" in refusal(folder)


def test_offenders_are_listed_as_far_as_a_screen_goes(folder):
    edit_config(folder, set_widths(0, ["03421", "03421"]))
    edit_config(folder, set_widths(1, ["11133", "11133"]))
    message = refusal(folder)
    # 3 matrices of 4 experts, then of 5.
    listed = message.count("\n  - ") - 1
    assert "in 27 places" in message and f"and {27 - listed} more" in message
    assert 5 <= listed <= 20 and len(message) < 1000


# check=True


def test_flipped_byte_is_found_in_shard_and_tensor(folder):
    file = folder / SHARDS[2]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    inspect_checkpoint(folder)  # headers alone cannot know
    message = refusal(folder, check=True)
    assert f"{SHARDS[2]} has another SHA-256" in message and "2 checks failed" in message
    assert "model.layers.1." in message


def test_shard_of_another_size(folder):
    edit_shard(
        folder,
        0,
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}),
        hashes=False,
    )
    message = refusal(folder, check=True)
    assert f"{SHARDS[1]} has" in message and "bytes, the manifest says" in message
    assert "rotary_emb.inv_freq is not in mcmoe_manifest.json" in message


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda i: i["weight_map"].pop("model.norm.weight"), "model.norm.weight is not in"),
        (lambda i: i["metadata"].update(total_size=5), "total_size 5, the tensors take"),
        (lambda i: i.pop("metadata"), "total_size None"),
    ],
)
def test_index_that_leaves_something_out(folder, edit, message):
    index = read_json(folder / INDEX_FILE)
    edit(index)
    write_json(folder / INDEX_FILE, index)
    inspect_checkpoint(folder)
    assert message in refusal(folder, check=True)


def edit_manifest(folder, edit):
    manifest = read_json(folder / MANIFEST_FILE)
    edit(manifest)
    write_json(folder / MANIFEST_FILE, manifest)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["tensors"].pop("model.norm.weight"), "model.norm.weight is not in"),
        (
            lambda m: m["tensors"].update(x=m["tensors"]["model.norm.weight"]),
            "x is in mcmoe_manifest.json alone",
        ),
        (lambda m: m["tensors"]["model.norm.weight"].update(dtype="F16"), "BF16 .* says F16"),
        (lambda m: m["shards"].pop(SHARDS[0]), f"{SHARDS[0]} is not in"),
        (lambda m: m["shards"].update(x=m["shards"][SHARDS[0]]), "x is in"),
        (lambda m: m["shards"][SHARDS[0]].update(bytes=5), "the manifest says 5"),
        (lambda m: m["shards"][SHARDS[0]].update(sha256="0" * 64), "has another SHA-256"),
        (lambda m: m.update(format_version=3), "format_version 3, .*up to 2: upgrade"),
        (lambda m: m.update(shards=[]), "is no manifest of version 2"),
    ],
)
def test_manifest_that_does_not_fit(folder, edit, message):
    edit_manifest(folder, edit)
    inspect_checkpoint(folder)
    with pytest.raises(UserError, match=message):
        inspect_checkpoint(folder, check=True)


def test_missing_manifest(folder):
    (folder / MANIFEST_FILE).unlink()
    inspect_checkpoint(folder)
    assert "mcmoe_manifest.json does not exist" in refusal(folder, check=True)


def set_value(name, column, value):
    def edit(tensors):
        tensors[name][0, column] = value

    return edit


def set_zero(expert, steps):
    """The field of the first zero, whatever the width allows."""
    name = f"{FIRST}.{expert}.gate_proj.weight_scale"
    word = 17 << 7 | steps << 12
    return set_value(name, 0, word - 65536 if word >= 32768 else word)


@pytest.mark.parametrize("value", [0.0, -0.25, float("nan"), float("inf")])
def test_scales_of_linears_are_finite_and_positive(folder, value):
    edit_shard(folder, 1, set_value("model.layers.1.self_attn.k_proj.scales", 1, value))
    message = refusal(folder, check=True)
    assert "model.layers.1.self_attn.k_proj.scales has 1 scales that are not finite" in message


def test_scales_of_linears_are_exact_in_bfloat16(folder):
    edit_shard(folder, 1, set_value("model.layers.1.self_attn.k_proj.scales", 1, 1 + 2**-8))
    assert "has 1 scales that bfloat16 cannot hold" in refusal(folder, check=True)


def test_scales_of_experts_are_exact_in_float16(folder):
    """2^-24 * (1 + 1 / 128) is a word, and lies between two numbers of float16."""
    name = f"{FIRST}.3.gate_proj.weight_scale"
    edit_shard(folder, 0, set_value(name, 0, 1))
    assert f"{name} has 1 scales that float16 cannot hold" in refusal(folder, check=True)


@pytest.mark.parametrize(
    ("expert", "steps", "allowed"),
    [
        (1, 0, "at 1 bit: 0.5"),
        (1, 2, "at 1 bit: 0.5"),
        (2, 7, "at 2 bits: multiples of 0.5 in 0..3"),
        (3, 8, "at 3 bits: integers 0..7"),
    ],
)
def test_zeros_are_in_range(folder, expert, steps, allowed):
    edit_shard(folder, 0, set_zero(expert, steps))
    message = refusal(folder, check=True)
    assert "has 1 zeros out of range" in message and allowed in message


@pytest.mark.parametrize(("expert", "most"), [(2, 6), (3, 7), (4, 15)])
def test_zeros_at_the_ends_of_the_range_pass(folder, expert, most):
    for steps in (0, most):
        edit_shard(folder, 0, set_zero(expert, steps))
        inspect_checkpoint(folder, check=True)


@pytest.mark.parametrize("value", [0.0, -0.25, float("nan"), float("inf")])
def test_scales_of_version_1_are_finite_and_positive(old, value):
    edit_shard(old, 0, set_value(f"{FIRST}.3.gate_proj.weight_scale", 2, value))
    message = refusal(old, check=True)
    assert f"{FIRST}.3.gate_proj.weight_scale has 1 scales that are not finite" in message
    assert "1 check failed" in message


def test_scales_of_version_1_are_exact_in_bfloat16(old):
    edit_shard(old, 0, set_value(f"{FIRST}.3.gate_proj.weight_scale", 0, 1 + 2**-8))
    assert "has 1 scales that bfloat16 cannot hold" in refusal(old, check=True)


@pytest.mark.parametrize(
    ("expert", "value", "allowed"),
    [
        (1, 0.0, "at 1 bit: 0.5"),
        (1, 1.0, "at 1 bit: 0.5"),
        (2, 0.25, "at 2 bits: multiples of 0.5 in 0..3"),
        (2, 3.5, "at 2 bits: multiples of 0.5 in 0..3"),
        (3, 0.5, "at 3 bits: integers 0..7"),
        (3, -1.0, "at 3 bits: integers 0..7"),
        (3, float("nan"), "at 3 bits: integers 0..7"),
        (4, 16.0, "at 4 bits: integers 0..15"),
    ],
)
def test_zeros_of_version_1_are_in_range(old, expert, value, allowed):
    edit_shard(old, 0, set_value(f"{FIRST}.{expert}.gate_proj.weight_scale", 1, value))
    message = refusal(old, check=True)
    assert "has 1 zeros out of range" in message and allowed in message


def test_zeros_of_version_1_at_the_ends_of_the_range_pass(old):
    for expert, most in ((2, 3), (3, 7), (4, 15)):
        name = f"{FIRST}.{expert}.gate_proj.weight_scale"
        edit_shard(old, 0, set_value(name, 1, 0.0))
        edit_shard(old, 0, set_value(name, 3, float(most)))
    inspect_checkpoint(old, check=True)


def test_damaged_files_are_refused_before_anything_else(folder):
    (folder / INDEX_FILE).write_text("{}")
    assert "has no weight_map" in refusal(folder)
