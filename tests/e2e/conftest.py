"""Checkpoints, servers and engines for the end-to-end tests. One engine runs at a time, with
pytest-xdist one for each of its workers."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[2]
EXAMPLE_MODEL = ROOT / "examples" / "mixtral-6m"
ENGINE = Path(__file__).parent / "engine.py"
START_SECONDS = 300
ENGINE_SECONDS = 600


def engine_environment(**settings: str) -> dict[str, str]:
    values = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:  # a core for each: threads that spin would starve the other's engine
        cores = os.cpu_count() or 1
        values["VLLM_CPU_OMP_THREADS_BIND"] = str(int(worker.removeprefix("gw")) % cores)
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**inherited, **values, **settings}


@dataclass
class Server:
    """A running `vllm serve`."""

    url: str
    log_file: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def counts(self) -> dict[tuple[str, int], int]:
        """(metric, layer) -> value of the plugin's own metrics."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as response:
            text = response.read().decode()
        found = re.findall(r'^(mcmoe_\w+)\{layer="(\d+)"\} (\S+)$', text, re.MULTILINE)
        return {(name, int(layer)): int(float(value)) for name, layer, value in found}

    def post(self, path: str, **body: Any) -> Any:
        with self.stream(path, **body) as response:
            return json.load(response)

    def stream(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps({"model": "model", **body}).encode(),
            headers={"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=120)

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


def start_server(model: Path, log_file: Path, *flags: str) -> subprocess.Popen[bytes]:
    with log_file.open("wb") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
                *("--served-model-name", "model", "--max-model-len", "256"),
                *("--max-num-seqs", "4", *flags),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=engine_environment(),
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and every process that it started."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait(30)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """serve(folder, *flags): a ready server, which stays up until another is asked for."""
    current: dict[tuple[str, ...], Server] = {}

    def get(model: Path, *flags: str) -> Server:
        key = (str(model), *flags)
        if key not in current:
            for server in current.values():
                stop(server.process)
            current.clear()
            port = free_port()
            log_file = tmp_path_factory.mktemp("server") / "log.txt"
            process = start_server(model, log_file, "--port", str(port), *flags)
            current[key] = Server(f"http://127.0.0.1:{port}", log_file, process)
            _wait(current[key])
        return current[key]

    yield get
    for server in current.values():
        stop(server.process)


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            pytest.fail(
                f"vllm serve ended with {server.process.returncode}:\n{server.log()[-4000:]}"
            )
        with contextlib.suppress(OSError):
            urllib.request.urlopen(server.url + "/health", timeout=5).close()
            return
        time.sleep(0.5)
    stop(server.process)
    pytest.fail(f"no answer within {START_SECONDS} s:\n{server.log()[-4000:]}")


@pytest.fixture
def refused_start(tmp_path: Path) -> Callable[..., str]:
    """refused_start(folder, *flags): the log of a server that does not come up."""

    def get(model: Path, *flags: str) -> str:
        log_file = tmp_path / "log.txt"
        process = start_server(model, log_file, "--port", str(free_port()), *flags)
        try:
            code = process.wait(START_SECONDS)
        finally:
            stop(process)
        assert code != 0
        return log_file.read_text(errors="replace")

    return get


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """run_engine(folder, prompts, environment={}, max_tokens=16, then_alone=False, **LLM arguments)
    -> what engine.py writes, and the log."""

    def run(
        model: Path,
        prompts: list[list[int]],
        environment: dict[str, str] | None = None,
        max_tokens: int = 16,
        then_alone: bool = False,
        **arguments: Any,
    ) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("engine")
        llm = {
            "model": str(model),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 4,
            "enable_prefix_caching": False,
            **arguments,
        }
        job = {
            "llm": llm,
            "prompts": prompts,
            "max_tokens": max_tokens,
            "then_alone": then_alone,
            "output": str(folder / "result.json"),
        }
        (folder / "job.json").write_text(json.dumps(job))
        log_file = folder / "log.txt"
        with log_file.open("wb") as log:  # a file: a pipe would wait for every child of the engine
            process = subprocess.Popen(
                [
                    sys.executable,
                    str(Path(__file__).parent / "engine.py"),
                    str(folder / "job.json"),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=engine_environment(**(environment or {})),
                start_new_session=True,
            )
        try:
            code = process.wait(ENGINE_SECONDS)
        finally:
            stop(process)
        written = log_file.read_text(errors="replace")
        assert code == 0, written[-6000:]
        return {**json.loads((folder / "result.json").read_text()), "log": written}

    return run


@pytest.fixture(scope="session")
def compressed(
    tiny_models: Callable[[str], Path],
    calibration_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """compressed("qwen2_moe", **options): a tiny model compressed; "example": the bundled one."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, **options: Any) -> Path:
        from mcmoe_vllm.compress.options import QuantizeOptions
        from mcmoe_vllm.compress.pipeline import quantize

        key = (name, repr(sorted(options.items())))
        if key not in made:
            source = EXAMPLE_MODEL if name == "example" else tiny_models(name)
            output = tmp_path_factory.mktemp("compressed") / name
            values: dict[str, Any] = {"bits": 2.5, "samples": 8, "sequence_length": 128, **options}
            quantize(
                QuantizeOptions(
                    model=str(source),
                    output=str(output),
                    calibration=str(calibration_text),
                    **values,
                )
            )
            made[key] = output
        return made[key]

    return get


@pytest.fixture(scope="session")
def calibrated(
    compressed: Callable[..., Path],
    calibration_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The bundled model, compressed and calibrated to prune a quarter of its pairs."""
    from mcmoe_vllm.pruning.calibration import calibrate_checkpoint

    folder = tmp_path_factory.mktemp("pruned") / "example"
    shutil.copytree(compressed("example"), folder)
    calibrate_checkpoint(
        str(folder), str(calibration_text), target_drop=0.25, samples=8, sequence_length=128
    )
    return folder


@pytest.fixture(scope="session")
def with_ratios(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Path, Mapping[int, float]], Path]:
    """with_ratios(folder, ratios): a copy that is served pruned, by a ratio for each layer."""

    def get(folder: Path, ratios: Mapping[int, float]) -> Path:
        from mcmoe_vllm.checkpoint.files import open_checkpoint
        from mcmoe_vllm.pruning.calibration import store_table
        from mcmoe_vllm.pruning.table import PruningTable

        copy = tmp_path_factory.mktemp("with_ratios") / folder.name
        shutil.copytree(folder, copy)
        rows = {0.25: tuple(ratios.values())}
        store_table(open_checkpoint(copy), PruningTable("sensitivity", 0.25, tuple(ratios), rows))
        return copy

    return get


@pytest.fixture(scope="session")
def dequantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """dequantized(folder): the same weights as a plain float32 checkpoint, exactly."""
    made: dict[Path, Path] = {}

    def get(folder: Path) -> Path:
        if folder not in made:
            made[folder] = write_dequantized(folder, tmp_path_factory.mktemp("dequantized"))
        return made[folder]

    return get


def write_dequantized(folder: Path, target: Path) -> Path:
    from safetensors.torch import save_file

    from mcmoe_kernels.formats.packing import dequantize, dequantize_int4_linear
    from mcmoe_vllm.checkpoint.files import open_checkpoint
    from mcmoe_vllm.checkpoint.format import QuantizationConfig
    from mcmoe_vllm.checkpoint.writing import copy_side_files
    from mcmoe_vllm.disk import write_json
    from mcmoe_vllm.model.architectures import find_architecture

    checkpoint = open_checkpoint(folder)
    config = dict(checkpoint.config)
    quantization = QuantizationConfig.from_dict(config.pop("quantization_config"))
    stored = checkpoint.read(checkpoint.names())
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            scale = stored[f"{stem}.weight_scale"]
            columns = scale.shape[1] * quantization.group_size["w13"]
            bits = tensor.shape[1] * 8 // columns
            plain[f"{stem}.weight"] = dequantize(tensor, scale, bits)
        elif kind == "qweight":
            plain[f"{stem}.weight"] = dequantize_int4_linear(tensor, stored[f"{stem}.scales"])
        elif kind not in ("weight_scale", "scales"):
            plain[name] = tensor.float()
    architecture = find_architecture(config)
    for layer in quantization.expert_bits:  # an expert that was dropped adds nothing
        for expert, bits in enumerate(quantization.bits(layer, "w13")):
            if not bits:
                kept = quantization.bits(layer, "w13").index(max(quantization.bits(layer, "w13")))
                for name, like in zip(
                    architecture.expert_weights(layer, expert),
                    architecture.expert_weights(layer, kept),
                    strict=True,
                ):
                    plain[name] = torch.zeros_like(plain[like])
    save_file(
        {n: t.contiguous() for n, t in plain.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_json(target / "config.json", {**config, "dtype": "float32"})
    copy_side_files(folder, target)
    return target


@pytest.fixture(scope="session")
def prompts(evaluation_text: Path) -> list[list[int]]:
    """17 windows of 250 tokens of text: 4233 predicted tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    text = "\n".join(json.loads(line)["text"] for line in evaluation_text.open())
    ids = tokenizer(text)["input_ids"]
    windows = [ids[i * 250 : (i + 1) * 250] for i in range(17)]
    assert len(windows[-1]) == 250, "the evaluation text is too short"
    return windows


@pytest.fixture(scope="session")
def transformers_logprobs() -> Callable[[Path, list[list[int]]], torch.Tensor]:
    """Log-probabilities of each prompt token but the first by transformers in float32, [P, L-1].
    ratios: of the layers whose experts are pruned, which is to give them no weight."""

    def get(
        folder: Path, prompts: list[list[int]], ratios: Mapping[int, float] | None = None
    ) -> torch.Tensor:
        from transformers import AutoModelForCausalLM

        from mcmoe_kernels.pruning import drop_mask

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for layer, ratio in (ratios or {}).items():

            def prune(_: Any, given: tuple[torch.Tensor, ...], ratio: float = ratio) -> Any:
                hidden, ids, weights = given
                return hidden, ids, weights.masked_fill(drop_mask(weights, ids, ratio), 0.0)

            model.model.layers[layer].mlp.experts.register_forward_pre_hook(prune)
        rows = []
        with torch.inference_mode():
            for prompt in prompts:
                ids = torch.tensor([prompt])
                logprobs = model(ids).logits[0, :-1].log_softmax(-1)
                rows.append(logprobs.gather(1, ids[0, 1:, None])[:, 0])
        return torch.stack(rows)

    return get
