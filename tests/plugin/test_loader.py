"""What is served was whole: no loader reads a folder that is not, or leaves a part of the model
unfilled, and `--load-format mcmoe` lets nothing unverified through."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from mcmoe_vllm.checkpoint.format import INDEX_FILE, MANIFEST_FILE
from mcmoe_vllm.checkpoint.manifest import write_manifest
from mcmoe_vllm.checkpoint.writing import write_index, write_shard
from mcmoe_vllm.disk import read_json, write_json
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin import loader as plugin_loader
from mcmoe_vllm.plugin import register
from mcmoe_vllm.plugin.completeness import open_whole
from mcmoe_vllm.plugin.loader import (
    CheckedModelLoader,
    McmoeModelLoader,
    ReadCount,
    agree_on_names,
    read_verified,
    remote_experts,
)
from tests.helpers.checkpoints import SHARD, make_checkpoint

pytestmark = pytest.mark.vllm

EXPERTS = "model.layers.0.block_sparse_moe.experts"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("source") / "mixtral", "mixtral")


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")


def edit_tensors(folder, edit, agree=True):
    """Change the tensors; with `agree`, index and manifest say the same."""
    from safetensors.torch import load_file

    tensors = load_file(folder / SHARD)
    edit(tensors)
    write_shard(folder / SHARD, tensors)
    write_index(folder, [SHARD])
    if agree:
        write_manifest(folder, [SHARD])


def edit_config(folder, **changes):
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **changes})


@pytest.fixture(scope="module")
def built(source):
    """The model that vLLM builds for the folder, and its configs; nothing is loaded."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    register()
    arguments = EngineArgs(str(source), enforce_eager=True, skip_tokenizer_init=True)
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{source.parent / 'store'}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = initialize_model(config)
        yield model, config
        destroy_model_parallel()
        destroy_distributed_environment()


@pytest.fixture
def load(built):
    """load(folder, load_format): load the folder into the model, as far as to the kernels."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    model, config = built

    def get(folder, load_format="auto"):
        model_config = copy.copy(config.model_config)
        model_config.model = str(folder)
        methods = [m.quant_method for m in model.modules() if hasattr(m, "quant_method")]
        counting = [m for m in methods if hasattr(m, "counted")]
        for method in counting:
            method.filled.clear() if isinstance(method.filled, set) else [
                filled.clear() for filled in method.filled.values()
            ]
        for parameter in model.parameters():
            parameter.data.zero_()
        loader = get_model_loader(LoadConfig(load_format=load_format))
        loader.load_weights(model, model_config)
        for method in counting:
            method._refuse_gaps()
        return {name: parameter.data.clone() for name, parameter in model.named_parameters()}

    return get


both = pytest.mark.parametrize("load_format", ["auto", "mcmoe"])


def test_vllms_loader_and_ours_leave_the_same_bytes(load, source):
    vllms, ours = load(source), load(source, "mcmoe")
    assert vllms.keys() == ours.keys() and len(ours) > 20
    for name, value in vllms.items():
        assert torch.equal(value.view(torch.uint8), ours[name].view(torch.uint8))
        if not name.endswith(("qzeros", "g_idx")):
            assert value.any(), name


@both
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(NORM), f"{NORM} is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.scales"), "k_proj.scales is missing"),
        (lambda t: t.update(more=torch.zeros(1)), "more is not expected"),
        (lambda t: t.update({NORM: t[NORM].double()}), f"{NORM} is F64"),
        (lambda t: t.update({NORM: t[NORM][:-1]}), f"{NORM} is BF16 [127]"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(load, folder, load_format, edit, said):
    """Whatever the manifest says."""
    edit_tensors(folder, edit)
    with pytest.raises(UserError) as error:
        load(folder, load_format)
    assert said in str(error.value) and len(str(error.value)) < 1000


@both
def test_what_the_manifest_does_not_say_is_refused(load, folder, load_format):
    """Another dtype of as many bytes, which config.json allows."""
    edit_config(folder, dtype="float16")
    edit_tensors(folder, lambda t: t.update({NORM: t[NORM].view(torch.float16)}), agree=False)
    with pytest.raises(UserError, match=f"{NORM} is F16 .128., {MANIFEST_FILE} says BF16"):
        load(folder, load_format)


@both
def test_a_folder_of_other_widths_is_refused(load, tmp_path, load_format):
    """As reload_weights may be given; the model's layers are made for others."""
    other = make_checkpoint(tmp_path / "other", "mixtral", widths="3220")
    with pytest.raises(UserError, match="expert_bits differ in quantization_config"):
        load(other, load_format)


