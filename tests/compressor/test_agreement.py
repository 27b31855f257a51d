"""What contradicts config.json is refused by whoever opens a model, before any weight is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.checkpoint.format import INDEX_FILE, QuantizationConfig
from mcmoe_vllm.compress.job import open_source
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.inspection import inspect_checkpoint
from mcmoe_vllm.model.agreement import open_layout, promised_tensors
from mcmoe_vllm.model.moe_model import open_model
from tests.helpers.checkpoints import make_checkpoint

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture
def folder(tiny_models, tmp_path):
    return Path(shutil.copytree(tiny_models("mixtral"), tmp_path / "model"))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        open_source(QuantizeOptions(str(folder), str(folder.parent / "out"), group_size=32))
    assert len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_what_transformers_saves_is_what_is_promised(tiny_models, model_type):
    checkpoint = open_checkpoint(tiny_models(model_type))
    promised = promised_tensors(open_layout(checkpoint, None), None)
    assert {n: p.shape for n, p in promised.items()} == {
        n: t.shape for n, t in checkpoint.tensors.items()
    }


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.1.block_sparse_moe.gate.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.0.self_attn.o_proj.weight",
        EXPERT,
    ],
)
@pytest.mark.parametrize("damage", ["missing", "another shape", "another dtype"])
def test_every_tensor_is_asked_for(folder, name, damage):
    edits = {
        "missing": lambda t: t.pop(name),
        "another shape": lambda t: t.update({name: t[name][:-1].clone()}),
        "another dtype": lambda t: t.update({name: t[name].to(torch.int8)}),
    }
    edit_tensors(folder, edits[damage])
    message = refusal(folder)
    assert f"{name} is {'missing' if damage == 'missing' else ''}" in message
    assert "in 1 place:" in message
    if damage == "another dtype":
        assert "BF16 or F16 or F32" in message


@pytest.mark.parametrize(
    "name",
    [EXPERT + "_scale_inv", EXPERT.replace("weight", "bias"), "model.layers.1.foo.bar", "visual.x"],
)
def test_what_the_model_has_no_place_for_is_named(folder, name):
    edit_tensors(folder, lambda t: t.update({name: torch.ones(1)}))
    assert f"{name} is not expected" in refusal(folder)


def test_tables_that_older_libraries_stored_are_no_contradiction(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda t: t.update({name: torch.ones(16)}))
    open_model(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 9000}, "model.embed_tokens.weight is BF16 [8192, 128], config says [9000"),
        ({"num_hidden_layers": 1}, "experts.0.w1.weight is not expected"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"num_local_experts": 3}, "experts.3.w1.weight is not expected: its expert has 0 bits"),
        ({"num_local_experts": 5}, "experts.4.w1.weight is missing"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648, there are"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', vLLM's MixtralForCausalLM computes silu"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, the model has 4 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0, the model has 4 experts"),
        ({"rms_norm_eps": 1}, "config.json cannot be used"),
        ({"hidden_size": "128"}, "config.json cannot be used"),
        ({"num_key_value_heads": []}, "config.json cannot be used"),
        ({"model_type": "olmoe"}, "which is not that of MixtralForCausalLM"),
        ({"model_type": None}, "config.json cannot be used"),
    ],
)
def test_settings_are_held_against_tensors_and_engines(folder, change, message):
    edit_config(folder, **change)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"swiglu_limit": 5.0}, "with limit 5, alpha 1.702 and 1 added to up, vLLM's GptOss"),
        ({"swiglu_limit": 1e9}, "no limit, alpha"),
        ({"swiglu_alpha": 2.0}, "alpha 2 and 1 added"),
    ],
)
def test_what_engines_hold_constant_is_constant(tiny_models, tmp_path, change, message):
    folder = Path(shutil.copytree(tiny_models("gpt_oss"), tmp_path / "model"))
    edit_config(folder, **change)
    assert message in refusal(folder)


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "down_proj_bias"])
@pytest.mark.parametrize("is_compressed", [False, True])
def test_biases_of_experts_are_asked_for(tiny_models, tmp_path, name, is_compressed):
    """By whoever reads the 16-bit model, and whoever reads the compressed one."""
    if is_compressed:
        folder = make_checkpoint(tmp_path / "model", "gpt_oss", dense_bits=16)
    else:
        folder = Path(shutil.copytree(tiny_models("gpt_oss"), tmp_path / "model"))
    (shard,) = folder.glob("*.safetensors")
    tensors, whole = load_file(shard), f"model.layers.1.mlp.experts.{name}"
    for damage in (None, tensors[whole][:, :-1].clone()):
        save_file({n: t for n, t in tensors.items() if n != whole or damage is not None}
                  | ({} if damage is None else {whole: damage}), shard)  # fmt: skip
        (folder / INDEX_FILE).unlink(missing_ok=True)
        with pytest.raises(UserError, match=f"in 1 place:\n  - {whole} is") as error:
            open_model(open_checkpoint(folder))
        assert ("missing" in str(error.value)) == (damage is None)


def test_an_older_version_has_no_words_for_biases(tmp_path):
    folder = make_checkpoint(tmp_path / "model", "gpt_oss", dense_bits=16)
    assert inspect_checkpoint(folder, check=True).config.format_version == 3
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, quantization_config={**config["quantization_config"], "format_version": 2})
    with pytest.raises(UserError, match="format_version is 2, which has no words for biases"):
        inspect_checkpoint(folder)


def test_a_null_quantization_config_means_16_bits(folder):
    edit_config(folder, quantization_config=None)
    assert open_model(open_checkpoint(folder)).quantization is None


def test_names_without_their_prefix_are_one_sentence(folder):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(folder, strip)
    assert "without the prefix that engines ask for" in refusal(folder)


@pytest.mark.parametrize("other", [False, True])
def test_a_tied_head_is_the_embedding(folder, other):
    edit_config(folder, tie_word_embeddings=True)

    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + other

    edit_tensors(folder, tie)
    if other:
        assert "set that to false" in refusal(folder)
    else:
        open_model(open_checkpoint(folder))


@pytest.mark.parametrize("reader", [inspect_checkpoint, lambda f: open_model(open_checkpoint(f))])
def test_a_compressed_checkpoint_is_asked_by_all_readers(compressed_example, tmp_path, reader):
    folder = Path(shutil.copytree(compressed_example, tmp_path / "model"))
    reader(folder)
    config = json.loads((folder / "config.json").read_text())
    first = config["quantization_config"]["expert_bits"]["1"]
    first[:] = [row[:3] + "0" + row[4:] for row in first]  # dropped, but its tensors are there
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"experts.3.w1.weight_packed is not expected"):
        reader(folder)


def test_an_int4_linear_promises_both_of_its_tensors(tiny_models):
    checkpoint = open_checkpoint(tiny_models("qwen2_moe"))
    quantization = QuantizationConfig(
        group_size={"w13": 32, "w2": 32, "dense": 64},
        expert_bits={0: ("012341", "012341"), 1: ("222222", "333333")},
        dense_bits=4,
        dense_modules=("self_attn", "shared_expert"),
    )
    promised = promised_tensors(open_layout(checkpoint, None), quantization)
    prefix = "model.layers.0.mlp.shared_expert.down_proj"  # [128, 256]
    assert promised[f"{prefix}.qweight"].shape == (32, 128)
    assert promised[f"{prefix}.scales"].shape == (4, 128)
    assert f"{prefix}.weight" not in promised
    assert promised["model.layers.0.self_attn.q_proj.bias"].dtypes == ("BF16", "F16", "F32")
    dropped = [n for n in promised if n.startswith("model.layers.0.mlp.experts.0.")]
    assert not dropped
    assert promised["model.layers.1.mlp.experts.0.down_proj.weight_packed"].shape == (128, 48)
