"""However a command ends, its exit code and one line say so, and nothing half done stays."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest

from mcmoe_vllm import cli
from mcmoe_vllm.compress import pipeline
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.report.console import Console


def start(body, shell="", **how):
    """A process in which `mcmoe doctor` runs `body`; shell: what its streams are redirected to."""
    program = (
        "import os, sys, time\n"
        "from mcmoe_vllm import cli\n"
        "from mcmoe_vllm.disk import replacing, write_json\n"
        f"def command(parsed):\n{textwrap.indent(body, '    ')}\n"
        "cli.COMMANDS['doctor'] = command\n"
        "sys.exit(cli.main(['doctor'] if len(sys.argv) == 1 else sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment.pop("PYTHONUNBUFFERED", None)  # with it, argparse itself hides what fails
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    arguments = how.pop("arguments", "")
    return subprocess.Popen(
        ["bash", "-c", f'exec "$0" -c "$1" {arguments} {shell}', sys.executable, program],
        text=True,
        env=environment,
        **how,
    )


def end(*arguments, **how):
    with start(*arguments, **how) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


MUCH = "for _ in range(100000): print('a line')"


@pytest.mark.parametrize("body", [MUCH, "print('little')"])
def test_a_full_device_is_one_sentence(body):
    code, _, err = end(body, "> /dev/full")
    assert code == 2
    assert err == "error: reading or writing failed: No space left on device\n"


@pytest.mark.parametrize("arguments", ["doctor", "--help"])
def test_when_nobody_reads_any_more_it_ends_quietly(arguments):
    with start(MUCH, arguments=arguments) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 141 and err == ""


def test_errors_that_nobody_can_be_told_keep_their_exit_code():
    for shell in ("2> /dev/full", "> /dev/full 2> /dev/full"):
        assert end("print('x')\nraise cli.UserError('wrong')", shell)[0] == 2


def test_tables_end_as_quietly():
    body = "from mcmoe_vllm.report.console import Console\nConsole().print('a line\\n' * 100000)"
    with start(body) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 141 and err == ""


def test_closed_streams_are_not_taken_for_files(tmp_path):
    """The first file that a process opens gets the number of the stream that it lacks."""
    body = "write_json('x', 1)\nprint('result')\nraise cli.UserError('wrong')"
    for shell in (">&-", "2>&-", "<&- >&- 2>&-"):
        code, out, err = end(body, shell, cwd=tmp_path)
        assert code == 2 and (tmp_path / "x").read_text() == "1\n"
        assert out == ("" if ">&- " in shell or shell == ">&-" else "result\n")
        assert err == ("" if "2>" in shell else "error: wrong\n")


WRITING = """
with replacing("result") as partial:
    partial.write_text("half of i")
    print("writing", flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_cleanly(tmp_path, number):
    with start(WRITING, cwd=tmp_path) as process:
        assert process.stdout.readline() == "writing\n" and len(os.listdir(tmp_path)) == 1
        process.send_signal(number)
        err = process.stderr.read()
    assert process.returncode == 128 + number and not os.listdir(tmp_path)
    assert err == ("interrupted\n" if number == signal.SIGINT else f"{number.name}\n")


def test_what_is_told_to_outlive_its_terminal_does(tmp_path):
    body = "os.kill(os.getpid(), 1)\nprint('alive')"
    code, out, _ = end(body, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert code == 0 and out == "alive\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(5, "Input/output error", "a file"), "Input/output error .a file.$"),
        (OSError("odd"), "odd$"),
        (PermissionError(13, "Permission denied", "x"), "Permission denied .x.$"),
        (MemoryError(), "not enough memory: .*--samples"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA: 5 GB\nmore"), "memory.*CUDA: 5 GB.$"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (UserError("the name \x1b[31m is wrong"), r"the name \\x1b\[31m is wrong$"),
        (UserError("x" * 70_000 + ": remedy"), "remedy$"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(capsys, monkeypatch, error, said):
    def fail(parsed):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "doctor", fail)
    assert cli.main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert re.match("error: .*" + said, err) and len(err) <= 1000 and err.count("\n") == 1


def test_bugs_stay_visible(monkeypatch):
    def fail(parsed):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "doctor", fail)
    for error in (RuntimeError("a bug"), TypeError("a bug"), AssertionError("a bug")):
        with pytest.raises(type(error), match="a bug"):
            cli.main(["doctor"])


@pytest.mark.parametrize(
    ("arguments", "resumable"),
    [
        (["quantize", "m", "-o", "out"], True),
        (["quantize", "m", "-o", "elsewhere", "--work-dir", "out.work"], True),
        (["plan", "m", "-o", "out"], True),
        (["quantize", "m", "-o", "other"], False),  # nothing was kept yet
        (["plan", "m", "--sweep", "2"], False),
        (["inspect", "out"], False),
        (["eval", "out", "--text", "x"], False),
        (["calibrate-pruning", "out", "--text", "x"], False),
    ],
)
def test_an_interruption_says_what_is_left(tmp_path, monkeypatch, capsys, arguments, resumable):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "job.json").touch()
    monkeypatch.setitem(cli.COMMANDS, arguments[0], interrupt)
    assert cli.main(arguments) == 130
    left = f"; finished layers are kept in {tmp_path}/out.work, add --resume to continue"
    assert capsys.readouterr().err == f"interrupted{left * resumable}\n"


# What --resume knows


ASKED = {
    "bits": 3.0, "recipe": "paper", "method": "rtn", "group_size": 32, "finetune_passes": 0,
    "samples": 2, "sequence_length": 64, "candidate_bits": (2, 3), "pins": ("layers.0.*=3",),
}  # fmt: skip


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.fixture
def begin(tiny_models, tmp_path, calibration_text, monkeypatch):
    """begin(**options): a job that was interrupted: its options, and the command line that resumes
    it."""

    def run(**options):
        model, output = str(tiny_models("mixtral")), str(tmp_path / "out")
        asked = {**ASKED, "calibration": str(calibration_text), **options}
        given = QuantizeOptions(model, output, **asked)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pipeline, "measure_and_choose", interrupt)
            pipeline.quantize(given)
        return given, ["quantize", model, "-o", output, "--resume"]

    return run


@pytest.fixture
def begun(begin):
    return begin()


def test_resume_restores_what_was_asked_for(begun, monkeypatch, tmp_path):
    given, line = begun
    asked = []
    monkeypatch.setattr(pipeline, "quantize", asked.append)
    again = [*line, "--bits", "2.5", "--target-drop", "0.1", "--work-dir", f"{tmp_path}/out.work/"]
    assert cli.main(line) == cli.main(again) == 0
    for found, bits in zip(asked, (3.0, 2.5), strict=True):
        expected = {**vars(given), "bits": bits, "resume": True}
        if bits == 2.5:
            expected |= {"target_drop": 0.1, "work_dir": f"{tmp_path}/out.work/"}
        assert vars(found) == expected


def test_what_is_given_again_must_agree(begun, capsys, monkeypatch):
    _, line = begun
    assert cli.main([*line, "--seed", "7", "--group-size", "32"]) == 2
    err = capsys.readouterr().err
    assert "seed was 0, is now 7" in err and "group_size" not in err
    monkeypatch.setattr(pipeline, "measure_and_choose", interrupt)
    assert cli.main(line) == 130  # at its work


def test_a_work_directory_alone_runs_no_code(begin, monkeypatch, capsys):
    """It may have come from others. Without the flag the output would lack the model's code."""
    given, line = begin(trust_remote_code=True)
    assert cli.main(line) == 2
    assert "begun with --trust-remote-code" in capsys.readouterr().err
    monkeypatch.setattr(pipeline, "measure_and_choose", interrupt)
    assert cli.main([*line, "--trust-remote-code"]) == 130  # at its work
    with pytest.raises(UserError, match="trust_remote_code was True, is now False"):
        pipeline.quantize(replace(given, resume=True, trust_remote_code=False))


def test_code_is_not_added_to_a_job_that_was_begun_without(begun, capsys):
    _, line = begun
    assert cli.main([*line, "--trust-remote-code"]) == 2
    assert "trust_remote_code was False, is now True" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_nothing_to_resume_is_said_at_once(tmp_path, capsys, command):
    assert cli.main([command, "no-model", "-o", str(tmp_path / "out"), "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_job_that_kept_nothing_is_begun_again(tmp_path, capsys):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "lock").touch()
    (tmp_path / "out.work" / ".job.json.0123456789abcdef.partial").touch()
    assert cli.main(["quantize", "no-model", "-o", str(tmp_path / "out"), "--resume"]) == 2
    assert "before it kept anything: leave --resume out" in capsys.readouterr().err


def test_flags_that_are_none_are_refused(begun, tmp_path, capsys):
    _, line = begun
    file = tmp_path / "out.work" / "job.json"
    job = json.loads(file.read_text())
    job["flags"]["tuning"] = job["flags"].pop("finetune_passes")
    file.write_text(json.dumps(job))
    assert cli.main(line) == 2
    assert "holds 1 unknown option: tuning" in capsys.readouterr().err


def test_names_are_shown_as_they_are(capsys):
    Console(width=60).print("m[v2] [/bold] [red]x[/red] \x1b[31m :smile:")
    assert capsys.readouterr().out == r"m[v2] [/bold] [red]x[/red] \x1b[31m :smile:" + "\n"
