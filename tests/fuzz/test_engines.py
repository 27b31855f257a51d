"""Every chosen damage is done, and the harness would see numbers that are not the sound ones."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch

from mcmoe_vllm.errors import UserError
from tests.conftest import ROOT
from tests.fuzz import engines
from tests.fuzz.damages import DAMAGES, FLIPPED, PRUNED, SOUND, damaged, make_folder
from tests.fuzz.engines import (
    CRASHED,
    ERROR,
    LOADERS,
    OTHER,
    REFUSED,
    SAME,
    is_fault,
    judge,
    refusal,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("sound") / "folder")


def content(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_every_damage_makes_another_folder(sound, tmp_path):
    before, seen = content(sound), []
    for name in DAMAGES:
        found = content(damaged(sound, tmp_path / "m", name))
        assert (found == before) == (name == SOUND), name
        assert found not in seen, name
        seen.append(found)
    assert content(sound) == before


# What headers and config.json do not tell; values and hashes are compared while tensors are read.
TOLD_LATER = {
    *(SOUND, PRUNED, FLIPPED, "manifest absent", "stray file", "norm NaN", "norm NaN, signed"),
    *("scales NaN, signed", "scales negative, signed", "expert zeros out of range, signed"),
}


@pytest.mark.vllm
def test_most_damages_are_refused_before_a_tensor_is_read(sound, tmp_path):
    completeness = pytest.importorskip("mcmoe_vllm.plugin.completeness")
    accepted = set()
    for name in DAMAGES:
        with contextlib.suppress(UserError):
            completeness.open_whole(damaged(sound, tmp_path / "m", name), torch.nn.Module())
            accepted.add(name)
    assert accepted == TOLD_LATER


def test_other_numbers_are_told_from_the_sound_ones():
    sound = [-1.0, -2.0]
    assert judge({"logprobs": [-1.0, -2.000001]}, sound)["verdict"] == SAME
    for wrong in ([-1.0, -2.001], [float("nan"), -2.0], [-1.0, float("nan")], [-1e30, -2.0]):
        assert judge({"logprobs": wrong}, sound)["verdict"] == OTHER
    assert judge({"verdict": CRASHED, "said": ""}, sound)["verdict"] == CRASHED


def test_what_is_a_fault():
    for loader in LOADERS:
        faults = {
            name: {v for v in (REFUSED, ERROR, SAME, OTHER, CRASHED) if is_fault(name, loader, v)}
            for name in ("norm missing", SOUND, PRUNED, FLIPPED)
        }
        assert faults["norm missing"] == {OTHER, CRASHED}
        assert faults[SOUND] == {REFUSED, ERROR, OTHER, CRASHED}
        assert faults[PRUNED] == {REFUSED, ERROR, SAME, CRASHED}
        assert faults[FLIPPED] == ({CRASHED} if loader == "auto" else {OTHER, CRASHED})


def test_a_refusal_is_told_from_an_error():
    try:
        try:
            raise UserError("the folder is incomplete")
        except UserError as e:
            raise RuntimeError("engine failed") from e
    except RuntimeError as e:
        assert refusal(e) == {"verdict": REFUSED, "said": "UserError: the folder is incomplete"}
    assert refusal(KeyError("x"))["verdict"] == ERROR


@pytest.mark.parametrize("then", ["raise UserError('no')", "os._exit(3)", "time.sleep(99)"])
def test_an_engine_that_fails_is_an_outcome(tmp_path, monkeypatch, then):
    def score(folder, loader):
        exec(f"import os, time\nfrom mcmoe_vllm.errors import UserError\n{then}")

    monkeypatch.setattr(engines, "score", score)
    monkeypatch.setattr(engines, "SECONDS", 0.5)
    expected = {"r": REFUSED, "o": CRASHED, "t": engines.HANGS}[then[0]]
    assert engines.run_engine(tmp_path, "auto", tmp_path)["verdict"] == expected


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.nightly
def test_a_real_engine_refuses_or_serves_the_sound_numbers(tmp_path):
    pytest.importorskip("vllm")
    names = [SOUND, PRUNED, "norm missing, signed", "scales NaN, signed", "stray file"]
    command = [sys.executable, "-m", "tests.fuzz.engines", "--json", str(tmp_path / "found.json")]
    subprocess.run([*command, "--only", *names], cwd=ROOT, check=True, timeout=600)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["engines"] == 2 * len(names) and not found["faults"]
