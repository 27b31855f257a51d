"""Without a GPU: what ships compiles for each chip, fits its shared memory and spills nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Shared memory of a program, bytes; CUDA C++ Programming Guide, table of technical specifications.
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def compile_variants(device: str, capabilities: tuple[int, ...], *options: str) -> list[dict]:
    command = [sys.executable, str(Path(__file__).parent / "compile_variants.py"), device]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    kernels = str(Path(__file__).parents[2] / "kernels")
    environment["PYTHONPATH"] = os.pathsep.join([kernels, environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [*command, ",".join(map(str, capabilities)), *options],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(rows: list[dict]) -> None:
    bad = [
        row
        for row in rows
        if row["spilled_bytes"] or row["shared_bytes"] > SHARED_BYTES[row["capability"]]
    ]
    assert not bad, "\n".join(map(str, bad))


@pytest.mark.slow
@pytest.mark.parametrize(
    "capabilities", [(90,), pytest.param((80, 86, 89), marks=pytest.mark.nightly)]
)
def test_one_of_each_kind_for_every_chip(capabilities):
    rows = compile_variants("default", capabilities)
    kinds = {"gate_up", "down", "prepare", "combine", "gate_up_prefill", "down_prefill"}
    kinds |= {"gate_up_single", "down_single", "gate_up_warp", "down_warp"}
    kinds |= {"fit_group", "compensate", "descend"}
    assert {(r["kernel"], r["capability"]) for r in rows} == {
        (k, c) for k in kinds for c in capabilities
    }
    check(rows)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_kind_that_is_hoppers_alone():
    rows = compile_variants("NVIDIA_H100_80GB_HBM3", (90,), "warpgroup")
    assert {"gate_up_warpgroup", "down_warpgroup"} == {r["kernel"] for r in rows}
    check(rows)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("device", "capabilities"),
    [("default", (80, 86, 89, 90)), ("NVIDIA_H100_80GB_HBM3", (90,))],
)
@pytest.mark.parametrize("model", ["gpt-oss-20b", "step-3.5", "nemotron-3-nano"])
def test_what_other_experts_compute(device, capabilities, model):
    """Limits, biases and experts without a gate."""
    rows = compile_variants(device, capabilities, model)
    assert {r["capability"] for r in rows} == set(capabilities)
    assert {"gate_up_single", "gate_up_prefill"} & {r["kernel"] for r in rows}
    check(rows)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("device", "capabilities"),
    [("default", (80, 86, 89, 90)), ("NVIDIA_H100_80GB_HBM3", (90,))],
)
def test_everything_that_ships(device, capabilities):
    check(compile_variants(device, capabilities, "--all"))
