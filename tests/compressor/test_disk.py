"""Files are read warily and written whole or not at all."""

import errno
import json
import os

import pytest

from mcmoe_vllm.disk import read_json, replacing, require_file, write_json
from mcmoe_vllm.errors import UserError, some


@pytest.fixture
def link_to_itself(tmp_path):
    (tmp_path / "loop.json").symlink_to("loop.json")
    return tmp_path / "loop.json"


def test_whatever_cannot_be_read_is_one_sentence(tmp_path, link_to_itself):
    digits = tmp_path / "digits.json"
    digits.write_text('{"a": ' + "9" * 5000 + "}")
    for path, message in (
        (digits, "digits.json is not valid JSON"),
        (link_to_itself, "loop.json cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        (digits / "x", "cannot be read: Not a directory"),
        ("a\0b", "is not valid JSON: embedded null"),
    ):
        with pytest.raises(UserError, match=message):
            read_json(path)


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with replacing(file) as new:
        assert new.parent == tmp_path and new != file
        new.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, 1)
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    with pytest.raises(KeyboardInterrupt), replacing(file) as new:
        new.write_text("half of i")
        raise KeyboardInterrupt
    assert json.loads(file.read_text()) == 1
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    file, flushed = tmp_path / "a.json", []

    def fsync(descriptor):
        assert not file.exists()
        flushed.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(file, "text")
    assert flushed == [len('"text"\n')]


def test_files_have_the_mode_that_the_user_set(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_nobody_can_put_a_link_in_the_way(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda size: "guessed")
    for name in (".a.json.partial", ".a.json.guessed.partial"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(OSError, match=os.strerror(errno.EEXIST)):
        write_json(tmp_path / "a.json", 1)
    assert victim.read_text() == "precious"


def test_files_in_folders_that_take_none_are_refused(tmp_path):
    require_file(tmp_path / "x.json")
    require_file("x.json")
    with pytest.raises(UserError, match="is a folder; name a file"):
        require_file(tmp_path)
    with pytest.raises(UserError, match="the folder for x.json, does not exist"):
        require_file(tmp_path / "gone" / "x.json")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the folder for x.json, does not exist"):
        require_file(tmp_path / "file" / "x.json")
    (tmp_path / "file").write_text("")
    require_file(tmp_path / "file")  # replaced


def test_long_lists_are_cut_and_the_rest_counted():
    assert some(["a", "b"], most=2) == "\n  - a\n  - b"
    assert some(["a", "b", "c", "d"], most=2) == "\n  - a\n  - b\n  - and 2 more"
