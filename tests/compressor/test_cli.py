"""The command line: every bad input ends with one clear message, exit code 2 and no output."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcmoe_vllm import cli
from mcmoe_vllm.arguments import parse
from mcmoe_vllm.checkpoint.format import INDEX_FILE
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.errors import UserError


def run(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def model(tiny_models, tmp_path):
    """A tiny Mixtral that a test may damage."""
    return shutil.copytree(tiny_models("mixtral"), tmp_path / "model")


def edit_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    config.update(changes)
    (model / "config.json").write_text(json.dumps(config))


def edit_tensor(model, name, change):
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})


GATE = "model.layers.0.block_sparse_moe.experts.1.w1.weight"


def set_first(value):
    def change(tensor):
        tensor[0, 0] = value
        return tensor

    return change


DAMAGES = {
    "not an MoE": (
        lambda m: edit_config(m, architectures=["LlamaForCausalLM"], num_local_experts=None,
                              num_experts_per_tok=None),
        [], "not a Mixture-of-Experts",
    ),
    "unsupported": (
        lambda m: edit_config(m, architectures=["Llama4ForCausalLM"]), [], "not supported yet",
    ),
    "quantized in another way": (
        lambda m: edit_config(m, quantization_config={"quant_method": "gptq"}), [],
        "quantized in a way that cannot be read (quant_method 'gptq')",
    ),
    "indivisible": (
        lambda m: edit_config(m, intermediate_size=96) or _narrow(m, 96), ["--group-size", "64"],
        "expert width): 96 columns, group size 64\nRemedy: use --group-size w2=32, or leave",
    ),
    "contradicting shapes": (
        lambda m: edit_config(m, intermediate_size=256), [], "config says [256, 128]",
    ),
    "missing expert": (lambda m: _drop(m, GATE), [], f"{GATE} is missing"),
    "missing norm": (
        lambda m: _drop(m, "model.layers.1.input_layernorm.weight"), [], "input_layernorm.weight",
    ),
    "truncated shard": (
        lambda m: _truncate(m / "model.safetensors"), [], "truncated or corrupted",
    ),
    "missing shard": (
        lambda m: (m / "model.safetensors").unlink(), [], "no safetensors files",
    ),
    "NaN weights": (
        lambda m: edit_tensor(m, GATE, set_first(float("nan"))), [], f"NaN or infinite weights in "
        f"1 tensor: {GATE}",
    ),
    "infinite weights": (
        lambda m: edit_tensor(m, GATE, set_first(float("inf"))), [], "NaN or infinite",
    ),
    "outside index": (
        lambda m: (m / INDEX_FILE).write_text(
            json.dumps({"weight_map": {GATE: "../secret.safetensors"}})
        ), [], "outside its folder",
    ),
    "no tokenizer": (
        lambda m: [(m / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], [],
        "no usable tokenizer",
    ),
    "bits above": (lambda m: None, ["--bits", "4.5"], "allow 1 to 4"),
    "bits above the paper's": (
        lambda m: None, ["--bits", "3.5", "--recipe", "paper"], "allow 1 to 3",
    ),
    "bits below": (lambda m: None, ["--bits", "0.5"], "allow 1 to 4"),
    "bits no number": (lambda m: None, ["--bits", "nan"], "finite"),
    "impossible budget": (
        lambda m: None, ["--bits", "1.25", "--pin", "layers.*=3"], "smallest",
    ),
    "impossible budget of the paper's": (
        lambda m: None, ["--bits", "1.25", "--recipe", "paper", "--pin", "layers.*=3"], "smallest",
    ),
    "wrong pins": (
        lambda m: None, ["--pin", "layers.9.*=3", "--pin", "layers.0.*=7"], "matches no expert",
    ),
    "wrong candidates": (lambda m: None, ["--candidate-bits", "2,5"], "not among"),
    "wrong group size": (lambda m: None, ["--group-size", "100"], "allowed are [32, 64, 128]"),
    "too long windows": (lambda m: None, ["--sequence-length", "4096"], "allowed are 2 to 256"),
    "too many samples": (lambda m: None, ["--samples", "100000"], "too short"),
    "wrong device": (lambda m: None, ["--device", "gpu"], "device is 'gpu'"),
    "strange device": (lambda m: None, ["--device", "meta"], "device is 'meta'"),
    "endless pin": (lambda m: None, ["--pin", "layers.*=" + "9" * 5000], "not of the form"),
    "nothing to prune": (
        lambda m: edit_config(m, num_experts_per_tok=1), ["--target-drop", "0.1"],
        "nothing for online pruning to drop",
    ),
    "missing plan": (lambda m: None, ["--plan", "nowhere.json"], "does not exist"),
}  # fmt: skip


def _narrow(model, width):
    file = model / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".experts." in name:
            part = tensor[:, :width] if ".w2." in name else tensor[:width]
            tensors[name] = part.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def _drop(model, name):
    file = model / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize("damage", DAMAGES)
def test_quantize_refuses(capsys, model, tmp_path, calibration_text, damage):
    make, arguments, message = DAMAGES[damage]
    make(model)
    output = tmp_path / "out"
    defaults = {"--samples": "4", "--sequence-length": "64"}
    defaults = [a for k, v in defaults.items() if k not in arguments for a in (k, v)]
    code, out, err = run(
        capsys, "quantize", model, "-o", output, "--calibration", calibration_text,
        *defaults, *arguments,
    )  # fmt: skip
    assert code == 2 and message in err, err
    assert err.count("error: ") == 1 and "Traceback" not in err
    assert not output.exists() and not out


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"  \n ", "is empty"),
        (b"too few words", "is too short"),
        ("na\xefve".encode("latin-1"), "not UTF-8"),
    ],
)
def test_calibration_text_is_refused(capsys, model, tmp_path, content, message):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    code, _, err = run(
        capsys, "quantize", model, "-o", tmp_path / "out", "--calibration", text, "--bits", "2"
    )
    assert code == 2 and message in err and str(text) in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_without_network_the_default_calibration_names_the_remedy(capsys, model, tmp_path):
    code, _, err = run(capsys, "quantize", model, "-o", tmp_path / "out")
    assert code == 2 and "allenai/c4" in err and "--calibration FILE.jsonl" in err
    assert err.count("error: ") == 1
    assert not (tmp_path / "out").exists()


def test_without_network_a_hub_name_says_so(capsys, tmp_path):
    code, _, err = run(capsys, "quantize", "nobody/no-such-model", "-o", tmp_path / "out")
    assert code == 2 and "nobody/no-such-model is no local folder" in err


def test_output_must_be_new_and_its_parent_must_exist(capsys, model, tmp_path, calibration_text):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("keep")
    arguments = ("--calibration", calibration_text)
    code, _, err = run(capsys, "quantize", model, "-o", full, *arguments)
    assert code == 2 and "not empty" in err
    assert [f.name for f in full.iterdir()] == ["precious.txt"]
    code, _, err = run(capsys, "quantize", model, "-o", tmp_path / "a" / "b", *arguments)
    assert code == 2 and "does not exist" in err


def test_a_plan_of_another_model_is_refused(capsys, model, tmp_path, tiny_models, calibration_text):
    small = ("--calibration", calibration_text, "--samples", "4", "--sequence-length", "64")
    plan_file = tmp_path / "plan.json"
    code, out, _ = run(
        capsys, "plan", model, "-o", plan_file, "--bits", "2", "--recipe", "paper", *small
    )
    assert code == 0 and out.strip() == str(plan_file)
    other = tiny_models("qwen3_moe")
    code, _, err = run(
        capsys, "quantize", other, "-o", tmp_path / "out", "--plan", plan_file, *small
    )
    assert code == 2 and "does not fit the model" in err and "6" in err
    plan_file.write_text(plan_file.read_text().replace('"2222"', '"2922"'))
    code, _, err = run(
        capsys, "quantize", model, "-o", tmp_path / "out", "--plan", plan_file, *small
    )
    assert code == 2 and "widths [9]" in err


def test_quantize_inspect_and_eval_work_together(
    capsys, model, tmp_path, calibration_text, evaluation_text
):
    output = tmp_path / "out"
    code, out, _ = run(
        capsys, "quantize", model, "-o", output, "--calibration", calibration_text, "--samples",
        "8", "--sequence-length", "64", "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["average_bits"]["codes"] <= 2.5
    code, out, err = run(capsys, "inspect", output, "--check", "--json")
    assert code == 0, err
    figures = tmp_path / "figures.json"
    code, out, _ = run(
        capsys, "eval", output, "--against", model, "--text", evaluation_text, "--windows", "8",
        "--sequence-length", "64", "--json", figures,
    )  # fmt: skip
    assert code == 0 and "perplexity" in out
    result = json.loads(figures.read_text())
    assert result["windows"] == 8 and result["kl"] > 0 and result["paired_stderr"] > 0
    # Against itself nothing is lost, exactly.
    code, _, _ = run(
        capsys, "eval", model, "--against", model, "--text", evaluation_text, "--windows", "4",
        "--sequence-length", "64", "--json", figures,
    )  # fmt: skip
    result = json.loads(figures.read_text())
    assert result["kl"] == 0 and result["loss_difference"] == 0 and result["paired_stderr"] == 0


def test_allocate_writes_bits(capsys, tmp_path):
    factors = {
        "frequency": [[5, 1, 1]],
        "routing_weight": [[3, 1, 1]],
        "reconstruction_error": [[[9, 3, 1]] * 3],
        "candidate_bits": [1, 2, 3],
    }
    (tmp_path / "factors.json").write_text(json.dumps(factors))
    code, out, _ = run(
        capsys, "allocate", tmp_path / "factors.json", "--layer-budget", "6", "-o",
        tmp_path / "bits.json",
    )  # fmt: skip
    assert code == 0 and "321" in out
    written = json.loads((tmp_path / "bits.json").read_text())
    assert written["bits"] == [[3, 2, 1]] and set(written) == {"bits", "objective", "solver"}


@pytest.mark.parametrize("command", ["quantize", "plan", "allocate", "inspect", "eval", "doctor"])
def test_every_command_has_help_with_an_example(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"mcmoe {command}" in capsys.readouterr().out


def test_flags_are_the_options(monkeypatch):
    """Every field has its flag, of its own type, under its own name."""
    asked = []
    monkeypatch.setattr("mcmoe_vllm.compress.pipeline.quantize", asked.append)
    monkeypatch.setattr("mcmoe_vllm.compress.job.resumed_flags", lambda given: given)
    given = {
        "--bits": ("bits", 3.5), "--recipe": ("recipe", "paper"), "--scope": ("scope", "global"),
        "--group-size": ("group_size", {"w2": 64, "dense": 32}),
        "--tensor-parallel": ("tensor_parallel", 2),
        "--candidate-bits": ("candidate_bits", (2, 3, 4)),
        "--dense-bits": ("dense_bits", 16), "--calibration": ("calibration", "x.txt"),
        "--samples": ("samples", 7), "--sequence-length": ("sequence_length", 9),
        "--method": ("method", "rtn"), "--alpha": ("alpha", 0.5), "--beta": ("beta", 2.5),
        "--gamma": ("gamma", 2.0), "--finetune-passes": ("finetune_passes", 3),
        "--pin": ("pins", ("layers.0.*=3",)), "--plan": ("plan", "p.json"),
        "--target-drop": ("target_drop", 0.25), "--device": ("device", "cpu"),
        "--seed": ("seed", 5), "--work-dir": ("work_dir", "w"), "--resume": ("resume", True),
        "--revision": ("revision", "main"), "--trust-remote-code": ("trust_remote_code", True),
    }  # fmt: skip
    assert {field for field, _ in given.values()} | {"model", "output"} == set(
        QuantizeOptions.__dataclass_fields__
    )
    line = ["quantize", "m", "-o", "o"]
    for flag, (_, value) in given.items():
        several = [f"{n}={v}" for n, v in value.items()] if isinstance(value, dict) else value
        text = ",".join(map(str, several)) if isinstance(value, tuple | dict) else str(value)
        line += [flag] if value is True else [flag, text]
    del line[line.index("--plan") : line.index("--plan") + 2]  # has decided most of the others
    assert cli.main(["quantize", "m", "-o", "o"]) == cli.main([*line, "--pin", "b=1"]) == 0
    assert asked[0] == QuantizeOptions("m", "o")
    expected = QuantizeOptions("m", "o", **dict(given.values()))
    assert asked[1] == replace(expected, pins=("layers.0.*=3", "b=1"), plan=None)
    assert cli.main(["quantize", "m", "-o", "o", "--plan", "p.json"]) == 0
    assert asked[2] == QuantizeOptions("m", "o", plan="p.json")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "quantize m -o o --plan p.json --bits 2.5 --pin a=1 --dense-bits 4 --candidate-bits 1,2"
            " --group-size 128 --scope layer --alpha 1 --beta 1 --gamma 1",
            "--bits, --candidate-bits, --group-size, --dense-bits, --pin, --scope, --alpha, --beta,"
            " --gamma cannot be given with --plan",
        ),
        ("plan m --sweep 2,3 -o p.json --bits 2 --resume", "-o, --bits, --resume cannot be given"),
        ("plan m --plot x.png", "--plot draws what --sweep prints"),
        (
            "eval m --text t --engine-args {} --limit 3 --num-fewshot 0 --include-path .",
            "--num-fewshot, --limit, --include-path, --engine-args cannot be given with --text",
        ),
        (
            "eval m --tasks t --windows 256 --sequence-length 64 --device auto",
            "--windows, --sequence-length, --device cannot be given with --tasks",
        ),
        ("eval m --tasks t --engine transformers", "vLLM runs --tasks"),
        ("eval m --text t --engine vllm --device cpu", "vLLM chooses its device itself"),
        ("calibrate-pruning m --text t --rule median --target-drop 0.15", "leave out one of the"),
        ("quantize m -o o --alpha 1", "alpha weigh the costs of --recipe paper"),
    ],
)
def test_contradictions_are_refused_at_once_and_all_named(capsys, line, message):
    """Also those that ask for what is the default."""
    code, out, err = run(capsys, *line.split())
    assert code == 2 and err.startswith("error: ") and message in err and not out, err


def test_callers_from_python_contradict_no_plan_either(tmp_path):
    from mcmoe_vllm.compress.pipeline import quantize, sweep
    from mcmoe_vllm.plan import Plan, same_group_size

    plan = Plan("m", "MixtralForCausalLM", (0,), ((3, 2),), (2, 3), same_group_size(64), 16, 2.5)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    options = QuantizeOptions("m", tmp_path / "o", plan=tmp_path / "plan.json", dense_bits=16)
    for name, value in {"bits": 3.0, "pins": ["*.1=3"], "candidate_bits": [2, 4]}.items():
        with pytest.raises(UserError, match="cannot be given with --plan"):
            quantize(replace(options, **{name: value}))
    with pytest.raises(UserError, match="m is no local folder"):  # 16 is what the plan says too
        quantize(options)
    with pytest.raises(UserError, match="without pins"):
        sweep(QuantizeOptions("m", "o", pins=("*=2",)), [2])


def test_what_agrees_is_no_contradiction():
    for line in (
        "quantize m -o o --plan p --samples 3 --seed 1 --recipe best --method rtn",
        "plan m --sweep 2,3 --plot x.png --candidate-bits 2,3 --scope layer",
        "plan m --bits 2 -o p.json --pin a=1 --resume",
        "eval m --tasks t --engine vllm --limit 2 --against b --pruning off --json f",
        "eval m --text t --engine vllm --windows 3 --sequence-length 64 --json f",
    ):
        assert parse(line.split()).command == line.split()[0]
    assert parse(["plan", "m"]).output == "plan.json"
    assert set(vars(parse(["eval", "m", "--text", "t"]))) == {"command", "model", "text"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("calibrate-pruning m --text t --samples 0", "samples is 0, needs at least 1"),
        ("calibrate-pruning m --text t --samples -1", "samples is -1, needs at least 1"),
        ("calibrate-pruning m --text t --target-drop nan", "target_drop is nan, allowed"),
        ("eval m --text t --windows 1", "windows is 1, needs at least 2"),
        ("eval m --text t --windows -256", "windows is -256, needs at least 2"),
        (f"eval m --text t --windows {10**30}", "needs at most"),
        ("quantize m -o o --samples 0 --seed -1", "samples is 0, needs at least 1\nseed is -1"),
        (f"quantize m -o o --seed {2**64}", "seed is 18446744073709551616, needs at most"),
        ("quantize m -o o --sequence-length 0", "sequence_length is 0, needs at least 2"),
        ("quantize m -o o --bits inf", "bits is inf, needs a finite number"),
        ("quantize m -o o --recipe paper --gamma 1e308", "gamma is 1e+308"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_read(capsys, line, message):
    code, out, err = run(capsys, *line.split())
    assert code == 2 and message in err and not out, err


@pytest.mark.parametrize("length", ["0", "1", "-7", "257"])
@pytest.mark.parametrize("command", ["eval", "plan"])
def test_every_command_refuses_lengths_that_are_none(
    capsys, model, evaluation_text, tmp_path, command, length
):
    text = "--text" if command == "eval" else "--calibration"
    more = ["-o", tmp_path / "plan.json"] if command == "plan" else []
    code, _, err = run(
        capsys, command, model, text, evaluation_text, "--sequence-length", length, *more
    )
    assert code == 2 and f"sequence_length is {length}, " in err


def test_a_value_of_a_flag_may_be_long(capsys):
    for line in (["--samples", "9" * 5000], ["--candidate-bits", "x" * 5000], ["--" + "y" * 5000]):
        with pytest.raises(SystemExit):
            cli.main(["quantize", "m", "-o", "o", *line])
        assert len(capsys.readouterr().err.partition("error: ")[2]) < 1000
    for tasks in (",", ""):
        with pytest.raises(SystemExit):
            cli.main(["eval", "m", "--tasks", tasks])
        assert "names nothing" in capsys.readouterr().err
    for value in ("[" * 5000, "[]", '{"a": NaN}', "9" * 5000):
        with pytest.raises(SystemExit):
            cli.main(["eval", "m", "--tasks", "t", "--engine-args", value])
        assert "is no JSON object" in capsys.readouterr().err


def test_plan_has_no_flags_that_only_quantize_knows(capsys):
    for flag in ("--plan", "--target-drop"):
        with pytest.raises(SystemExit):
            cli.main(["plan", "m", flag, "0.1"])
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_help_is_grouped(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.main(["quantize", "--help"])
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "positional arguments:", "options:", "target:",
        "recipe; its traits change one by one with the other flags:", "calibration:", "running:",
        "Example:",
    ]  # fmt: skip
    place = {h: i for i, h in enumerate(lines) if h in headings}
    for flag, heading, following in (
        ("--pin PATTERN=BITS", "target:", headings[3]),
        ("--method {gptq,rtn}", headings[3], "calibration:"),
        ("--seed SEED", "calibration:", "running:"),
        ("--resume", "running:", "Example:"),
    ):
        assert any(flag in line for line in lines[place[heading] : place[following]])


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--scope", "model", "argument --scope: invalid choice: 'model'"),
        ("--candidate-bits", "1,x", "'1,x' is no list such as 1,2,3"),
        ("--samples", "many", "argument --samples: invalid int value: 'many'"),
    ],
)
def test_flags_that_cannot_be_read(capsys, flag, value, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quantize", "m", "-o", "o", flag, value])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_help_loads_no_library():
    code = (
        "import sys\n"
        "from mcmoe_vllm.arguments import build_parser\n"
        "build_parser().format_help()\n"
        "print(sorted({'torch', 'numpy', 'rich', 'transformers'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_nothing_is_unpickled(capsys, model, tmp_path):
    (model / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, model / "pytorch_model.bin")
    code, _, err = run(capsys, "quantize", model, "-o", tmp_path / "out")
    assert code == 2 and "never loaded" in err


def test_a_sweep_is_drawn(tiny_models, calibration_text, tmp_path, capsys):
    command = ["plan", str(tiny_models("mixtral")), "--calibration", str(calibration_text),
               "--samples", "2", "--sequence-length", "64", "--sweep", "1.5,2,3"]  # fmt: skip
    drawing = tmp_path / "sweep.png"
    assert cli.main([*command, "--plot", str(drawing)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "1.50", "2.00", "3.00"
    ]  # fmt: skip
    assert drawing.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sweep.png"]


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "no-model", "--sweep", "2", "--plot"],
        ["plan", "no-model", "-o"],
        ["inspect", "no-model", "--heatmap"],
        ["eval", "no-model", "--text", "no.txt", "--json"],
        ["eval", "no-model", "--tasks", "none", "--json"],
        ["allocate", "no.json", "--layer-budget", "8", "-o"],
    ],
    ids=lambda command: f"{command[0]} {command[-1]}",
)
@pytest.mark.parametrize(
    ("file", "message"),
    [("absent/x", "the folder for x, does not exist; create it first"), (".", "is a folder")],
)
def test_a_result_that_has_no_place_is_refused_before_the_work(
    command, file, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *command, file)
    assert code == 2 and message in err and not out
    assert err.count("error: ") == 1 and "no-model" not in err and "no.json" not in err
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_one_sentence(
    capsys, model, tmp_path, evaluation_text, monkeypatch
):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    figures = tmp_path / "figures.json"
    code, out, err = run(
        capsys, "eval", model, "--text", evaluation_text, "--windows", "2", "--sequence-length",
        "32", "--json", figures,
    )  # fmt: skip
    assert code == 2 and "perplexity" in out
    assert f"error: writing {figures} failed: No space left on device" in err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--plot", "x.png"], "--plot draws what --sweep prints"),
        (
            ["--sweep", "2", "--plot", "absent/x.png"],
            "absent, the folder for x.png, does not exist",
        ),
    ],
)
def test_a_drawing_that_cannot_be_is_refused_at_once(more, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "no-model", *more]) == 2
    assert message in capsys.readouterr().err
