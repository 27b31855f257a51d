"""The life after loading: weights are loaded again, saved and adapted, or that is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcmoe_vllm.checkpoint.manifest import write_manifest
from tests.helpers.logprobs import TINY, assert_equal_numbers, difference

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

RANK = 4


def alone(case: str) -> dict[str, dict[str, str]]:
    """A process for each case: vLLM keeps the layers of a model that was loaded anew."""
    return {"environment": {"MCMOE_TEST": case}}


@pytest.fixture(scope="module")
def served(compressed):
    return compressed("mixtral", group_size=32, **TINY)


@pytest.fixture(scope="module")
def other(served, tmp_path_factory):
    """The same widths with other codes, scales, norms, routers and embedding."""
    folder = tmp_path_factory.mktemp("other") / served.name
    shutil.copytree(served, folder)
    generator = torch.Generator().manual_seed(0)
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        tensors = load_file(shard)
        for name, value in tensors.items():
            if name.endswith(("weight_packed", "qweight")):
                kind = torch.iinfo(value.dtype)
                value.random_(kind.min, kind.max, generator=generator)
            elif value.is_floating_point():
                value.mul_(2.0 if name.endswith("scales") else 1.25)
        save_file(tensors, shard, metadata={"format": "pt"})
    write_manifest(folder, [shard.name for shard in shards])
    return folder


@pytest.fixture(scope="module")
def other_widths(compressed):
    return compressed("mixtral", group_size=32, **{**TINY, "bits": 3})


@pytest.mark.nightly
@pytest.mark.parametrize(("load_format", "cache_gib"), [("auto", 2), ("mcmoe", 0)])
def test_weights_are_loaded_again_and_nothing_is_saved(
    served, other, other_widths, dequantized, prompts, transformers_logprobs, run_engine, tmp_path,
    load_format, cache_gib,
):  # fmt: skip
    saving = {"path": str(tmp_path), "pattern": None, "max_size": None}
    result = run_engine(
        served,
        prompts[:2],
        calls=[
            ("save_sharded_state", saving),
            ("reload_weights", {"weights_path": str(other_widths)}),
            ("reload_weights", {"weights_path": str(other)}),
            ("reload_weights", {"weights_path": str(served)}),
        ],
        **alone(f"reload {load_format}"),
        load_format=load_format,
        additional_config={"cpu_weight_cache_gib": cache_gib},
    )
    saved, refused, reloaded, back = result["calls"]
    assert "save_sharded_state" in saved["refusal"] and not list(tmp_path.iterdir())
    assert "expert_bits differ in quantization_config" in refused["refusal"]
    assert saved["logprobs"] == refused["logprobs"] == result["logprobs"]
    assert reloaded["refusal"] is None and back["refusal"] is None
    expected = transformers_logprobs(dequantized(other), prompts[:2])
    assert_equal_numbers(reloaded["logprobs"], expected)
    assert difference(result["logprobs"], expected).mean() > 0.1
    assert_equal_numbers(back["logprobs"], torch.tensor(result["logprobs"]))


@pytest.mark.nightly
def test_an_adapter_for_attention_alone(
    served, dequantized, prompts, transformers_logprobs, run_engine, tmp_path
):
    config = json.loads((served / "config.json").read_text())
    hidden = config["hidden_size"]
    head = hidden // config["num_attention_heads"]
    rows = {"q_proj": hidden, "v_proj": head * config["num_key_value_heads"], "o_proj": hidden}
    generator, adapter = torch.Generator().manual_seed(0), {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in rows.items():
            prefix = f"model.layers.{layer}.self_attn.{name}"
            adapter[f"{prefix}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) / 16
            adapter[f"{prefix}.lora_B.weight"] = torch.randn(size, RANK, generator=generator) / 16
    save_file(
        {f"base_model.model.{name}": value for name, value in adapter.items()},
        tmp_path / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(rows)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    merged = tmp_path / "merged"
    shutil.copytree(dequantized(served), merged)
    (shard,) = merged.glob("*.safetensors")
    tensors = load_file(shard)
    for name in [name for name in adapter if name.endswith("lora_A.weight")]:
        prefix = name.removesuffix(".lora_A.weight")
        tensors[f"{prefix}.weight"] += adapter[f"{prefix}.lora_B.weight"] @ adapter[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    result = run_engine(
        served,
        prompts[:2],
        **alone("adapter"),
        lora=tmp_path,
        enable_lora=True,
        max_lora_rank=8,
        lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )
    assert_equal_numbers(result["logprobs"], transformers_logprobs(merged, prompts[:2]))
    plain = transformers_logprobs(dequantized(served), prompts[:2])
    assert difference(result["logprobs"], plain).mean() > 0.01
