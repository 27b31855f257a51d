"""The whole compressor on tiny models: what comes out, and what survives being killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.checkpoint.format import MANIFEST_FILE, QuantizationConfig
from mcmoe_vllm.compress import job, pipeline, publish, quantize_layers
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.compress.pipeline import measure, plan, quantize, sweep
from mcmoe_vllm.disk import read_json
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.inspection import inspect_checkpoint
from mcmoe_vllm.model import architectures
from mcmoe_vllm.model.agreement import open_layout
from mcmoe_vllm.model.architectures import BY_LAYER, TESTED, Trial
from mcmoe_vllm.model.moe_model import open_model
from mcmoe_vllm.model.runner import final_hidden
from mcmoe_vllm.model.text import load_tokenizer, sample_windows
from mcmoe_vllm.plan import Plan
from mcmoe_vllm.recipes import PAPER, RECIPES

SMALL = {"samples": 8, "sequence_length": 128}


def options(model, output, text, **changes):
    return QuantizeOptions(
        model=str(model), output=str(output), calibration=str(text), **{**SMALL, **changes}
    )


def shard_bytes(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(
    ("tested", "said"),
    [
        ({}, "MixtralForCausalLM was never tested"),
        ({"MixtralForCausalLM": Trial("Mixtral", BY_LAYER)}, "was tested up to serving"),
        (TESTED, None),
    ],
)
def test_a_family_that_nobody_tested_is_announced_once(tiny_models, monkeypatch, tested, said):
    monkeypatch.setattr(architectures, "TESTED", tested)
    notes = []
    asked = options(tiny_models("mixtral"), "out", "text.jsonl")
    pipeline._open_model(asked, SimpleNamespace(say=notes.append))
    assert len(notes) == (said is not None) and all(said in note for note in notes)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_every_architecture_becomes_a_checkpoint_that_computes(
    tiny_models, tmp_path, calibration_text, model_type
):
    source = tiny_models(model_type)
    output = tmp_path / "out"
    result = quantize(options(source, output, calibration_text, bits=2.5))
    checkpoint = open_checkpoint(output)
    config = QuantizationConfig.from_dict(checkpoint.config["quantization_config"])
    layout = open_layout(checkpoint, config)
    experts = config.num_experts
    for layer in (0, 1):
        bits = config.bits(layer, "w13")
        for expert in range(experts):
            for name, width in zip(
                layout.expert_weights(layer, expert),
                (bits[expert], bits[expert], config.bits(layer, "w2")[expert]),
                strict=True,
            ):
                packed = checkpoint.tensors[name.replace(".weight", ".weight_packed")]
                original = open_checkpoint(source).tensors[name].shape
                assert packed.shape == (original[0], original[1] * width // 8)
    # Everything that is neither quantized nor finetuned is carried over bit for bit.
    kept = [n for n in checkpoint.tensors if n in open_checkpoint(source)]
    before, after = open_checkpoint(source).read(kept), checkpoint.read(kept)
    changed = {n for n in kept if not torch.equal(before[n], after[n])}
    assert all(n.endswith(("norm.weight", ".gate.weight")) for n in changed)
    assert "model.embed_tokens.weight" in kept and "model.norm.weight" not in changed
    assert all(before[n].dtype == after[n].dtype for n in kept)
    assert not any("self_attn.q_proj.weight" in n for n in checkpoint.tensors)
    for name in ("tokenizer.json", "README.md", "plan.json", "report.json", "allocation.png"):
        assert (output / name).stat().st_size > 0
    assert not (tmp_path / "out.work").exists()
    assert result["average_bits"]["experts"] == pytest.approx(
        result["average_bits"]["codes"] + 0.125  # 16 bits of scale and zero per 128 weights
    )
    assert 2.5 - 3 / (3 * 2 * experts) < result["average_bits"]["codes"] <= 2.5
    assert result["finetuning"]["after"] <= result["finetuning"]["before"]
    assert final_logits(output).isfinite().all()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_four_bits_everywhere_is_almost_the_original(
    tiny_models, tmp_path, calibration_text, model_type
):
    source, output = tiny_models(model_type), tmp_path / "out"
    # Weights as they are: fitting moves those of experts that few tokens reach further.
    recipe = replace(RECIPES["best"], answers=False, exact_targets=False)
    settings = {"bits": 4, "candidate_bits": (4,), "group_size": 32, "recipe": recipe}
    quantize(options(source, output, calibration_text, **settings))
    before = open_model(open_checkpoint(source), "cpu")
    after = open_model(open_checkpoint(output), "cpu")

    def close(original, restored, share):
        return float((original - restored).detach().norm()) <= share * float(original.norm())

    for layer in (0, 1):
        for expert in range(before.num_experts):
            original, restored = (m.experts.read(layer, expert) for m in (before, after))
            # Rounding to 4 bits loses 0.1; a swapped or transposed matrix would lose 1.4.
            assert close(original.w13, restored.w13, 0.2)
            assert close(original.w2, restored.w2, 0.2)
        restored = dict(after.load_layer(layer).module.named_parameters())
        for name, weight in before.load_layer(layer).module.named_parameters():
            quantized = name.endswith("proj.weight")  # the others are finetuned
            assert close(weight.detach(), restored[name], 0.2 if quantized else 0.02)


def final_logits(path):
    tokens = torch.randint(0, 8192, (2, 64), generator=torch.Generator().manual_seed(1))
    loaded = open_model(open_checkpoint(path), "cpu")
    return torch.stack(list(loaded.logits(final_hidden(loaded, tokens))))


@pytest.fixture(scope="module")
def finished(tiny_models, tmp_path_factory, calibration_text):
    """An uninterrupted job: its folder and options."""
    output = tmp_path_factory.mktemp("finished") / "out"
    settings = options(tiny_models("mixtral"), output, calibration_text)
    quantize(settings)
    return output, settings


def start(settings, output):
    command = [
        sys.executable, "-m", "mcmoe_vllm.cli", "quantize", settings.model, "-o", str(output),
        "--calibration", settings.calibration, "--samples", str(settings.samples),
        "--sequence-length", str(settings.sequence_length),
    ]  # fmt: skip
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def stop_at(process, file, kill):
    """Kill, or hold, a job as soon as `file` exists."""
    deadline = time.monotonic() + 300
    while not file.exists():
        assert process.poll() is None, f"the job ended before {file.name} was seen"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL if kill else signal.SIGSTOP)


MOMENTS = (  # in the order in which they come
    "significance/layer-000.json",  # measured, the next hidden states not yet kept
    "hidden/measuring-00001.safetensors",
    "plan.json",
    "checkpoint/model-00002-of-00003.safetensors",
    "hidden/quantizing-00001.safetensors",
    "layers/layer-001.json",
    "finetuned.json",  # its shards not yet rewritten
)


@pytest.mark.nightly
def test_killed_at_any_moment_and_resumed_gives_identical_shards(finished, tmp_path):
    reference, settings = finished
    output, work = tmp_path / "out", tmp_path / "out.work"
    process = start(settings, output)
    snapshots = []
    for moment in MOMENTS:
        # A held process's folder is what a kill at this moment would leave.
        stop_at(process, work / moment, kill=False)
        snapshots.append(tmp_path / f"moment-{len(snapshots)}")
        shutil.copytree(work, snapshots[-1])
        process.send_signal(signal.SIGCONT)
    process.wait()
    for work_dir in snapshots:
        resumed = tmp_path / f"resumed-{work_dir.name}"
        changes = {"output": str(resumed), "work_dir": str(work_dir), "resume": True}
        quantize(QuantizeOptions(**{**vars(settings), **changes}))
        assert shard_bytes(resumed) == shard_bytes(reference)
        for name in (MANIFEST_FILE, "model.safetensors.index.json", "config.json", "plan.json"):
            assert (resumed / name).read_bytes() == (reference / name).read_bytes()
        assert not work_dir.exists()


def test_a_killed_job_is_named_and_kept_until_it_is_resumed(finished, tmp_path):
    reference, settings = finished
    output, work = tmp_path / "out", tmp_path / "out.work"
    process = start(settings, output)
    stop_at(process, work / "significance/layer-000.json", kill=True)
    process.wait()
    assert not output.exists()
    again = QuantizeOptions(**{**vars(settings), "output": str(output)})
    with pytest.raises(UserError, match="--resume") as error:
        quantize(again)
    assert str(work) in str(error.value) and "1 layers measured" in str(error.value)
    assert (work / "job.json").exists()
    quantize(QuantizeOptions(**{**vars(again), "resume": True}))
    assert shard_bytes(output) == shard_bytes(reference)


QUICK = {
    "bits": 2, "recipe": "paper", "method": "rtn", "finetune_passes": 0, "samples": 2,
    "sequence_length": 64,
}  # fmt: skip


def test_killed_while_the_output_is_filled_it_is_finished_by_resume(
    tiny_models, calibration_text, tmp_path, monkeypatch
):
    """An output folder that exists, by another name: its job's files alone may lie in it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    given = options(tiny_models("mixtral"), f"{tmp_path}/link/", calibration_text, **QUICK)
    moved = []

    def dies(source, target):
        moved.append(target)
        if len(moved) == 3:
            raise KeyboardInterrupt
        source.rename(target)
        return True

    monkeypatch.setattr(publish, "_move", dies)
    with pytest.raises(KeyboardInterrupt):
        quantize(given)
    monkeypatch.undo()
    monkeypatch.setattr(quantize_layers, "write_shard", lambda *_: pytest.fail("done before"))
    assert len(list((tmp_path / "real").iterdir())) == 2
    with pytest.raises(UserError, match="--resume"):
        quantize(given)
    result = quantize(replace(given, resume=True))
    inspect_checkpoint(tmp_path / "real", check=True)
    assert result == read_json(tmp_path / "real" / "report.json")
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_other_weights_of_the_same_shape_are_not_resumed(tiny_models, calibration_text, tmp_path):
    model = shutil.copytree(tiny_models("mixtral"), tmp_path / "model")
    given = options(model, tmp_path / "out", calibration_text, **QUICK)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantize_layers, "write_shard", interrupt)
        quantize(given)
    file = model / "model.safetensors"
    original = file.read_bytes()
    file.write_bytes(original[: len(original) // 2] + bytes(len(original) - len(original) // 2))
    with pytest.raises(UserError, match="weights or config.json are others than at its start"):
        quantize(replace(given, resume=True))
    file.write_bytes(original)  # downloaded again, elsewhere
    shutil.move(model, tmp_path / "moved")
    quantize(replace(given, model=str(tmp_path / "moved"), resume=True))


def interrupt(*_):
    raise KeyboardInterrupt


def test_resuming_with_other_settings_lists_all_of_them(
    tiny_models, calibration_text, tmp_path, monkeypatch
):
    given = options(tiny_models("mixtral"), tmp_path / "out", calibration_text, **QUICK)
    monkeypatch.setattr(job, "FORMAT_VERSION", 1)
    monkeypatch.setattr(pipeline, "measure_and_choose", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(given)
    monkeypatch.undo()
    with pytest.raises(UserError) as error:
        quantize(replace(given, resume=True, bits=3, seed=5, target_drop=0.1))
    assert "bits was 2, is now 3" in str(error.value)
    assert "seed was 0, is now 5" in str(error.value)
    assert "target_drop was None, is now 0.1" in str(error.value)
    assert "format_version was 1, is now 2" in str(error.value)  # tensors would be of both
    assert (tmp_path / "out.work" / "job.json").exists()


def test_a_plan_can_be_made_first_and_gives_the_same_shards(finished, tmp_path):
    reference, settings = finished
    plan_file = tmp_path / "plan.json"
    made = plan(QuantizeOptions(**{**vars(settings), "output": str(plan_file)}))
    assert made == Plan.from_dict(read_json(plan_file))
    assert not (tmp_path / "plan.json.work").exists()
    output = tmp_path / "out"
    quantize(QuantizeOptions(**{**vars(settings), "output": str(output), "plan": str(plan_file)}))
    assert shard_bytes(output) == shard_bytes(reference)


def test_the_paper_recipe_is_recorded_and_quantizes_the_router(
    tiny_models, tmp_path, calibration_text
):
    source, output = tiny_models("mixtral"), tmp_path / "out"
    result = quantize(options(source, output, calibration_text, recipe="paper", beta=1.0))
    checkpoint = open_checkpoint(output)
    recorded = checkpoint.config["quantization_config"]["recipe"]
    expected = {**PAPER.to_dict(), "beta": 1.0, "candidate_bits": [1, 2, 3]}
    assert recorded["recipe"] == expected.pop("name")
    assert {name: recorded[name] for name in expected} == expected
    assert recorded == result["recipe"] and recorded["seed"] == 0 and "highs" in recorded["solver"]
    assert result["layers"][0]["router"]["bits"] == 4
    name = "model.layers.0.block_sparse_moe.gate.weight"
    router, original = checkpoint.read([name])[name], open_checkpoint(source).read([name])[name]
    assert router.dtype == original.dtype and not torch.equal(router, original)
    assert all(len(row.unique()) <= 16 for row in router)  # hidden size 128: one group
    assert (router.float() - original.float()).norm() < 0.2 * original.float().norm()


@pytest.mark.parametrize("recipe", ["paper", "best"])
def test_sequential_calibration_is_a_trait(tiny_models, tmp_path, calibration_text, recipe):
    """Layer 0 is the same either way, layer 1 sees what the quantized layer 0 puts out."""
    shards = []
    for sequential in (True, False):
        output = tmp_path / str(sequential)
        traits = replace(
            RECIPES[recipe], sequential=sequential, exact_targets=False, finetune_passes=0
        )
        quantize(options(tiny_models("mixtral"), output, calibration_text, bits=2, recipe=traits))
        shards.append(shard_bytes(output))
    same = {name for name in shards[0] if shards[0][name] == shards[1][name]}
    assert "model-00002-of-00003.safetensors" in same
    assert "model-00003-of-00003.safetensors" not in same


@pytest.mark.nightly
def test_exact_targets_undo_what_layers_before_lost(tiny_models, tmp_path, calibration_text):
    """With 1-bit experts in front, layers fitted to the 16-bit model's outputs end nearer to them
    on the text they were fitted to; nothing changes where every layer is given exact inputs."""
    source = tiny_models("qwen2_moe")
    tokenizer = load_tokenizer(source)
    windows = sample_windows(str(calibration_text), tokenizer, 32, 128, 0)
    wanted = last_states(source, windows)
    lost, not_sequential = [], []
    for exact_targets in (False, True):
        for sequential in (True, False):
            output = tmp_path / f"{exact_targets}-{sequential}"
            traits = replace(
                RECIPES["best"],
                exact_targets=exact_targets,
                sequential=sequential,
                finetune_passes=0,
            )
            given = {"bits": 1, "recipe": traits, "samples": 32}
            quantize(options(source, output, calibration_text, **given))
            if sequential:
                lost.append(float((last_states(output, windows) - wanted).square().sum()))
            else:
                not_sequential.append(shard_bytes(output))
    assert lost[1] < 0.95 * lost[0]
    assert not_sequential[0] == not_sequential[1]


def last_states(folder, windows):
    loaded = open_model(open_checkpoint(folder))
    return torch.cat([h.flatten(0, -2).float() for h in final_hidden(loaded, windows)])


def test_a_sweep_costs_less_with_more_bits(tiny_models, calibration_text):
    settings = options(tiny_models("mixtral"), "unused", calibration_text)
    swept = sweep(settings, (1.5, 2, 3))
    assert [bits for bits, _ in swept] == [1.5, 2, 3]
    costs = [cost for _, cost in swept]
    assert costs[0] > costs[1] > costs[2] > 0
    with pytest.raises(UserError, match=r"sweep holds \[5\], the candidates allow 1 to 4"):
        sweep(settings, (2, 5))
    with pytest.raises(UserError, match="--recipe best"):
        sweep(replace(settings, recipe="paper"), (2,))


def test_a_plan_brings_its_recipe_along(tiny_models, tmp_path, calibration_text):
    settings = {"bits": 2, "recipe": "paper"}
    plan_file, source = tmp_path / "plan.json", tiny_models("mixtral")
    plan(options(source, plan_file, calibration_text, **settings))
    result = quantize(options(source, tmp_path / "out", calibration_text, plan=str(plan_file)))
    assert result["recipe"]["compensated_bits"] == PAPER.compensated_bits


def test_measuring_needs_no_solver(tiny_models, calibration_text, monkeypatch):
    monkeypatch.setattr("mcmoe_vllm.allocate.pmq._import_mathopt", lambda: pytest.fail("solver"))
    measured = measure(options(tiny_models("mixtral"), "unused", calibration_text))
    assert [len(e) for m in measured for e in m.reconstruction_error] == [4] * 8


def test_uniform_bits_need_no_measurement_and_drop_the_floors(
    tiny_models, tmp_path, calibration_text
):
    settings = {"bits": 2, "recipe": "paper"}
    result = quantize(
        options(tiny_models("mixtral"), tmp_path / "out", calibration_text, **settings)
    )
    assert all(set(row) == {"2"} for row in result["plan"]["bits"])
    measured = result["plan"]["options"]["significance"]
    assert all(not errors for layer in measured for errors in layer["reconstruction_error"])


def test_the_papers_floors_and_budget(tiny_models, tmp_path, calibration_text):
    settings = {"recipe": "paper", "bits": 2.5}
    made = plan(options(tiny_models("mixtral"), tmp_path / "p.json", calibration_text, **settings))
    for row in made.bits:
        assert sum(row) <= 2.5 * 4 and 3 in row and 2 in row
    assert made.w2_bits == ()


def test_pins_global_scope_and_dropped_experts(tiny_models, tmp_path, calibration_text):
    made = plan(
        options(
            tiny_models("qwen3_moe"),
            tmp_path / "plan.json",
            calibration_text,
            bits=1.5,
            scope="global",
            candidate_bits=(0, 1, 2, 4),
            pins=("layers.0.experts.2=0", "layers.1.*=1"),
        )
    )
    assert made.bits[0][2] == 0 and set(made.bits[1]) == {1}
    used = [w for row in made.pairs() for w13, w2 in row for w in (w13, w13, w2)]
    assert sum(w + 0.125 * (w > 0) for w in used) <= 3 * 12 * 1.625  # dropped: no scales either
    output = tmp_path / "out"
    quantize(
        options(
            tiny_models("qwen3_moe"), output, calibration_text, plan=str(tmp_path / "plan.json")
        )
    )
    checkpoint = open_checkpoint(output)
    assert not checkpoint.names("model.layers.0.mlp.experts.2.")
    loaded = open_model(checkpoint, "cpu")
    hidden = final_hidden(loaded, torch.arange(32).unsqueeze(0))
    assert hidden[0].isfinite().all()


def test_an_expert_without_tokens_is_reported_and_safe(tmp_path, calibration_text):
    from safetensors.torch import load_file, save_file

    from tests.conftest import make_tiny_model

    source = make_tiny_model(tmp_path / "model", "mixtral", layers=1, num_local_experts=6)
    file = source / "model.safetensors"
    tensors = load_file(file)
    gate = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    # Logits along one direction: the two highest or the two lowest win, experts 2 and 3 never do.
    # Powers of two, which no rounding of weights or sums turns into another direction.
    gate[1:] = gate[0] * torch.tensor([[2.0], [0.125], [0.0], [-2.0], [-4.0]])
    gate[0] *= 4
    save_file(tensors, file, metadata={"format": "pt"})
    result = quantize(options(source, tmp_path / "out", calibration_text))
    tokens = result["layers"][0]["experts"]["tokens"]
    starved = result["starved_experts"].get("0", [])
    assert tokens[2] == tokens[3] == 0 and {2, 3} <= set(starved)
    assert starved == [e for e, n in enumerate(tokens) if n < 256]
    checkpoint = open_checkpoint(tmp_path / "out")
    scales = checkpoint.read([n for n in checkpoint.tensors if n.endswith("weight_scale")])
    assert scales and all(s.dtype == torch.int16 for s in scales.values())  # no word is invalid
    assert "hardly reached" in (tmp_path / "out" / "README.md").read_text()


def test_dense_linears_can_stay_in_16_bits(tiny_models, tmp_path, calibration_text):
    quantize(
        options(tiny_models("mixtral"), tmp_path / "out", calibration_text, bits=3, dense_bits=16)
    )
    checkpoint = open_checkpoint(tmp_path / "out")
    assert "model.layers.0.self_attn.q_proj.weight" in checkpoint
    assert checkpoint.config["quantization_config"]["dense_modules"] == []


def test_a_full_disk_leaves_no_output_and_can_be_resumed(
    tiny_models, tmp_path, calibration_text, monkeypatch
):
    settings = options(tiny_models("mixtral"), tmp_path / "out", calibration_text, bits=2)
    real = quantize_layers.write_shard

    def full(path, tensors):
        if "00003" in path.name:
            raise UserError(f"writing {path} failed: No space left on device")
        real(path, tensors)

    monkeypatch.setattr(quantize_layers, "write_shard", full)
    with pytest.raises(UserError, match="No space left"):
        quantize(settings)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.work" / "job.json").exists()
    monkeypatch.undo()
    quantize(QuantizeOptions(**{**vars(settings), "resume": True}))
    assert (tmp_path / "out" / "config.json").exists()


def test_too_little_free_space_is_said_before_the_work(
    tiny_models, tmp_path, calibration_text, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="1000 B free"):
        quantize(options(tiny_models("mixtral"), tmp_path / "out", calibration_text, bits=2))
    assert not (tmp_path / "out").exists()
