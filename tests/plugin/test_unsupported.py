"""Flags and calls that an mcmoe model is not served with: all of them in one sentence."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin.unsupported import LOAD_FORMATS, refuse_experts, refuse_flags, refuse_saving

pytestmark = pytest.mark.vllm


def config(**settings):
    """A launch that all is well with, but for `settings`."""
    from vllm.config import VllmConfig

    made = VllmConfig()
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def lora(*targets):
    from vllm.config import LoRAConfig

    return {"lora_config": LoRAConfig(target_modules=list(targets) or None)}


def offload(**settings):
    from vllm.config import OffloadConfig

    made = OffloadConfig()
    for name, value in settings.items():
        part = made.uva if name == "cpu_offload_gb" else made.prefetch
        setattr(part, name, value)
    return {"offload_config": made}


def load_format(name):
    from vllm.config.load import LoadConfig

    return {"load_config": LoadConfig(load_format=name)}


@pytest.mark.parametrize(
    ("architecture", "latent", "ops", "refused"),
    [
        ("DeepseekV3ForCausalLM", True, ["all"], True),
        ("Lfm2MoeForCausalLM", False, ["all"], True),
        ("Lfm2MoeForCausalLM", False, ["none"], False),  # compiled: in plain torch
        ("Lfm2MoeForCausalLM", False, ["all", "-rotary_embedding"], False),
        ("MixtralForCausalLM", False, ["all"], False),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's kernel for CPUs")
def test_a_kernel_that_misreads_queries_is_refused(architecture, latent, ops, refused):
    from mcmoe_vllm.plugin.unsupported import _rotates_every_head

    made = config(model_config=SimpleNamespace(use_mla=latent, architectures=[architecture]))
    made.compilation_config.custom_ops = ops
    if not refused or _rotates_every_head():
        refuse_flags(made)
        return
    with pytest.raises(UserError, match='"-rotary_embedding"'):
        refuse_flags(made)


@pytest.mark.parametrize(
    ("layer", "moe", "what"),
    [
        ({"apply_router_weight_on_input": True}, {}, "apply_router_weight_on_input"),  # Llama 4
        ({}, {"activation_situ_beta": 2.0}, "activation_situ_beta"),  # Kimi-K3
        ({}, {"is_act_and_mul": False}, "without a gate"),  # Nemotron-H
        ({"e_score_correction_bias": torch.zeros(9)}, {}, "zero experts"),  # LongCat
        ({"e_score_correction_bias": torch.zeros(8), "swiglu_limit": 10.0}, {}, None),
    ],
)
def test_what_experts_are_asked_for(fake_layer, moe_config, layer, moe, what):
    asked = fake_layer(8)
    for name, value in layer.items():
        setattr(asked, name, value)
    if what is None:
        refuse_experts(asked, moe_config(8, **moe), "model.layers.0.mlp.experts")
        return
    with pytest.raises(UserError, match=f"model.layers.0.mlp.experts: .*{what}.*without compress"):
        refuse_experts(asked, moe_config(8, **moe), "model.layers.0.mlp.experts")


@pytest.mark.parametrize(
    "settings",
    [
        lambda: {},
        lambda: lora("q_proj", "k_proj", "v_proj", "o_proj"),
        lambda: lora("model.layers.0.self_attn.o_proj", "qkv_proj", "shared_expert_gate"),
        *(lambda name=name: load_format(name) for name in LOAD_FORMATS),
    ],
)
def test_what_is_served(settings):
    refuse_flags(config(**settings()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (lora, "--enable-lora for experts.*--lora-target-modules q_proj"),
        (lambda: lora("o_proj", "experts"), "--enable-lora for experts"),
        (lambda: lora("model.layers.0.mlp.experts"), "--enable-lora for experts"),
        (lambda: offload(cpu_offload_gb=1.5), "--cpu-offload-gb 1.5, "),
        (lambda: offload(offload_group_size=8), "--offload-group-size 8, "),
        (lambda: load_format("sharded_state"), "--load-format sharded_state, .*use auto, hf"),
        (lambda: load_format("runai_streamer"), "--load-format runai_streamer"),
        (lambda: {"weight_transfer_config": object()}, "--weight-transfer-config"),
    ],
)
def test_what_is_refused(settings, said):
    with pytest.raises(UserError, match=said) as error:
        refuse_flags(config(**settings()))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_every_flag_is_named_at_once():
    with pytest.raises(UserError, match="--load-format pt.*; nor with --cpu-offload-gb 1, "):
        refuse_flags(config(**load_format("pt"), **offload(cpu_offload_gb=1)))


def test_an_mcmoe_model_is_not_serialized():
    saved = []

    class Loader:
        @staticmethod
        def save_model(model, tensorizer_config, model_config):
            saved.append((model, tensorizer_config, model_config))

    refuse_saving(Loader, "save_tensorized_model")
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    Loader.save_model(model, 1, model_config=2)
    assert saved == [(model, 1, 2)]
    model[0].quant_method = SimpleNamespace(counted=("weight",))
    with pytest.raises(UserError, match="save_tensorized_model cannot save an mcmoe model"):
        Loader.save_model(model, 1, 2)
    assert len(saved) == 1
