"""The layer-by-layer run equals transformers' own forward, for every supported architecture."""

import pytest
import torch

from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.architectures import ARCHITECTURES, REFUSED, find_architecture
from mcmoe_vllm.model.moe_model import choose_device, open_model
from mcmoe_vllm.model.runner import final_hidden


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_streamed_logits_equal_transformers(tiny_models, model_type):
    from transformers import AutoModelForCausalLM

    path = tiny_models(model_type)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 8192, (3, 40), generator=generator)
    loaded = open_model(open_checkpoint(path), "cpu")
    logits = torch.stack(list(loaded.logits(final_hidden(loaded, tokens))))
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(tokens).logits
    assert expected.std() > 0.01
    # Same weights, same operations, float32: sums in another order are all that differs.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_layers_leave_no_memory_behind(tiny_models):
    loaded = open_model(open_checkpoint(tiny_models("mixtral")), "cpu")
    tokens = torch.zeros(1, 8, dtype=torch.long)
    final_hidden(loaded, tokens)
    layers = loaded.skeleton.body.layers
    assert all(parameter.is_meta for parameter in layers.parameters())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_unfinished_architectures_are_refused_with_the_reason(name):
    with pytest.raises(UserError, match="not supported yet") as error:
        find_architecture({"architectures": [name]})
    assert REFUSED[name] in str(error.value)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM is not a Mixture-of-Experts"),
        ({"architectures": ["NewMoe"], "num_experts": 0}, "NewMoe is not a Mixture-of-Experts"),
        ({}, "names no architecture"),
    ],
)
def test_other_models_are_refused(config, message):
    with pytest.raises(UserError, match=message) as error:
        find_architecture(config)
    assert all(name in str(error.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    "name",
    ["mps", "xpu", "meta", "privateuseone", "hpu:0", "cpu:1x", "cuda:-1", "", "cuda:" + "9" * 500],
)
def test_devices_that_cannot_compute_are_refused(name):
    with pytest.raises(UserError, match="allowed are auto, cpu, cuda, cuda:N") as e:
        choose_device(name)
    assert len(str(e.value)) < 200


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    assert choose_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto").type == "cuda" and choose_device("cuda:1").index == 1
    with pytest.raises(UserError, match="'cuda:2', this machine's are cuda:0 to cuda:1"):
        choose_device("cuda:2")