def test_a_layer_too_many_is_refused(load, folder):
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(UserError, match="layer 2 has routed experts but no widths"):
        load(folder)


def test_whatever_vllm_leaves_out_is_missed(load, source, monkeypatch, built):
    """A tensor of every kind in turn, which the folder holds and no loader hands over."""
    get_all_weights = plugin_loader.DefaultModelLoader.get_all_weights
    left_out, whole = [], open_whole(source, built[0])

    def some(self, *args):
        weights = get_all_weights(self, *args)
        return ((name, tensor) for name, tensor in weights if name not in left_out)

    monkeypatch.setattr(plugin_loader.DefaultModelLoader, "get_all_weights", some)
    monkeypatch.setattr(plugin_loader, "open_whole", lambda *args: whole)
    load(source)
    names = {re.sub(r"\.[0-9]+\.", ".", name): name for name in whole.checkpoint.tensors}
    silent = []
    for name in names.values():
        left_out[:] = [name]
        try:
            load(source)
            silent.append(name)
        except UserError as e:
            assert name.split(".")[-2] in str(e) or "qkv_proj" in str(e)
    assert len(names) >= 18 and not silent


def test_what_the_model_wants_beyond_the_folder_is_missed(load, source, built):
    """As a head for classification does, or --hf-overrides."""
    model, _ = built
    model.score = torch.nn.Linear(4, 3, bias=False)
    try:
        with pytest.raises(UserError, match="does not fill 1 parameter: score.weight of Mixtral"):
            load(source)
    finally:
        del model.score


@pytest.mark.parametrize("name", [NORM, "model.layers.1.block_sparse_moe.gate.weight"])
def test_weights_that_are_not_finite_are_refused(load, folder, name):
    edit_tensors(folder, lambda t: t[name].view(-1)[3:4].fill_(torch.inf))
    with pytest.raises(UserError, match=f"NaN or infinite weights in 1 parameter: {name}"):
        load(folder)


def test_a_model_that_does_not_say_what_it_loads_is_announced(load, source, built, monkeypatch):
    from mcmoe_vllm.plugin import completeness

    said = []
    monkeypatch.setattr(completeness.logger, "warning", lambda text, *args: said.append(text))
    load_weights = type(built[0]).load_weights
    monkeypatch.setattr(
        type(built[0]), "load_weights", lambda self, weights: load_weights(self, weights) and None
    )
    load(source)
    assert len(said) == 1 and "does not say what it loads" in said[0]


def test_a_vllm_that_tells_nothing_is_refused(load, source, monkeypatch):
    monkeypatch.setattr(
        plugin_loader.DefaultModelLoader, "load_weights",
        lambda self, model, config: model.load_weights(self.get_all_weights(config, model)),
    )  # fmt: skip
    with pytest.raises(UserError, match="does not tell what it loads"):
        load(source)


