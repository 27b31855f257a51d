"""An unfinished job can be taken up again, by one process at a time, and nothing else is mistaken
for one."""

import json
import os
import signal
import stat
import subprocess
import sys

import pytest
import torch

from mcmoe_vllm.compress import workdirectory
from mcmoe_vllm.compress.workdirectory import (
    LOCK_FILE,
    REMOVED_FILE,
    moved_into,
    open_work_directory,
    progress_of,
    read_job,
    require_startable,
)
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.places import JOB_FILE

JOB = {"model": "m", "bits": 2.5}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "work"


def begin(folder, job=JOB):
    with open_work_directory(folder, job, resume=False) as work:
        return work


def resume(folder, job=JOB):
    with open_work_directory(folder, job, resume=True) as work:
        return work


def files(folder):
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


def test_layers_and_hidden_states_come_back(folder):
    work = begin(folder)
    assert work.load_states("measure") is None
    work.save_layer("significance", 3, {"tokens": [1, 2], "by": {10: 0.1, 2: 1e-30}})
    assert work.load_layer("significance", 3) == {"tokens": [1, 2], "by": {"10": 0.1, "2": 1e-30}}
    blocks = [torch.full((1, 4), float(i)) for i in range(12)]  # more than nine: order matters
    work.save_states("measure", 1, {"exact": [b + 100 for b in blocks]})
    work.save_states("measure", 2, {"exact": blocks, "changed": [b + 1 for b in blocks[:2]]})
    work.save_states("quantize", 1, {"compressed": blocks[:1]})
    again = resume(folder)
    layer, found = again.load_states("measure")
    assert layer == 2 and sorted(found) == ["changed", "exact"]
    assert all(torch.equal(a, b) for a, b in zip(found["exact"], blocks, strict=True))
    assert len(found["changed"]) == 2
    assert again.load_states("quantize")[0] == 1
    left = sorted(f.name for f in (folder / "hidden").iterdir())
    assert left == ["measure-00002.safetensors", "quantize-00001.safetensors"]


def test_progress_in_words(folder):
    work = begin(folder)
    work.save_layer("significance", 0, {})
    work.save_layer("significance", 1, {})
    assert progress_of(folder) == "2 layers measured"
    work.save_layer("layers", 0, {})
    assert progress_of(folder) == "1 layers quantized"


def test_unfinished_job_needs_resume(folder):
    begin(folder).save_layer("layers", 0, {})
    with pytest.raises(UserError, match=r"unfinished job .*1 layers quantized.*--resume"):
        begin(folder)


@pytest.mark.parametrize("made", [None, "empty", "finished"])
def test_nothing_to_resume_is_said(folder, made):
    if made == "empty":
        folder.mkdir()
    elif made == "finished":
        begin(folder).remove()
    with pytest.raises(UserError, match="nothing to resume.*leave --resume out"):
        resume(folder)
    assert folder.exists() == (made == "empty")
    begin(folder)


def test_other_settings_are_refused_and_all_named(folder):
    begin(folder, {**JOB, "model_fingerprint": "ab", "plan": {"a": 1}})
    with pytest.raises(UserError) as e:
        resume(folder, {"model": "n", "seed": 1, "model_fingerprint": "cd", "plan": None})
    for part in (
        "bits was 2.5", "model was 'm', is now 'n'", "seed was None, is now 1",
        "weights or config.json are others", "the plan holds something else",
    ):  # fmt: skip
        assert part in str(e.value)
    assert "ab" not in str(e.value).replace(str(folder), "")  # a hash tells nobody anything
    resume(folder, {**JOB, "model_fingerprint": "ab", "plan": {"a": 1}})  # the lock is free


def test_the_number_of_threads_is_recorded_and_announced(folder, monkeypatch):
    before = torch.get_num_threads()
    assert begin(folder).job.threads == (before,)
    assert resume(folder).notes == ()
    monkeypatch.setattr(torch, "get_num_threads", lambda: before + 1)
    work = resume(folder)
    assert f"{before} threads and goes on with {before + 1}" in work.notes[0]
    assert work.job.threads == (before, before + 1) and resume(folder).notes == ()


OPEN = """
import sys, time
from pathlib import Path
from mcmoe_vllm.compress.workdirectory import open_work_directory
with open_work_directory(Path(sys.argv[1]), {"model": "m", "bits": 2.5}, False):
    print("open", flush=True)
    time.sleep(100)
"""


