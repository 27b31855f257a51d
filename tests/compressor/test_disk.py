"""Files are read warily and written whole or not at all."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from mcmoe_vllm import disk
from mcmoe_vllm.disk import (
    is_partial,
    is_stream,
    open_regular,
    read_json,
    replacing,
    require_regular,
    write_json,
)
from mcmoe_vllm.errors import MOST_SHOWN, UserError, brief, printable, some


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
        ("a\0b", "cannot be read: embedded null"),
        (tmp_path, "is a folder, a file is needed"),
        (tmp_path / "absent", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            read_json(path)


@pytest.mark.parametrize("read", [read_json, open_regular, require_regular])
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "endless device", "socket"])
def test_what_may_never_end_is_not_read(tmp_path, read, kind):
    place = tmp_path / "x"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(place))
    elif kind == "endless device":
        place.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe")
        place.symlink_to("pipe") if kind.startswith("link") else os.rename(tmp_path / "pipe", place)
    with pytest.raises(UserError, match="is a pipe or a device"):
        read(place)


def test_a_pipe_that_takes_a_files_place_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(disk, "require_regular", lambda *_: 0)  # it was a file a moment ago
    with pytest.raises(UserError, match="is a pipe"):
        open_regular(tmp_path / "x")


def test_reading_is_bounded(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("[1, 2]")
    with open_regular(tmp_path / "x", 6) as f:
        assert f.read() == b"[1, 2]"
    with pytest.raises(UserError, match="has 6 bytes or more, at most 5 are read"):
        open_regular(tmp_path / "x", 5)
    monkeypatch.setattr(disk, "MOST_JSON_BYTES", 5)
    with pytest.raises(UserError, match="at most 5"):
        read_json(tmp_path / "x")
    with pytest.raises(UserError, match="at most 5"):  # one that does not tell its size
        read_json("/proc/version")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e400"])
def test_numbers_that_json_cannot_hold_are_neither_read_nor_written(tmp_path, number):
    (tmp_path / "a.json").write_text(f'{{"a": [{number}]}}')
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "a.json")
    value = read_json(tmp_path / "a.json", finite=False)
    with pytest.raises(UserError, match="NaN or infinite"):
        write_json(tmp_path / "b.json", value)
    assert os.listdir(tmp_path) == ["a.json"]


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
    (tmp_path / "a.json").chmod(0o600)  # the user's choice for this file
    write_json(tmp_path / "a.json", 2)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a\nb"])
def test_every_name_that_a_file_can_have_can_be_written(tmp_path, name):
    write_json(tmp_path / name, 1)
    assert os.listdir(tmp_path) == [name]


def test_the_name_of_an_unfinished_file_tells_what_it_was(tmp_path):
    for name in ("job.json", "x" * 255, "a\nb"):
        with replacing(tmp_path / name) as partial:
            partial.write_text("")
            assert is_partial(partial.name) and is_partial(partial.name, name)
            assert not is_partial(partial.name, "other") and not is_partial(name)
    assert not is_partial(".notes.partial")  # somebody else's


def test_nobody_can_put_a_link_in_the_way(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda size: "guessed")
    for name in (".a.json.partial", ".a.json.guessed.partial"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(OSError, match=os.strerror(errno.EEXIST)):
        write_json(tmp_path / "a.json", 1)
    assert victim.read_text() == "precious"


def test_a_pipe_is_written_to(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_json(pipe, [1])
    reader.join(10)
    assert got == ["[\n  1\n]\n"] and pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_device_is_written_to_and_stays_one(tmp_path):
    place = tmp_path / "null"
    place.symlink_to("/dev/null")
    write_json(place, 1)
    assert is_stream(place) and place.is_symlink() and os.listdir(tmp_path) == ["null"]
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_json("/dev/full", 1)


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1", "out"])
def test_standard_output_is_written_to_whatever_it_is(tmp_path, name):
    """Behind what was printed, before what will be, also where it is a file, by its name or not."""
    program = (
        "import sys; from mcmoe_vllm.disk import write_json\n"
        "print('before'); write_json(sys.argv[1], 7); print('after')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with (tmp_path / "out").open("w") as out:
        subprocess.run(
            [sys.executable, "-c", program, name], stdout=out, cwd=tmp_path, env=environment,
            check=True,
        )  # fmt: skip
    assert (tmp_path / "out").read_text() == "before\n7\nafter\n"
    assert os.listdir(tmp_path) == ["out"]


def test_links_are_neither_replaced_nor_followed(tmp_path):
    (tmp_path / "target").write_text("precious")
    for name, target, message in (
        ("link", "target", "is a link to .*target; name that file"),
        ("gone", "nowhere", "leads nowhere"),
        ("loop", "loop", "cannot be written: Too many levels"),
        ("folder", ".", "is a folder"),
    ):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(UserError, match=message):
            write_json(tmp_path / name, 1)
        assert (tmp_path / name).is_symlink()
    assert (tmp_path / "target").read_text() == "precious"


def test_no_disk_is_overwritten(tmp_path, monkeypatch):
    (tmp_path / "disk").write_text("a file system")
    monkeypatch.setattr("stat.S_ISREG", lambda mode: False)
    with pytest.raises(UserError, match="is a disk or a socket"):
        write_json(tmp_path / "disk", 1)


def test_terminals_show_what_they_would_obey():
    assert printable("a\x1b[31mb\r\x9b\u202ec\ud800") == r"a\x1b[31mb\r\x9b\u202ec\ud800"
    assert printable("tab\tline\né 中") == "tab\tline\né 中"


@pytest.mark.parametrize(
    "value", ["x" * 5000, "é" * 5000, "a b " * 2000, "\x1b" * 900, "line\n" * 1000, "中 " * 999]
)
def test_messages_are_brief_and_keep_their_remedy(value):
    shown = brief(f"quant_method is {value}, allowed are mcmoe; compress the model again")
    assert len(shown.encode()) <= MOST_SHOWN
    assert shown.startswith("quant_method is ") and shown.endswith("; compress the model again")


def test_messages_that_are_brief_are_left_alone():
    path = "/".join(["folder"] * 60)
    assert brief(f"{path} does not exist") == f"{path} does not exist"


def test_long_lists_are_cut_and_the_rest_counted():
    assert some(["a", "b"], most=2) == "\n  - a\n  - b"
    assert some(["a", "b", "c", "d"], most=2) == "\n  - a\n  - b\n  - and 2 more"
