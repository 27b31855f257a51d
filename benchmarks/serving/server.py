"""A program that serves: started with its processes, awaited, and ended with all of them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str], stdin: int | None = None
) -> subprocess.Popen[bytes]:
    """The program in a group of its own, whose output goes to a file: a pipe would be held open by
    every process that an engine starts."""
    with log.open("wb") as out:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the program and every process of its group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, seconds: float) -> str | None:
    """None as soon as the server answers, or what has become of it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return f"it ended with exit code {process.returncode}"
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url + "/health", timeout=5).close()
            return None
        time.sleep(0.5)
    return f"no answer within {seconds:.0f} s"