def test_one_process_at_a_time_and_a_kill_frees_the_folder(folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, "-c", OPEN, folder], stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdout.readline() == "open\n"
        for attempt in (begin, resume, lambda f: require_startable(f, True)):
            with pytest.raises(UserError, match="another process works in"):
                attempt(folder)
        other.send_signal(signal.SIGKILL)
        other.wait()
    resume(folder)


def test_a_folder_that_is_removed_meanwhile_is_not_worked_in(folder):
    """The lock was taken of a file that the process before has deleted just now."""
    work = begin(folder)
    real = workdirectory.fcntl.flock

    def late(descriptor, how):
        (folder / LOCK_FILE).unlink()
        real(descriptor, how)

    workdirectory.fcntl.flock = late
    try:
        with pytest.raises(UserError, match="another process works in"):
            resume(folder)
    finally:
        workdirectory.fcntl.flock = real
    assert work.path.exists()


def test_disks_without_locks_are_refused(folder, monkeypatch):
    def fail(descriptor, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(workdirectory.fcntl, "flock", fail)
    with pytest.raises(UserError, match="cannot be locked .Function not implemented.*--work-dir"):
        begin(folder)


def test_only_its_owner_sees_the_calibration_text(folder):
    before = os.umask(0o022)
    try:
        work = begin(folder)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (folder, *folder.iterdir())}
    assert modes["work"] == modes["hidden"] == modes["layers"] == 0o700
    assert modes["checkpoint"] == 0o755  # which becomes the output
    assert work.path == folder


# What a kill can leave, at each of the moments at which it can come


def test_killed_while_it_wrote_its_first_file(folder):
    folder.mkdir()
    (folder / f".{JOB_FILE}.0123456789abcdef.partial").write_text("{")
    (folder / LOCK_FILE).touch()
    begin(folder)
    assert files(folder) == [JOB_FILE, LOCK_FILE]


def test_killed_before_its_first_file(folder):
    folder.mkdir()
    (folder / LOCK_FILE).touch()
    begin(folder)


def test_killed_while_it_made_its_folders(folder):
    work = begin(folder)
    (folder / "hidden").rmdir()
    (folder / "layers").rmdir()
    again = resume(folder)
    again.save_states("measure", 1, {"exact": [torch.zeros(1)]})
    again.save_layer("layers", 0, {})
    assert work.path == again.path


def test_killed_while_it_wrote(folder):
    """Half files are no results, and do not travel with the output."""
    work = begin(folder)
    half = [
        work.checkpoint / ".model-00001-of-00003.safeten.0123456789abcdef.partial",
        work.checkpoint / ".tmpAb12_z",  # safetensors'
        folder / "hidden" / ".measure-00001.safetensors.0123456789abcdef.partial",
        folder / "significance" / ".layer-000.json.0123456789abcdef.partial",
    ]
    for file in half:
        file.write_text("{")
    assert work.load_states("measure") is None and progress_of(folder) == "0 layers measured"
    resume(folder)
    assert not any(file.exists() for file in half)


