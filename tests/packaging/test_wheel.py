"""What a user gets from `pip install`: the wheel, built from the sdist, in a fresh environment."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOPS = (ROOT / "mcmoe_vllm", ROOT / "kernels" / "mcmoe_kernels")
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "*.egg-info", "__pycache__", "build", "demo-output*", "dist", "examples"
)


def run(*command: str | Path, cwd: Path) -> str:
    """The command's output; its whole talk is the failure's message."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=clean, text=True, capture_output=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that neither an old build/ helps nor a new one stays behind."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    # Without isolation nothing is downloaded, which needs the build tools in this environment.
    recent = int(metadata.version("setuptools").split(".")[0]) >= 77
    isolation = ["--no-isolation"] if recent else []
    run(sys.executable, "-m", "build", *isolation, "--outdir", "dist", "source", cwd=folder)
    assert len(list(folder.glob("dist/*.tar.gz"))) == 1
    [wheel] = folder.glob("dist/*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that holds the wheel and borrows the running one's dependencies.

    They are lent by a .pth line, which adds their folder but runs no .pth file in it: an editable
    install of this repository stays out of sight.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip()
    lent = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    Path(site, "lent.pth").write_text("\n".join(lent))
    return folder


def python(environment: Path, code: str) -> str:
    """What `code` prints in the environment, away from the repository."""
    return run(environment / "bin" / "python", "-I", "-c", code, cwd=environment).strip()


def packages_of_the_tree() -> set[str]:
    return {
        ".".join(init.parent.relative_to(top.parent).parts)
        for top in TOPS
        for init in top.rglob("__init__.py")
    }


def test_pyproject_lists_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == packages_of_the_tree()


def test_the_folder_kernels_is_no_package() -> None:
    """It would shadow Hugging Face's `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    expected = {
        str(path.relative_to(top.parent))
        for top in TOPS
        for pattern in ("*.py", "py.typed", "configs/*.json")
        for path in top.rglob(pattern)
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_vllm_finds_the_plugin(environment: Path) -> None:
    code = (
        "from importlib.metadata import entry_points\n"
        "[entry] = entry_points(group='vllm.general_plugins', name='mcmoe')\n"
        "register = entry.load()\n"
        "assert callable(register)\n"
        "print(__import__(register.__module__).__file__)"
    )
    assert Path(python(environment, code).splitlines()[-1]).is_relative_to(environment)


def test_the_command_runs(environment: Path) -> None:
    assert "quantize" in run(environment / "bin" / "mcmoe", "--help", cwd=environment)


def test_import_is_light(environment: Path) -> None:
    code = (
        "import sys, mcmoe_vllm\n"
        "heavy = {'vllm', 'transformers', 'matplotlib', 'ortools', 'datasets', 'triton'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized()\n"
        "print(mcmoe_vllm.__file__, mcmoe_vllm.__version__)"
    )
    file, version = python(environment, code).split()
    assert Path(file).is_relative_to(environment)
    assert f"mcmoe_vllm-{version}.dist-info" in os.listdir(Path(file).parents[1])


def test_kernels_import_without_the_rest(environment: Path) -> None:
    code = (
        "import sys, mcmoe_kernels, mcmoe_kernels.formats.packing\n"
        "assert not {'vllm', 'mcmoe_vllm'} & set(sys.modules)\n"
        "print(mcmoe_kernels.__file__)"
    )
    assert Path(python(environment, code)).is_relative_to(environment)
