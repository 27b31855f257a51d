"""Which method a layer gets, and what a user reads who asks for the impossible."""

import pickle
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.errors import UserError

pytestmark = pytest.mark.vllm


def make(dense_bits=4, layers=2):
    from mcmoe_vllm.plugin.config import McmoeConfig

    config = QuantizationConfig(
        group_size={"w13": 64, "w2": 64, "dense": 128},
        expert_bits=dict.fromkeys(range(layers), ("2340", "3210")),
        dense_bits=dense_bits,
        dense_modules=("self_attn", "shared_expert") if dense_bits == 4 else (),
    )
    return McmoeConfig.from_config(config.to_dict())


def linear():
    from vllm.model_executor.layers.linear import ReplicatedLinear

    layer = ReplicatedLinear.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(layer)
    return layer


def test_a_plain_checkpoint_names_the_remedy():
    from mcmoe_vllm.plugin.config import McmoeConfig

    with pytest.raises(UserError, match="Compress it first with `mcmoe quantize"):
        McmoeConfig()


def test_it_travels_to_the_workers():
    config = pickle.loads(pickle.dumps(make()))
    assert config.get_name() == "mcmoe" and config.config == make().config


def test_the_launch_stays_in_its_process(vllm_config):
    config = make()
    config.maybe_update_config("a-model", SimpleNamespace(num_hidden_layers=2))
    config.get_quant_method(linear(), "model.layers.0.self_attn.qkv_proj")
    launch = config.launch
    launch.budget.take(1)
    travelled = pickle.loads(pickle.dumps(config))
    assert travelled.config == config.config and travelled.num_layers == 2
    assert travelled._launch is None and config.launch is launch
    assert travelled.launch.budget.bytes == launch.budget.bytes + 1


def test_layers_are_counted_by_name(vllm_config, moe_config):
    """vLLM may ask twice for a layer's method."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from mcmoe_vllm.plugin.experts import McmoeExpertsMethod

    config = make()
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.moe_config = moe_config(4)
    for index in (0, 0, 1):
        method = config.get_quant_method(layer, f"model.layers.{index}.mlp.experts")
        assert type(method) is McmoeExpertsMethod and method.layer_index == index
        assert method.launch is config.launch
    assert config.launch._expected == {f"model.layers.{i}.mlp.experts" for i in (0, 1)}


def test_amd_gpus_are_refused(monkeypatch):
    from mcmoe_vllm.plugin import config

    monkeypatch.setattr(config.current_platform, "is_rocm", lambda: True, raising=False)
    with pytest.raises(UserError, match="does not serve on AMD GPUs.*vLLM's build for CPUs"):
        make()


def test_activation_types_and_contract():
    config = make()
    assert set(config.get_supported_act_dtypes()) == {
        torch.bfloat16,
        torch.float16,
        torch.float32,
    }
    assert config.override_quantization_method({}, None, hf_config=None) is None
    assert config.get_config_filenames() == [] and config.get_min_capability() == 75


@pytest.mark.parametrize(
    ("prefix", "layer"),
    [
        ("model.layers.1.mlp.experts", 1),
        ("language_model.model.layers.0.mlp.experts", 0),  # Qwen3.5, Kimi-K2.5
        ("thinker.language_model.model.layers.0.mlp.experts", 0),  # Qwen3-Omni
        ("model.language_model.layers.1.mlp.experts", 1),  # the Transformers backend's wrappers
        ("model.layers.1.mixer.experts", 1),  # Nemotron-H
        ("backbone.layers.1.mixer.experts", 1),  # the same as its files have it
        ("layers.0.ffn.experts", 0),  # DeepSeek-V4's files
        ("model.layers.1.experts", 1),  # Gemma 4
        ("model.layers.2.mtp_block.mlp.experts", None),  # behind the last: DeepSeek-V3's draft
        ("mtp.layers.0.mlp.experts", None),  # Qwen3-Next's, MiMo's and Nemotron-H's drafts
        ("model.mtp.layers.0.mlp.experts", None),
        ("model.mtp_layers.0.mlp.experts", None),
        ("visual.blocks.0.attn.qkv", None),
        ("vision_tower.vision_model.encoder.layers.1.self_attn.qkv_proj", None),
        ("vision_tower.transformer.layers.1.attention.qkv_proj", None),  # Pixtral
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", None),  # Gemma 4
        ("audio_tower.layers.1.self_attn.qkv_proj", None),  # Qwen3-Omni
        ("thinker.audio_tower.layers.0.self_attn.qkv_proj", None),
        ("multi_modal_projector.layers.0.linear", None),
        ("lm_head", None),
    ],
)
def test_which_layers_are_decoder_layers(prefix, layer):
    config = make()
    config.maybe_update_config("a-model", SimpleNamespace(num_hidden_layers=2))
    assert config._layer_index(prefix) == layer


def test_modules_are_known_by_the_names_of_vllm():
    """What vLLM calls otherwise than the files: GPT-OSS's attention, a wrapper's language model."""
    from vllm.model_executor.models.utils import WeightsMapper

    config = make()
    config.apply_vllm_mapper(
        WeightsMapper(
            orig_to_new_prefix={"model.": "language_model.model."},
            orig_to_new_substr={".self_attn.": ".attn.", ".mlp.router.": None},
        )
    )
    parents = {"self_attn", "attn", "shared_expert"}
    assert pickle.loads(pickle.dumps(config)).dense_parents == parents
    assert config.is_dense_int4("language_model.model.layers.0.attn.qkv_proj")
    assert not config.is_dense_int4("language_model.model.layers.0.mlp.gate")
    assert not make(16).dense_parents


@pytest.mark.parametrize(
    ("prefix", "int4"),
    [
        ("model.layers.0.self_attn.qkv_proj", True),
        ("model.layers.1.mlp.shared_expert.down_proj", True),
        ("model.layers.0.mlp.shared_expert_gate", False),
        ("model.layers.0.mlp.gate", False),
        ("lm_head", False),
        ("self_attn.qkv_proj", False),  # no layer that we know
        ("model.layers.2.self_attn.qkv_proj", False),  # a draft model's layer
        ("mtp.layers.0.self_attn.qkv_proj", False),
        ("vision_tower.encoder.layers.0.self_attn.qkv_proj", False),
        ("language_model.model.layers.0.self_attn.qkv_proj", True),
    ],
)
def test_which_linears_are_int4(vllm_config, prefix, int4):
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from mcmoe_vllm.plugin.linear import McmoeLinearMethod

    config = make()
    config.maybe_update_config("a-model", SimpleNamespace(num_hidden_layers=2))
    layer = linear()
    method = config.get_quant_method(layer, prefix)
    assert type(method) is (McmoeLinearMethod if int4 else UnquantizedLinearMethod)
    if int4:
        assert method.quant_config.group_size == 128
    assert type(make(16).get_quant_method(layer, prefix)) is UnquantizedLinearMethod


def test_other_layers_are_left_alone():
    assert make().get_quant_method(torch.nn.Module(), "model.layers.0.self_attn.attn") is None


def test_registering_is_idempotent():
    from vllm.model_executor.layers.quantization import get_quantization_config

    from mcmoe_vllm.plugin import register
    from mcmoe_vllm.plugin.config import McmoeConfig

    register()
    register()
    assert get_quantization_config("mcmoe") is McmoeConfig
