"""A job killed at random moments ends like one that nobody stopped, and the harness would see if it
did not; `make fuzz` kills as many as one likes."""

import json
from pathlib import Path

import pytest

import mcmoe_vllm.compress.pipeline  # noqa: F401  # or every child imports it
from tests.fuzz import kills
from tests.fuzz.kills import Inputs, judge, run, run_undisturbed, snapshot, try_job


@pytest.fixture
def inputs(tiny_models, calibration_text, tmp_path):
    size = ("--samples", "2", "--sequence-length", "32", "--recipe", "paper", "--method", "rtn")
    absent = tmp_path / "absent"
    return Inputs(tiny_models("mixtral"), calibration_text, absent, absent, size, False)


def test_a_killed_job_ends_like_an_undisturbed_one(inputs):
    undisturbed = run_undisturbed(inputs, "quantize")
    job = try_job(inputs, "quantize", undisturbed, seed=0, number=5)  # killed near the middle first
    assert job.verdict == "identical" and job.moments, job


def write_output(folder: Path, **report) -> Path:
    output = folder / "out"
    output.mkdir(parents=True)
    (output / "weights").write_bytes(b"\0" * 9)
    (output / "report.json").write_text(json.dumps(report))
    return output


def test_times_are_no_difference(tmp_path):
    first = write_output(tmp_path / "a", seconds=1.5, layers=[{"seconds": 0.1, "loss": 2}])
    second = write_output(tmp_path / "b", seconds=2.5, layers=[{"seconds": 0.3, "loss": 2}])
    assert judge(0, second.parent, second, snapshot(first)) == ("identical", "")


@pytest.mark.parametrize(
    ("verdict", "spoil"),
    [
        ("different", lambda output: (output / "weights").write_bytes(b"\0" * 8 + b"\1")),
        ("different", lambda output: (output / "weights").chmod(0o600)),
        ("different", lambda output: (output / "weights").unlink()),
        ("different", lambda output: (output / ".config.json.0.partial").touch()),
        ("different", lambda output: (output / "report.json").write_text('{"loss": 3}')),
        ("left behind", lambda output: (output.parent / "out.work").mkdir()),
    ],
)
def test_what_is_not_as_it_was_is_seen(tmp_path, verdict, spoil):
    expected = snapshot(write_output(tmp_path / "a", loss=2))
    output = write_output(tmp_path / "b", loss=2)
    spoil(output)
    assert judge(0, output.parent, output, expected)[0] == verdict


@pytest.mark.parametrize(("code", "verdict"), [(2, "refused"), (1, "crashed"), (None, "crashed")])
def test_a_job_without_a_result_is_counted(tmp_path, code, verdict):
    assert judge(code, tmp_path, tmp_path / "out", {}) == (verdict, "")


def test_exit_codes_of_a_child(inputs, tmp_path, monkeypatch):
    log = tmp_path / "log"
    assert run(inputs, ["inspect", tmp_path / "absent"], log) == 2
    assert "is not a folder" in log.read_text()
    assert run(inputs, ["doctor"], log, seconds=0) is None
    monkeypatch.setattr("mcmoe_vllm.cli.main", lambda arguments: 1 // 0)
    assert run(inputs, ["doctor"], log) == kills.TRACEBACK
    assert "ZeroDivisionError" in log.read_text()