def test_another_model_is_loaded_as_ever(monkeypatch):
    """Nothing is looked at, and vLLM's own check stays as it is."""
    from vllm.config.load import LoadConfig

    calls = []
    monkeypatch.setattr(
        plugin_loader.DefaultModelLoader, "get_all_weights", lambda *args: calls.append("weights")
    )
    monkeypatch.setattr(
        plugin_loader.DefaultModelLoader, "track_weights_loading",
        lambda *args, **kwargs: calls.append(kwargs),
    )  # fmt: skip
    loader = CheckedModelLoader(LoadConfig())
    loader.get_all_weights(SimpleNamespace(quantization=None), None)
    loader.track_weights_loading(None, set(), quantized=False)
    assert calls == ["weights", {"quantized": False}] and loader.enable_weights_track is None


def test_a_consolidated_copy_beside_the_shards_is_not_read(load, folder):
    """By which vLLM recognises Mistral's own format."""
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert load(folder)[NORM].any()


def test_every_loader_of_the_folders_own_tensors_checks():
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, DefaultModelLoader

    from mcmoe_vllm.plugin.unsupported import LOAD_FORMATS

    register()
    loaders = {name: _LOAD_FORMAT_TO_MODEL_LOADER.get(name) for name in LOAD_FORMATS}
    assert loaders.pop("mcmoe") is McmoeModelLoader and loaders.pop("dummy") is not None
    assert set(loaders.values()) == {CheckedModelLoader}
    assert DefaultModelLoader not in _LOAD_FORMAT_TO_MODEL_LOADER.values()


# --load-format mcmoe


def read(folder, is_remote=lambda name: False):
    count = ReadCount()
    return dict(read_verified(open_whole(folder, torch.nn.Module()), is_remote, count)), count


def test_everything_is_read(source):
    from safetensors.torch import load_file

    tensors, count = read(source)
    expected = load_file(source / SHARD)
    assert tensors.keys() == expected.keys() and count.finished
    assert all(
        torch.equal(tensors[n], t) and tensors[n].dtype == t.dtype for n, t in expected.items()
    )
    assert (count.tensors, count.skipped) == (len(expected), 0)
    assert count.bytes == sum(t.nbytes for t in expected.values())


def test_another_ranks_experts_stay_on_the_disk(source):
    model, experts = torch.nn.Module(), torch.nn.Module()
    experts.quant_method = SimpleNamespace(local={0: 0, 2: 1}, layer_index=0)
    model.experts = experts
    is_remote = remote_experts(open_whole(source, torch.nn.Module()).layout, model)
    tensors, count = read(source, is_remote)
    assert not any(f"{EXPERTS}.1." in name for name in tensors)
    assert count.skipped == 6 and any(f"{EXPERTS}.2." in name for name in tensors)
    assert not is_remote(f"{EXPERTS}.1.w1.weight_packed".replace("0", "1", 1))
    assert not is_remote("mtp.layers.0.block_sparse_moe.experts.1.w1.weight")  # a draft's


@pytest.mark.parametrize(
    ("model_class", "wanted"),
    [("MixtralForCausalLM", ("w1", "w3", "w2")), ("Another", ("left", "right", "out"))],
)
def test_layers_take_the_names_of_the_folder(source, monkeypatch, model_class, wanted):
    """Or names that a class asks for whatever the folder has, as Granite's does in vLLM 0.26."""
    monkeypatch.setattr(plugin_loader, "OWN_NAMES", {"Another": wanted})
    model, experts = type(model_class, (torch.nn.Module,), {})(), torch.nn.Module()
    experts.quant_method = SimpleNamespace(local={0: 0}, layer_index=0)
    model.experts = experts
    names = [f"{EXPERTS}.1.w1.weight_packed", f"{EXPERTS}.1.w2.weight_scale", NORM, "a.w1.weight"]
    given = ((name, torch.zeros(1)) for name in names)
    layout = open_whole(source, torch.nn.Module()).layout
    got = [name for name, _ in agree_on_names(given, layout, model)]
    gate, up, down = wanted
    assert got == [
        f"{EXPERTS}.1.{gate}.weight_packed", f"{EXPERTS}.1.{down}.weight_scale", *names[2:]
    ]  # fmt: skip
    assert (experts.ckpt_gate_proj_name, experts.ckpt_up_proj_name) == (gate, up)
    assert experts.ckpt_down_proj_name == down


