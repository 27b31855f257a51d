"""A finished checkpoint gets to its place whole, whatever that is and whenever it is killed."""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from mcmoe_vllm.compress import publish
from mcmoe_vllm.compress.publish import move_into_place, require_free_space
from mcmoe_vllm.compress.workdirectory import moved_into, open_work_directory
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.places import output_folder

FILES = (
    "config.json",
    "model-00001-of-00001.safetensors",
    "templates/tool.jinja",
    "tokenizer.json",
)


class Killed(BaseException):
    pass


@pytest.fixture
def place(tmp_path):
    return tmp_path / "out"


def start(tmp_path, resume=False):
    work = open_work_directory(tmp_path / "work", {}, resume)
    if not resume:
        for name in FILES:
            (work.checkpoint / name).parent.mkdir(exist_ok=True)
            (work.checkpoint / name).write_text(name)
    return work


def contents(folder):
    return {
        f.relative_to(folder).as_posix(): f.read_text() for f in folder.rglob("*") if f.is_file()
    }


WHOLE = {name: name for name in FILES}


def other_disk(monkeypatch):
    """Renaming out of the work directory fails as it does between disks."""
    real = Path.rename

    def rename(self, target):
        if "work" in self.parts:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_the_output_is_whole_and_the_work_is_gone(tmp_path, place, monkeypatch, exists, apart):
    if apart:
        other_disk(monkeypatch)
    if exists:
        place.mkdir(mode=0o750)
        inode = place.stat().st_ino
    with start(tmp_path) as work:
        move_into_place(work, place)
        assert contents(place) == WHOLE
        assert work.remove() == [] and not work.path.exists()
    if exists:  # filled: a mount point, or somebody's working folder, is not replaced
        assert place.stat().st_ino == inode and stat.S_IMODE(place.stat().st_mode) == 0o750


def test_config_comes_last(tmp_path, place, monkeypatch):
    place.mkdir()
    moved = []
    real = publish._move
    monkeypatch.setattr(publish, "_move", lambda a, b: moved.append(b.name) or real(a, b))
    with start(tmp_path) as work:
        move_into_place(work, place)
    assert moved[-1] == "config.json" and len(moved) == 4


def kill_after(monkeypatch, moments):
    """Be killed at the n-th of all calls that change something on the disk."""
    left = iter([None] * moments)

    def dies(real):
        def call(*arguments, **named):
            if next(left, "dead") == "dead":
                raise Killed
            return real(*arguments, **named)

        return call

    for owner, name in (
        (os, "replace"), (shutil, "copyfile"), (Path, "mkdir"), (Path, "unlink"), (Path, "rename"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, dies(getattr(owner, name)))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_killed_anywhere_it_is_finished_by_resume(tmp_path, place, exists, apart):
    for moments in range(100):
        for folder in (place, tmp_path / "work"):
            shutil.rmtree(folder, ignore_errors=True)
        if exists:
            place.mkdir()
        with pytest.MonkeyPatch.context() as patch, start(tmp_path) as work:
            kill_after(patch, moments)
            if apart:
                other_disk(patch)
            try:
                move_into_place(work, place)
                break
            except Killed:
                pass
        half = contents(place) if place.exists() else {}
        assert "config.json" not in half or {*half} >= {*FILES}
        own = moved_into(place, work.path)
        assert output_folder(place, own) == place  # what lies there is known to be the job's
        with pytest.MonkeyPatch.context() as patch, start(tmp_path, resume=True) as work:
            if apart:
                other_disk(patch)
            move_into_place(work, place)
            work.remove()
        assert contents(place) == WHOLE and not work.path.exists()
    assert moments > 1 + 3 * exists


def test_files_of_others_are_left_and_said(tmp_path, place):
    place.mkdir()
    with start(tmp_path) as work:
        (place / "notes").write_text("precious")
        (place / "tokenizer.json").write_text("precious")  # put there while the job ran
        with pytest.raises(UserError, match=r"tokenizer.json is there already; remove it"):
            move_into_place(work, place)
        assert (place / "tokenizer.json").read_text() == "precious"
        (place / "tokenizer.json").unlink()
        move_into_place(work, place)
    assert contents(place) == {**WHOLE, "notes": "precious"}


def test_another_output_than_the_one_begun_is_refused(tmp_path, place):
    with start(tmp_path) as work:
        work.note_moving(place, FILES)
        with pytest.raises(UserError, match="was being moved to .*out .* give that"):
            move_into_place(work, tmp_path / "other")
        shutil.rmtree(work.checkpoint)
        place.mkdir()
        with pytest.raises(UserError, match="lacks 4 files: config.json"):
            move_into_place(work, place)


def test_room_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
    work, output = tmp_path / "work", tmp_path / "disk" / "out"
    (work / "checkpoint").mkdir(parents=True)
    output.parent.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    require_free_space(work, 1000, output, 2000)  # on one disk it is only renamed
    with pytest.raises(UserError, match=r"the disk of .*work has 1000 B free, .*--work-dir"):
        require_free_space(work, 1001, output, 0)
    (work / "checkpoint" / "model-00001-of-00002.safetensors").write_bytes(b"x" * 100)
    require_free_space(work, 1100, output, 0)  # written before the job was stopped
    monkeypatch.setattr(publish, "_disk", str)
    with pytest.raises(UserError, match="the disk of .*out has"):
        require_free_space(work, 0, output, 2000)
