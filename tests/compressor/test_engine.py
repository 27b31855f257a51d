"""The process that runs an engine: what it is given, what it gives, and what it must not import."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from mcmoe_vllm.errors import UserError
from mcmoe_vllm.evaluate import tasks
from mcmoe_vllm.evaluate.engine import score_with_vllm

ROOT = Path(__file__).parents[2]

VLLM = """
import json, os, subprocess, sys
import torch
class SamplingParams:
    def __init__(self, **settings):
        assert settings == dict(max_tokens=1, temperature=0.0, prompt_logprobs=0), settings
class Logprob:
    def __init__(self, value):
        self.logprob = value
class Output:
    def __init__(self, window):
        rows = [{t: Logprob(-float(t)), -1: Logprob(7.0)} for t in window[1:]]
        self.prompt_logprobs = [None, *rows]
class LLM:
    def __init__(self, **settings):
        if settings["trust_remote_code"]:
            print("unused")
            raise SystemExit("the engine's last words")
        settings["long"] = os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"]
        settings["space"] = os.environ["VLLM_CPU_KVCACHE_SPACE"]
        # As vLLM looks at a model's class.
        subprocess.run([sys.executable, "-c", "import json, torch"], check=True)
        json.dump(settings, open(os.environ["SEEN"], "w"))
    def generate(self, prompts, params):
        return [Output(p["prompt_token_ids"]) for p in prompts]
"""

HARNESS = """
import torch
def simple_evaluate(model, model_args, **job):
    assert model == "vllm" and job.pop("task_manager").include_path == job["tasks"][0]
    return {"results": {"given": {**model_args, **job}}, "higher_is_better": {}, "n-samples": {},
            "versions": {"t": torch.VERSION}, "samples": "left out"}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder whose modules must not be imported; stand-ins of the engines elsewhere."""
    libraries, folder = tmp_path / "libraries", tmp_path / "model"
    (libraries / "lm_eval").mkdir(parents=True)
    (libraries / "vllm.py").write_text(VLLM)
    (libraries / "torch.py").write_text("class VERSION: pass")
    (libraries / "lm_eval" / "__init__.py").write_text(HARNESS)
    (libraries / "lm_eval" / "tasks.py").write_text(
        "class TaskManager:\n    all_subtasks = ['mine']\n"
        "    def __init__(self, include_path, include_defaults=True):\n"
        "        self.include_path = include_path\n"
    )
    (folder / "mcmoe_vllm").mkdir(parents=True)
    for name in ("vllm", "torch", "json", "lm_eval", "os", "mcmoe_vllm/__init__"):
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / 'RAN')!r}, 'w'); raise SystemExit"
        )
    monkeypatch.chdir(folder)
    paths = (libraries, ROOT, ROOT / "kernels")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: ModuleSpec(name, None))
    yield folder
    assert not (tmp_path / "RAN").exists()


def test_losses_are_the_means_of_the_windows(here):
    tokens = torch.tensor([[9, 1, 3], [9, 4, 8]])
    losses = score_with_vllm(here, tokens, trust_remote_code=False, pruning="off")
    assert losses.tolist() == [2.0, 6.0] and losses.dtype == torch.float64
    assert json.loads(Path(os.environ["SEEN"]).read_text()) == {
        "model": str(here),
        "max_model_len": 4,
        "enforce_eager": True,
        "trust_remote_code": False,
        "enable_prefix_caching": False,
        "dtype": "auto",
        "additional_config": {"mcmoe": {"pruning": "off"}},
        "long": "1",
        "space": "1",
    }


def test_what_the_user_set_stays(here, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")
    score_with_vllm(here, torch.tensor([[9, 1]]), trust_remote_code=False)
    seen = json.loads(Path(os.environ["SEEN"]).read_text())
    assert seen["space"] == "9" and seen["additional_config"] == {}


def test_an_engine_that_fails_is_quoted(here):
    with pytest.raises(UserError, match=r"vLLM could not score .*:\nthe engine's last words$"):
        score_with_vllm(here, torch.tensor([[9, 1]]), trust_remote_code=True)


def test_tasks_are_given_to_the_harness(here):
    job = {
        "tasks": ["mine"],
        "num_fewshot": 2,
        "limit": 0.5,
        "include_path": "mine",
        "engine": {"x": 1},
    }
    found = tasks._run(str(here), job)
    assert found == {
        "results": {
            "given": {
                "pretrained": str(here),
                "x": 1,
                "tasks": ["mine"],
                "num_fewshot": 2,
                "limit": 0.5,
                "batch_size": "auto",
                "log_samples": False,
            }
        },
        "higher_is_better": {},
        "n-samples": {},
        "versions": {"t": "<class 'torch.VERSION'>"},
    }


ENDLESS = """
import os, subprocess, sys, time
class SamplingParams: pass
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(os.environ["SEEN"], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""
ASK = """
import signal
from mcmoe_vllm.evaluate.engine import run_engine_program
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have both ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
run_engine_program("vllm_program", {}, "nothing came back")
"""


def is_running(process):
    """A zombie that nobody has asked after is not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_an_engine_ends_with_the_one_who_asked(here, tmp_path, number):
    """And with it what it has started, and every file between them."""
    (tmp_path / "libraries" / "vllm.py").write_text(ENDLESS)
    (scratch := tmp_path / "scratch").mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    asking = subprocess.Popen([sys.executable, "-P", "-c", ASK], env=environment, stderr=-3)
    seen = Path(os.environ["SEEN"])
    wait_for(lambda: seen.exists() and len(seen.read_text().split()) == 2)
    processes = [int(process) for process in seen.read_text().split()]
    assert all(map(is_running, processes))
    asking.send_signal(number)
    ended = asking.wait(20)
    assert ended == -number or (number == signal.SIGINT and ended in (1, 130))
    wait_for(lambda: not any(map(is_running, processes)))
    assert not list(scratch.iterdir())


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_what_an_engine_leaves_running_is_ended(here, tmp_path):
    (tmp_path / "libraries" / "vllm.py").write_text(
        ENDLESS.replace("time.sleep(600)\n", "raise SystemExit('gone')\n").replace("600", "601")
    )
    with pytest.raises(UserError, match=":\ngone$"):
        score_with_vllm(here, torch.tensor([[9, 1]]), trust_remote_code=False)
    (_, child) = Path(os.environ["SEEN"]).read_text().split()
    wait_for(lambda: not is_running(child))


def test_a_loss_that_is_no_number_arrives_as_one(here, tmp_path):
    (tmp_path / "libraries" / "vllm.py").write_text(VLLM.replace("-float(t)", "float('nan')"))
    losses = score_with_vllm(here, torch.tensor([[9, 1, 3]]), trust_remote_code=False)
    assert losses.isnan().all()
