"""Results have a place before there is any work, and none is another's."""

import os

import pytest

from mcmoe_vllm import places
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.places import (
    WORK_INSIDE,
    output_folder,
    require_apart,
    require_changeable,
    require_result,
    require_work_folder,
    work_folder,
)


def test_a_file_that_can_be_written_is_none_of_the_model_and_none_that_is_read(tmp_path):
    text, old = tmp_path / "text", tmp_path / "old"
    text.write_text("read")
    old.write_text("replaced")
    require_result(tmp_path / "new", text)
    require_result(old, text, None)
    (tmp_path / "same").hardlink_to(text)
    for path in (text, tmp_path / "same", tmp_path / "x" / ".." / "text"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="is what the command reads"):
            require_result(path, old, text)
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "vocab.anything"):
        (model / name).write_text("{}")
    require_result(model / "new.json")
    for name in ("config.json", "vocab.anything"):
        with pytest.raises(UserError, match="in the folder of a model"):
            require_result(model / name)
    require_result("/dev/null")
    assert sorted(os.listdir(model)) == ["config.json", "vocab.anything"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is empty"),
        ("x" * 300, "File name too long"),
        ("a\0b", "embedded null"),
        ("file/x", "Not a directory"),
        ("absent/x", "the folder for x, does not exist"),
        (".", "is a folder"),
        ("folder/", "is a folder"),
        ("/proc/x", "no file can be made in /proc"),  # whatever its permissions say
    ],
)
def test_a_file_that_could_not_be_written_is_refused(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message):
        require_result(path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("spelling", ["out", "out/", "./out", "link", "link/", "absent", "."])
def test_an_output_folder_may_be_spelled_in_any_way(tmp_path, monkeypatch, spelling):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(tmp_path / "out" if spelling == "." else tmp_path)
    found = output_folder(spelling)
    assert found == tmp_path / ("absent" if spelling == "absent" else "out")
    work = work_folder(spelling)
    assert work == found.with_name(f"{found.name}.work")  # beside it, never in it
    require_apart(found, work)
    require_work_folder(work)
    assert not work.exists() and not os.listdir(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is empty"),
        ("full", "is not empty .it holds 'precious'.; choose another"),
        ("full/precious", "is a file"),
        ("a/b", "the folder for b, does not exist"),
        ("loop", "cannot be used"),
        ("a\0b", "cannot be used"),
        ("x" * 256, "too long"),
        (os.fsdecode(b"\xff"), "no UTF-8"),  # safetensors could not write there
        ("/", "is not empty"),
        ("/dev/null", "is a file"),
    ],
)
def test_output_folders_that_could_not_be_filled(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=message):
        output_folder(name)


def test_what_a_job_put_into_its_output_is_its_own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).touch()
    assert output_folder(tmp_path, ["b", "a", "c"]) == tmp_path
    with pytest.raises(UserError, match="holds 'b'"):
        output_folder(tmp_path, ["a"])


def test_a_new_disk_is_empty(tmp_path, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    with pytest.raises(UserError, match="not empty"):
        output_folder(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    assert output_folder(tmp_path) == tmp_path


def test_work_goes_into_an_output_that_nothing_can_stand_beside(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    inside = work_folder(out)
    assert inside == out / WORK_INSIDE
    require_apart(out, inside)
    monkeypatch.undo()
    assert work_folder(out) == tmp_path / "out.work"
    inside.mkdir()
    assert work_folder(out) == inside  # where it was begun, mounted or not
    inside.rmdir()
    monkeypatch.setattr(places.os, "access", lambda path, mode: path != tmp_path)
    assert work_folder(out) == inside


def test_work_for_a_pipe_goes_into_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert work_folder("/dev/null") == tmp_path / "mcmoe.work"
    assert work_folder("/dev/null", "w") == tmp_path / "w"


@pytest.mark.parametrize(
    ("output", "work", "model", "message"),
    [
        ("a", "a", "m", "both"),
        ("a/b", "a", "m", "the output .*a/b lies in the work directory"),
        ("a/b/c", "a", "m", "lies in"),
        ("a", "a/b/c", "m", "the work directory .* lies in the output"),
        ("m", "w", "m", "both"),
        ("m/a", "w", "m", "the output .* lies in the model"),
        ("a", "m/w", "m", "the work directory .* lies in the model"),
        ("link/a", "w", "m", "lies in the model"),
        ("a", "w", "w/m", "the model .* lies in the work directory"),
        ("m/../m/a", "w", "m", "lies in the model"),
        ("a", "a/w", "m", None),
        ("ab", "a", "m", None),  # not by the letters
        ("a", "a.work", "m", None),
    ],
)
def test_folders_do_not_lie_in_each_other(tmp_path, output, work, model, message):
    (tmp_path / "link").symlink_to("m")
    folders = [(tmp_path / name).resolve() for name in (output, work)]
    if message is None:
        require_apart(*folders, tmp_path / model)
    else:
        with pytest.raises(UserError, match=message):
            require_apart(*folders, tmp_path / model)


def test_a_linked_file_of_a_model_is_not_changed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    require_changeable(tmp_path / "config.json")
    (tmp_path / "linked.json").symlink_to("config.json")
    with pytest.raises(UserError, match="cp -rL"):
        require_changeable(tmp_path / "linked.json")
