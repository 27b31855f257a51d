"""What is not shipped can be added: an architecture is one file, and a format of codes is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import engine_environment

PROGRAM = Path(__file__).parent / "made_up" / "program.py"


@pytest.mark.vllm
@pytest.mark.slow
def test_a_made_up_architecture_in_a_made_up_format_is_compressed_checked_and_served(
    tmp_path, calibration_text
):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path), str(calibration_text)],
        env=engine_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [s for s in done.stdout.splitlines() if s.startswith("RESULT ")]
    found = json.loads(line.removeprefix("RESULT "))
    assert found["format"] == "mirrored" and found["widths"] == [6] and found["code_bits"] == 2
    # Both compute in float32 and differ in the order of sums.
    assert found["difference"] < 1e-3 < found["spread"]
