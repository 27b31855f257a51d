"""The kernels stand alone: who imports whom, and what is there without Triton."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "mcmoe_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))
# What may import what: each its own folder and those to its left.
FLOORS = ("activations", "formats", "layer", "pruning", "quantize", "cpu", "gpu")
APART = {("gpu", "cpu"), ("gpu", "quantize"), ("cpu", "quantize"), ("quantize", "layer")}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("folder", [PACKAGE, Path(__file__).parent])
def test_nothing_here_needs_the_compressor(folder):
    for path in folder.rglob("*.py"):
        tops = {name.split(".")[0] for name in imports(path)}
        assert "mcmoe_vllm" not in tops and "vllm" not in tops, path


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_imports_go_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "mcmoe_kernels" and len(parts) > 1 and parts[1] != own:
            assert FLOORS.index(parts[1]) < FLOORS.index(own), name
            assert (own, parts[1]) not in APART, name


def test_what_needs_no_gpu_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import mcmoe_kernels.cpu.experts, mcmoe_kernels.formats.packing\n"
        "import mcmoe_kernels.layer, mcmoe_kernels.pruning, mcmoe_kernels.quantize.columns\n"
        "import mcmoe_kernels.gpu.tiled\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
