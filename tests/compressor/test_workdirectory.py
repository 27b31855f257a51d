"""An unfinished job can be taken up again, and nothing else is mistaken for one."""

import pytest
import torch

from mcmoe_vllm.compress.workdirectory import JOB_FILE, open_work_directory, progress_of
from mcmoe_vllm.errors import UserError

JOB = {"model": "m", "bits": 2.5}


def test_layers_and_hidden_states_come_back(tmp_path):
    work = open_work_directory(tmp_path / "work", JOB, resume=False)
    assert work.load_states("measure") is None
    work.save_layer("significance", 3, {"tokens": [1, 2]})
    assert work.load_layer("significance", 3) == {"tokens": [1, 2]}
    blocks = [torch.full((1, 4), float(i)) for i in range(12)]  # more than nine: order matters
    work.save_states("measure", 1, {"exact": [b + 100 for b in blocks]})
    work.save_states("measure", 2, {"exact": blocks, "changed": [b + 1 for b in blocks[:2]]})
    work.save_states("quantize", 1, {"compressed": blocks[:1]})
    again = open_work_directory(tmp_path / "work", JOB, resume=True)
    layer, found = again.load_states("measure")
    assert layer == 2 and sorted(found) == ["changed", "exact"]
    assert all(torch.equal(a, b) for a, b in zip(found["exact"], blocks, strict=True))
    assert len(found["changed"]) == 2
    assert again.load_states("quantize")[0] == 1
    left = sorted(f.name for f in (tmp_path / "work" / "hidden").iterdir())
    assert left == ["measure-00002.safetensors", "quantize-00001.safetensors"]


def test_half_written_files_are_not_seen(tmp_path):
    work = open_work_directory(tmp_path / "work", JOB, resume=False)
    (work.path / "hidden" / ".measure-00001.safetensors.partial").write_bytes(b"half")
    (work.path / "significance" / ".layer-000.json.partial").write_text("{")
    assert work.load_states("measure") is None
    assert progress_of(work.path) == "0 layers measured"


def test_progress_in_words(tmp_path):
    work = open_work_directory(tmp_path / "work", JOB, resume=False)
    work.save_layer("significance", 0, {})
    work.save_layer("significance", 1, {})
    assert progress_of(work.path) == "2 layers measured"
    work.save_layer("layers", 0, {})
    assert progress_of(work.path) == "1 layers quantized"


def test_unfinished_job_needs_resume(tmp_path):
    open_work_directory(tmp_path / "work", JOB, resume=False).save_layer("layers", 0, {})
    with pytest.raises(UserError, match=r"unfinished job .*1 layers quantized.*--resume"):
        open_work_directory(tmp_path / "work", JOB, resume=False)


def test_other_settings_are_refused_and_all_named(tmp_path):
    open_work_directory(tmp_path / "work", JOB, resume=False)
    with pytest.raises(UserError) as e:
        open_work_directory(tmp_path / "work", {"model": "n", "seed": 1}, resume=True)
    for part in ("bits was 2.5", "model was 'm', is now 'n'", "seed was None, is now 1"):
        assert part in str(e.value)


def test_job_killed_while_it_made_its_folders_can_be_resumed(tmp_path):
    work = open_work_directory(tmp_path / "work", JOB, resume=False)
    (work.path / "hidden").rmdir()
    (work.path / "layers").rmdir()
    again = open_work_directory(tmp_path / "work", JOB, resume=True)
    again.save_states("measure", 1, {"exact": [torch.zeros(1)]})
    again.save_layer("layers", 0, {})


def test_resume_without_a_job_starts_one(tmp_path):
    open_work_directory(tmp_path / "work", JOB, resume=True)
    assert (tmp_path / "work" / JOB_FILE).exists()
    (tmp_path / "empty").mkdir()
    open_work_directory(tmp_path / "empty", JOB, resume=False)


def test_folders_and_files_of_others_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        open_work_directory(tmp_path / "file", JOB, resume=False)
    with pytest.raises(UserError, match="is not empty and holds no job"):
        open_work_directory(tmp_path, JOB, resume=True)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("content", ["[]", "{", "3"])
def test_damaged_job_file_is_refused(tmp_path, content):
    open_work_directory(tmp_path / "work", JOB, resume=False)
    (tmp_path / "work" / JOB_FILE).write_text(content)
    with pytest.raises(UserError, match=r"holds no job|not valid JSON"):
        open_work_directory(tmp_path / "work", JOB, resume=True)


def test_remove(tmp_path):
    work = open_work_directory(tmp_path / "work", JOB, resume=False)
    work.remove()
    assert not work.path.exists()
    work.remove()
