"""--load-format mcmoe: nothing unverified gets through, and every offender is named."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm")

from vllm.config import get_current_vllm_config

from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.checkpoint.format import INDEX_FILE as INDEX
from mcmoe_vllm.checkpoint.format import MANIFEST_FILE as MANIFEST
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.checkpoint.manifest import tensor_sha256 as sha256
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin import register
from mcmoe_vllm.plugin.experts import McmoeExpertsMethod
from mcmoe_vllm.plugin.launch import Launch
from mcmoe_vllm.plugin.loader import (
    McmoeModelLoader,
    ReadCount,
    read_hashes,
    read_verified,
    remote_experts,
)

pytestmark = pytest.mark.vllm

TENSORS = {
    "a.safetensors": {
        "model.norm.weight": torch.arange(6).bfloat16().view(2, 3),
        "model.layers.0.mlp.experts.0.w1.weight_packed": torch.arange(8, dtype=torch.uint8),
    },
    "b.safetensors": {
        "model.layers.0.mlp.experts.1.w1.weight_packed": torch.ones(4, dtype=torch.uint8),
        "model.layers.0.mlp.experts.1.w1.weight_scale": torch.ones(2, 2, dtype=torch.float16),
        "model.layers.0.self_attn.q_proj.qweight": torch.ones(2, 2, dtype=torch.int32),
    },
}
ALL = {name: tensor for shard in TENSORS.values() for name, tensor in shard.items()}


def write(folder, tensors=TENSORS, listed=ALL):
    for file, shard in tensors.items():
        save_file(shard, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, shard in tensors.items() for name in shard}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    hashes = {name: sha256(tensor) for name, tensor in listed.items()}
    (folder / "config.json").write_text("{}")
    (folder / MANIFEST).write_text(
        json.dumps({"format_version": 1, "shards": {}, "tensors": hashes})
    )
    return folder


def read(folder, is_remote=lambda name: False):
    return dict(reader(folder, is_remote, count := ReadCount())), count


def reader(folder, is_remote=lambda name: False, count=None):
    checkpoint = open_checkpoint(folder)
    return read_verified(checkpoint, read_hashes(checkpoint), is_remote, count or ReadCount())


GOLDEN = Path(__file__).parents[1] / "golden" / "format_v2"


class OneLayer(torch.nn.Module):
    """The golden checkpoint's model: plain parameters beside experts that the plugin loads."""

    def __init__(self, moe_config, layer):
        super().__init__()
        checkpoint = open_checkpoint(GOLDEN)
        config = QuantizationConfig.from_dict(checkpoint.config["quantization_config"])
        launch = Launch(config, get_current_vllm_config())
        self.experts = layer
        self.experts.quant_method = McmoeExpertsMethod(config, launch, moe_config(5), "experts", 0)
        self.experts.quant_method.create_weights(layer, 5, 64, 32, torch.bfloat16)
        for name, tensor in checkpoint.read(
            [name for name in checkpoint.names() if "experts" not in name]
        ).items():
            value = torch.nn.Parameter(torch.zeros_like(tensor), requires_grad=False)
            self.register_parameter(name.replace(".", "_"), value)

    def load_weights(self, weights):
        for name, tensor in weights:
            if "experts" not in name:
                getattr(self, name.replace(".", "_")).data.copy_(tensor)
                continue
            expert, shard, kind = name.split("experts.")[1].split(".")
            param = getattr(self.experts, f"{'w2' if shard == 'w2' else 'w13'}_{kind}")
            param.weight_loader(param, tensor, name, shard_id=shard, expert_id=int(expert))


def test_vllms_loader_and_ours_leave_the_same_bytes(vllm_config, moe_config, fake_layer):
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    register()
    model_config = SimpleNamespace(
        model=str(GOLDEN), revision=None, quantization="mcmoe", is_moe=True, multimodal_config=None
    )
    found = []
    for load_format in ("auto", "mcmoe"):
        model = OneLayer(moe_config, fake_layer(5))
        assert not any(value.any() for value in model.parameters())
        loader = get_model_loader(LoadConfig(load_format=load_format))
        loader.load_weights(model, model_config)
        model.experts.quant_method._refuse_gaps()
        found.append({name: value.data for name, value in model.named_parameters()})
    vllms, ours = found
    assert type(loader) is McmoeModelLoader and len(ours) > 10
    assert vllms.keys() == ours.keys()
    for name, value in vllms.items():
        assert torch.equal(value.view(torch.uint8), ours[name].view(torch.uint8)) and value.any()


