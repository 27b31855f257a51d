"""Fixtures that every folder of tests shares: paths, texts, models; and the order of tests."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

import pytest
import torch

from tests.helpers.text import CALIBRATION, EVALUATION, write_text

if not torch.cuda.is_available():
    # The kernels run in Triton's interpreter. Read when Triton and a kernel are first imported,
    # hence before any test module; engines in processes of their own do without (tests/e2e).
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[1]
EXAMPLE_MODEL = ROOT / "examples" / "mixtral-6m"
# Larger trained models and text that a checkout may have beside it; tests that use them skip.
SHARED = ROOT.parent / "shared"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a core for each worker, and for what it starts
    os.environ["OMP_NUM_THREADS"] = "1"

# Compiled artifacts outlive edits of the plugin: they belong to this checkout alone.
for variable, folder in (
    ("HF_HOME", "huggingface"),
    ("MPLCONFIGDIR", "matplotlib"),
    ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
    ("TRITON_CACHE_DIR", "triton"),
    ("VLLM_CACHE_ROOT", "vllm"),
    ("VLLM_CONFIG_ROOT", "vllm-config"),
):
    os.environ.setdefault(variable, str(ROOT / ".cache" / folder))
os.environ["HF_HUB_OFFLINE"] = "1"  # tests need no network
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "dtype": "bfloat16",
}
TINY_MODELS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 256,
        "intermediate_size": 256,
    },
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 128,
        "head_dim": 32,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 128},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 128,
        "head_dim": 32,
    },
}


def make_tiny_model(folder: Path, model_type: str, layers: int = 2, **settings: object) -> Path:
    """Save a random model of `model_type` with the example's tokenizer; the same each time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**SIZES, **TINY_MODELS[model_type], "num_hidden_layers": layers, **settings}
    config = AutoConfig.for_model(model_type, **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wide enough that routing is uneven and logits differ from token to token.
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE_MODEL / name, folder / name)
    return folder


# Files whose tests share nothing that is expensive to make, and are long enough to be spread over
# the workers of pytest-xdist. Every other file is one worker's, for its fixtures; what is in one
# group shares a server or an engine.
SPREAD = {
    "test_columns.py",
    "test_compile.py",
    "test_dequantization.py",
    "test_experts_gpu.py",
    "test_routing.py",
}
GROUPS = {"test_evaluate.py": "servers", "test_serve.py": "servers", "test_tasks.py": "servers"}
# What takes minutes comes first, so that at the end no worker is alone with it.
SLOWEST = ("e2e", "test_pipeline.py", "test_compile.py", "test_memory.py")
EMPTY_PART = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", default="1/1", help="run the I-th of N parts")
    parser.addoption("--all", action="store_true", help="also what is marked `nightly`")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Own, because the one of `--dist loadgroup` reads groups from names that pytest 9.2 does not
    let it write, and then spreads everything."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = PurePath(nodeid.partition("::")[0])
            if file.name in SPREAD:
                return nodeid
            alone = "engines" if file.parent.name == "e2e" else str(file)
            return GROUPS.get(file.name, alone)

    return ByFile(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("nightly") and not item.config.getoption("--all"):
        pytest.skip("`make test-all` runs it")


@pytest.hookimpl(trylast=True)  # of the tests that -m and -k leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Neighbours by the kernel's configuration take about as long, so they go to different
    parts."""
    mark_samples(items)
    items.sort(key=lambda item: place(item.path))
    part, parts = map(int, config.getoption("--shard").split("/"))
    if parts > 1:
        items.sort(key=configuration)
        chosen = items[part - 1 :: parts]
        config.stash[EMPTY_PART] = bool(items) and not chosen
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def mark_samples(items: Sequence[pytest.Item]) -> None:
    """Of a test marked `sampled(n)`, all cases but n, evenly spread over those of its grid that can
    run here, are nightly. A GPU runs them all."""
    if torch.cuda.is_available():
        return
    grids: dict[str, list[pytest.Item]] = {}
    for item in items:
        can_run = not any(True in mark.args for mark in item.iter_markers("skipif"))
        if can_run and item.get_closest_marker("sampled"):
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in grids.values():
        (kept,) = cases[0].get_closest_marker("sampled").args  # type: ignore[union-attr]
        chosen = {round((i + 0.5) * len(cases) / kept - 0.5) for i in range(kept)}
        for number, case in enumerate(cases):
            if number not in chosen:
                case.add_marker(pytest.mark.nightly)


def place(path: Path) -> int:
    """Small for what runs early."""
    early = [i for i, name in enumerate(SLOWEST) if name in path.parts]
    return early[0] if early else len(SLOWEST) + (path.name in SPREAD)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.stash.get(EMPTY_PART, False):  # more parts than tests: nothing is wrong
        session.exitstatus = pytest.ExitCode.OK


def configuration(item: pytest.Item) -> str:
    return str(item.callspec.params.get("config")) if hasattr(item, "callspec") else ""


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """once(name, make): the folder that make(folder) makes, for all workers of pytest-xdist. The
    first that asks makes it, the others wait; nobody may change it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared / name
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                made = Path(tempfile.mkdtemp(dir=shared)) / name  # a failure leaves nothing
                make(made)
                made.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def tiny_models(
    once: Callable[[str, Callable[[Path], None]], Path],
) -> Callable[[str], Path]:
    """A function from model type ("mixtral", ...) to the folder of a tiny random model."""

    def get(model_type: str) -> Path:
        return once(f"tiny-{model_type}", lambda folder: make_tiny_model(folder, model_type))

    return get


@pytest.fixture(scope="session")
def compressed_example(
    calibration_text: Path, once: Callable[[str, Callable[[Path], None]], Path]
) -> Path:
    """The bundled model at 2.5 bits, with matrices of every width in every layer."""
    from mcmoe_vllm.compress.options import QuantizeOptions
    from mcmoe_vllm.compress.pipeline import quantize

    def make(folder: Path) -> None:
        quantize(
            QuantizeOptions(
                model=str(EXAMPLE_MODEL),
                output=str(folder),
                calibration=str(calibration_text),
                bits=2.5,
                candidate_bits=(1, 2, 3, 4),
                pins=("layers.*.experts.0=4",),
                samples=8,
                sequence_length=128,
            )
        )

    return once("compressed-example", make)


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text as .jsonl, about 60,000 tokens, which no change of this project changes."""
    return write_text(tmp_path_factory.mktemp("text") / "calibration.jsonl", CALIBRATION)


@pytest.fixture(scope="session")
def evaluation_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other files than those of `calibration_text`, about 55,000 tokens."""
    return write_text(tmp_path_factory.mktemp("text") / "evaluation.jsonl", EVALUATION)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of larger models and text beside the checkout."""
    if not (SHARED / "models").is_dir():
        pytest.skip("no shared models beside the checkout")
    return SHARED