def test_a_missing_manifest(load, folder):
    (folder / MANIFEST_FILE).unlink()
    assert load(folder)[NORM].any()
    with pytest.raises(UserError, match=f"has no {MANIFEST_FILE}.*Drop --load-format"):
        load(folder, "mcmoe")


def test_changed_bytes_are_named_after_everything_was_checked(folder):
    qweight = "model.layers.0.self_attn.q_proj.qweight"

    def change(tensors):
        for name in (NORM, qweight):
            tensors[name].view(-1)[0] += 1

    edit_tensors(folder, change, agree=False)
    got = []
    with pytest.raises(UserError) as error:
        for name, _ in read_verified(
            open_whole(folder, torch.nn.Module()), lambda name: False, count := ReadCount()
        ):
            got.append(name)
    assert f"2 tensor(s) are not what {MANIFEST_FILE}" in str(error.value)
    assert f"{NORM} has another SHA-256 (in {SHARD})" in str(error.value)
    assert f"{qweight} has another SHA-256" in str(error.value)
    assert not {NORM, qweight} & set(got) and len(got) > 40 and not count.finished


@both
@pytest.mark.parametrize("value", [-1.0, torch.nan])
def test_scales_that_the_format_does_not_allow_are_refused(load, folder, load_format, value):
    """Though their hash is right."""
    name = "model.layers.0.self_attn.o_proj.scales"
    edit_tensors(folder, lambda t: t[name].view(-1)[:1].fill_(value))
    with pytest.raises(UserError, match="o_proj: scales has 1 scales that are not finite and pos"):
        load(folder, load_format)


@pytest.mark.parametrize(("version", "covered"), [(1, "SHA-256 are"), (2, "dtypes and shapes are")])
def test_what_was_checked_is_said_and_no_more(load, folder, monkeypatch, version, covered):
    said = {"info": [], "warning": []}
    for level, lines in said.items():
        monkeypatch.setattr(
            plugin_loader.logger, level, lambda text, *args, lines=lines: lines.append(text % args)
        )
    if version == 1:
        manifest = read_json(folder / MANIFEST_FILE)
        hashes = {name: entry["sha256"] for name, entry in manifest["tensors"].items()}
        write_json(folder / MANIFEST_FILE, {**manifest, "format_version": 1, "tensors": hashes})
    load(folder, "mcmoe")
    (line,) = said["info"]
    assert covered in line and ("dtypes" in line) == (version == 2)
    assert [f"of version {version}" in text for text in said["warning"]] == [True] * (version == 1)


def test_tensors_that_vllm_leaves_are_not_called_checked(load, source, built, monkeypatch):
    from itertools import islice

    load_weights = type(built[0]).load_weights
    monkeypatch.setattr(plugin_loader, "refuse_unfilled", lambda *args: None)
    monkeypatch.setattr(
        type(built[0]), "load_weights",
        lambda self, weights: load_weights(self, islice(weights, 7)),
    )  # fmt: skip
    with pytest.raises(UserError, match="vLLM took 7 tensors of .* left the others"):
        load(source, "mcmoe")


def test_a_model_that_is_not_compressed_is_refused(built):
    from vllm.config.load import LoadConfig

    loader = McmoeModelLoader(LoadConfig(load_format="mcmoe"))
    with pytest.raises(UserError, match="a-model is not compressed.*draft model"):
        loader.get_all_weights(SimpleNamespace(quantization=None, model="a-model"), built[0])


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", ".."])
def test_files_outside_the_folder_are_never_read(load, folder, file):
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"][NORM] = file
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(UserError, match="files outside its folder"):
        load(folder)


def test_a_shard_that_is_cut_short(load, folder):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-3])
    with pytest.raises(UserError, match=f"{SHARD} is truncated or corrupted"):
        load(folder)