def test_everything_is_read(tmp_path):
    tensors, count = read(write(tmp_path))
    assert tensors.keys() == ALL.keys()
    assert all(torch.equal(tensors[n], t) and tensors[n].dtype == t.dtype for n, t in ALL.items())
    assert (count.tensors, count.skipped) == (5, 0)
    assert count.bytes == sum(t.nbytes for t in ALL.values())


def test_a_single_shard_needs_no_index(tmp_path):
    write(tmp_path, {"model.safetensors": ALL})
    (tmp_path / INDEX).unlink()
    assert read(tmp_path)[0].keys() == ALL.keys()


def test_another_ranks_experts_stay_on_the_disk(tmp_path):
    model, experts = torch.nn.Module(), torch.nn.Module()
    experts.quant_method = SimpleNamespace(local={0: 0, 2: 1}, layer_index=0)
    model.experts = experts
    tensors, count = read(write(tmp_path), remote_experts(model))
    assert not any("experts.1." in name for name in tensors) and len(tensors) == 3
    assert count.skipped == 2
    assert not remote_experts(model)("model.layers.1.mlp.experts.1.w1.weight_packed")


def test_a_missing_manifest(tmp_path):
    (write(tmp_path) / MANIFEST).unlink()
    with pytest.raises(UserError, match=f"has no {MANIFEST}.*Drop --load-format"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [({"format_version": 2, "tensors": {}}, "upgrade"), ([], "no manifest"), ({}, "no manifest")],
)
def test_a_manifest_of_another_kind(tmp_path, manifest, said):
    (write(tmp_path) / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=said):
        read(tmp_path)


def test_changed_bytes_are_named_after_everything_was_checked(tmp_path):
    changed = {f: {n: t.clone() for n, t in shard.items()} for f, shard in TENSORS.items()}
    changed["a.safetensors"]["model.norm.weight"][0, 0] = 9
    changed["b.safetensors"]["model.layers.0.self_attn.q_proj.qweight"][0, 0] = 9
    write(tmp_path, changed)
    got = []
    with pytest.raises(UserError) as error:
        for name, _ in reader(tmp_path):
            got.append(name)
    assert f"2 tensor(s) are not what {MANIFEST} says" in str(error.value) and len(got) == 3
    assert "model.norm.weight in a.safetensors" in str(error.value)
    assert " more" not in str(error.value)
    assert "q_proj.qweight in b.safetensors" in str(error.value)


@pytest.mark.parametrize(("wrong", "rest"), [(8, None), (9, "and 1 more")])
def test_eight_offenders_are_named(tmp_path, wrong, rest):
    gone = {f"model.gone.{i}.weight": torch.zeros(1) for i in range(wrong)}
    with pytest.raises(UserError) as error:
        read(write(tmp_path, listed={**ALL, **gone}))
    assert str(error.value).count("model.gone.") == 8
    assert (" more" in str(error.value)) == (rest is not None) and (rest or "") in str(error.value)


def test_extra_and_missing_tensors(tmp_path):
    listed = {**ALL, "model.gone.weight": torch.zeros(1)}
    del listed["model.norm.weight"]
    with pytest.raises(UserError) as error:
        read(write(tmp_path, listed=listed))
    assert "model.gone.weight: in the manifest, in no shard" in str(error.value)
    assert "model.norm.weight: in a shard, not in the manifest" in str(error.value)


def test_an_index_that_names_another_shard(tmp_path):
    index = json.loads((write(tmp_path) / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "b.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="model.norm.weight .promised in b.safetensors"):
        read(tmp_path)


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", ".."])
def test_files_outside_the_folder_are_never_read(tmp_path, file):
    index = json.loads((write(tmp_path) / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="files outside its folder"):
        read(tmp_path)


def test_a_shard_that_is_missing_or_cut_short(tmp_path):
    shard = write(tmp_path) / "b.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(UserError, match="b.safetensors is truncated or corrupted"):
        read(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="lacks 1 shard: b.safetensors"):
        read(tmp_path)