@pytest.mark.parametrize("moment", range(8))
def test_killed_while_it_removed_itself(folder, moment, monkeypatch):
    """However far it came: the next job deletes the rest and starts; nothing is left to resume."""
    work = begin(folder)
    work.save("finetuned", {})
    work.save_layer("layers", 0, {})
    work.save_states("measure", 1, {"exact": [torch.zeros(1)]})
    (folder / "plan.json").write_text("{}")
    left = iter([None] * moment)

    def dies(real):
        def call(*arguments, **named):
            if next(left, "dead") == "dead":
                raise KeyboardInterrupt
            return real(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name in ("unlink", "rmdir"):
            patch.setattr(f"pathlib.Path.{name}", dies(getattr(type(folder), name)))
        with pytest.raises(KeyboardInterrupt):
            work.remove()
    assert (folder / REMOVED_FILE).exists()
    begin(folder)
    assert files(folder) == [JOB_FILE, LOCK_FILE]


def test_remove(folder):
    work = begin(folder)
    work.save_states("measure", 1, {"exact": [torch.zeros(1)]})
    assert work.remove() == [] and not folder.exists()
    assert work.remove() == []


def test_only_what_the_job_made_is_removed(folder):
    work = begin(folder)
    work.save_layer("layers", 0, {})
    foreign = ["notes.txt", "checkpoint/kept.safetensors", "hidden/mine", "layers/layer.json"]
    for name in foreign:
        (folder / name).write_text("precious")
    assert work.remove() == ["checkpoint", "hidden", "layers", "notes.txt"]
    assert files(folder) == sorted(foreign)


def test_a_folder_of_the_users_stays(folder):
    folder.mkdir()
    begin(folder)
    resume(folder).remove()
    assert folder.is_dir() and not os.listdir(folder)


def test_folders_and_files_of_others_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        begin(tmp_path / "file")
    for start in (begin, resume):
        with pytest.raises(UserError, match="is not empty and holds no job"):
            start(tmp_path)
    assert os.listdir(tmp_path) == ["file"]
    (tmp_path / "file").rename(tmp_path / "plan.json")  # as a job would leave it, but none has
    with pytest.raises(UserError, match="is not empty and holds no job"):
        begin(tmp_path)
    assert (tmp_path / "plan.json").read_text() == "x"


# Damage


def _edit(change):
    def edit(text):
        found = json.loads(text)
        change(found)
        return json.dumps(found)

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text[:20],
        lambda text: "3",
        lambda text: "",
        lambda text: "\0" * 100,
        _edit(lambda job: job.update(work_version=2)),
        _edit(lambda job: job.update(threads=["2"])),
        _edit(lambda job: job.update(flags=None)),
        _edit(lambda job: job.update(files=[1])),
        _edit(lambda job: job.update(moving=1)),
        _edit(lambda job: job.pop("description")),
        _edit(lambda job: job.update(more=1)),
    ],
)
def test_a_damaged_job_file_is_one_sentence(folder, damage):
    begin(folder)
    (folder / JOB_FILE).write_text(damage((folder / JOB_FILE).read_text()))
    with pytest.raises(UserError, match=r"start again|not valid JSON"):
        resume(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text[:-9],
        lambda text: text.replace("7", "8"),  # still JSON of the right kind
        lambda text: json.dumps({"tokens": [7]}),
    ],
)
def test_a_damaged_layer_is_one_sentence(folder, damage):
    work = begin(folder)
    work.save_layer("layers", 0, {"tokens": [7]})
    file = folder / "layers" / "layer-000.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError, match=r"layer-000.json is (damaged; remove|not valid JSON)"):
        work.load_layer("layers", 0)


@pytest.mark.parametrize("kept", [0, 4, 40, 90])
def test_damaged_states_are_one_sentence(folder, kept):
    work = begin(folder)
    work.save_states("measure", 1, {"a": [torch.zeros(4)]})
    file = folder / "hidden" / "measure-00001.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"is damaged .*; remove .* to start again"):
        work.load_states("measure")


def test_states_whose_bits_rot_are_refused(folder):
    """Wherever it happens in the file: what comes back is what was saved, or nothing is."""
    work = begin(folder)
    states = {"a": [torch.arange(6, dtype=torch.bfloat16).view(2, 3)], "b": [torch.ones(1)]}
    work.save_states("measure", 1, states)
    file = folder / "hidden" / "measure-00001.safetensors"
    sound, refused = file.read_bytes(), []
    for place, byte in enumerate(sound):
        file.write_bytes(sound[:place] + bytes([byte ^ 4]) + sound[place + 1 :])
        try:
            _, found = work.load_states("measure")
        except UserError as e:
            assert "is damaged" in str(e) and "start again" in str(e)
            refused.append(place)
        else:
            assert found.keys() == states.keys()
            for name, blocks in found.items():
                assert blocks[0].dtype == states[name][0].dtype
                assert torch.equal(blocks[0], states[name][0])
    assert set(range(len(sound) - 16, len(sound))) <= set(refused)  # the numbers themselves


def test_what_was_moved_is_known(folder, tmp_path):
    work = begin(folder)
    output = tmp_path / "out"
    assert moved_into(output, folder) == moved_into(output, tmp_path / "absent") == ()
    work.note_moving(output, ["a", "b/c", "b/d"])
    assert moved_into(output, folder) == ("a", "b") and moved_into(tmp_path, folder) == ()
    output.mkdir()
    (output / ".a.0123456789abcdef.partial").touch()
    (output / ".other.0123456789abcdef.partial").touch()
    assert moved_into(output, folder) == ("a", "b", ".a.0123456789abcdef.partial")
    assert read_job(folder).files == ("a", "b/c", "b/d")
    assert resume(folder).job.moving == str(output)
