"""Checkpoints, servers and engines for the end-to-end tests. With pytest-xdist one worker has the
servers and another the engines, one at a time each."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serving import server
from tests.helpers.engine_environment import ENGINE, engine_environment

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[2]
EXAMPLE_MODEL = ROOT / "examples" / "mixtral-6m"
START_SECONDS = 300
ENGINE_SECONDS = 600


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
    command = [
        *(*server.VLLM, "serve", str(model), "--served-model-name", "model"),
        *("--max-model-len", "256", "--max-num-seqs", "4", *flags),
    ]
    return server.start(command, log_file, engine_environment())


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """serve(folder, *flags): a ready server, which stays up until another is asked for."""
    current: dict[tuple[str, ...], Server] = {}

    def get(model: Path, *flags: str) -> Server:
        key = (str(model), *flags)
        if key not in current:
            for other in current.values():
                server.stop(other.process)
            current.clear()
            port = server.free_port()
            log_file = tmp_path_factory.mktemp("server") / "log.txt"
            process = start_server(model, log_file, "--port", str(port), *flags)
            started = current[key] = Server(f"http://127.0.0.1:{port}", log_file, process)
            failure = server.wait_until_ready(process, started.url, START_SECONDS)
            if failure:
                server.stop(process)
                pytest.fail(f"vllm serve did not come up, {failure}:\n{started.log()[-4000:]}")
        return current[key]

    yield get
    for last in current.values():
        server.stop(last.process)


@pytest.fixture
def refused_start(tmp_path: Path) -> Callable[..., str]:
    """refused_start(folder, *flags): the log of a server that does not come up."""

    def get(model: Path, *flags: str) -> str:
        log_file = tmp_path / "log.txt"
        process = start_server(model, log_file, "--port", str(server.free_port()), *flags)
        try:
            code = process.wait(START_SECONDS)
        finally:
            server.stop(process)
        assert code != 0
        return log_file.read_text(errors="replace")

    return get


class Engines:
    """engine.py, given one job after another for as long as they agree on the environment."""

    def __init__(self, environment: Mapping[str, str], log_file: Path) -> None:
        self.environment = environment
        self.log_file = log_file
        command = [sys.executable, str(ENGINE)]
        self.process = server.start(
            command, log_file, engine_environment(**environment), stdin=subprocess.PIPE
        )

    def run(self, job: Mapping[str, Any], folder: Path) -> None:
        """Return when job["output"] is there."""
        (folder / "job.json").write_text(json.dumps(job))
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder / 'job.json'}\n".encode())
        self.process.stdin.flush()
        deadline = time.monotonic() + ENGINE_SECONDS
        while not Path(job["output"]).exists():
            ended = self.process.poll()
            if ended is not None or time.monotonic() > deadline:
                self.stop()
                logs = [f for f in (self.log_file, Path(job["log"])) if f.exists()]
                texts = [f.read_text(errors="replace")[-6000:] for f in logs]
                pytest.fail("\n".join([f"no result, exit code {ended}", *texts]))
            time.sleep(0.1)

    def stop(self) -> None:
        server.stop(self.process)


@pytest.fixture(scope="session")
def run_engine(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., dict[str, Any]]]:
    """run_engine(folder, prompts, environment={}, max_tokens=16, then_alone=False, calls=(),
    lora=None, **LLM arguments) -> what engine.py writes, and the log. An engine of one rank runs
    inside engine.py's process, one of several has processes of its own, as behind a server."""
    current: list[Engines] = []

    def engines(environment: Mapping[str, str]) -> Engines:
        usable = [e for e in current if e.environment == environment and e.process.poll() is None]
        if not usable:
            for other in current:
                other.stop()
            log_file = tmp_path_factory.mktemp("engines") / "log.txt"
            current[:] = [Engines(environment, log_file)]
        return current[0]

    def run(
        model: Path,
        prompts: list[list[int]],
        environment: dict[str, str] | None = None,
        max_tokens: int = 16,
        then_alone: bool = False,
        calls: Sequence[tuple[str, dict[str, Any]]] = (),
        lora: Path | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("engine")
        alone = arguments.get("tensor_parallel_size", 1) == 1
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if alone else "1", **(environment or {})}
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
            "calls": calls,
            "lora": None if lora is None else str(lora),
            "log": str(folder / "log.txt"),
            "output": str(folder / "result.json"),
        }
        engines(settings).run(job, folder)
        if "speculative_config" in arguments:  # vLLM 0.32 starts no other engine after it
            current.pop().stop()
        log = (folder / "log.txt").read_text(errors="replace")
        return {**json.loads((folder / "result.json").read_text()), "log": log}

    yield run
    for last in current:
        last.stop()


@pytest.fixture(scope="session")
def compressed(
    tiny_models: Callable[[str], Path],
    calibration_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """compressed("qwen2_moe", **options): a tiny model compressed."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, **options: Any) -> Path:
        from mcmoe_vllm.compress.options import QuantizeOptions
        from mcmoe_vllm.compress.pipeline import quantize

        key = (name, repr(sorted(options.items())))
        if key not in made:
            output = tmp_path_factory.mktemp("compressed") / name
            quantize(
                QuantizeOptions(
                    model=str(tiny_models(name)),
                    output=str(output),
                    calibration=str(calibration_text),
                    samples=4,
                    sequence_length=128,
                    **options,
                )
            )
            made[key] = output
        return made[key]

    return get


@pytest.fixture(scope="session")
def calibrated(
    compressed_example: Path,
    calibration_text: Path,
    once: Callable[[str, Callable[[Path], None]], Path],
) -> Path:
    """The bundled model, compressed and calibrated to prune a quarter of its pairs."""
    from mcmoe_vllm.pruning.calibration import calibrate_checkpoint

    def make(folder: Path) -> None:
        shutil.copytree(compressed_example, folder)
        calibrate_checkpoint(
            str(folder), str(calibration_text), target_drop=0.25, samples=8, sequence_length=128
        )

    return once("calibrated", make)


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
    from mcmoe_vllm.checkpoint.side_files import copy_side_files
    from mcmoe_vllm.disk import write_json
    from mcmoe_vllm.model.agreement import open_layout

    checkpoint = open_checkpoint(folder)
    config = dict(checkpoint.config)
    quantization = QuantizationConfig.from_dict(config.pop("quantization_config"))
    layout = open_layout(checkpoint, quantization)
    experts = range(quantization.num_experts)
    downs = {layout.expert_weights(i, e)[-1] for i in quantization.expert_bits for e in experts}
    stored = checkpoint.read(checkpoint.names())
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        stem, _, kind = name.rpartition(".")
        if kind.endswith("weight_packed"):
            weight = name.removesuffix("_packed")
            scale = stored[f"{weight}_scale"]
            group = "w2" if weight in downs else "w13"
            columns = scale.shape[1] * quantization.group_size[group]
            bits = tensor.shape[1] * 8 // columns
            plain[weight] = dequantize(tensor, scale, bits)
        elif kind == "qweight":
            plain[f"{stem}.weight"] = dequantize_int4_linear(tensor, stored[f"{stem}.scales"])
        elif not kind.endswith(("weight_scale", "scales")):
            plain[name] = tensor.float()
    for layer in quantization.expert_bits:  # an expert that was dropped adds nothing
        biases = [plain[name] for name in layout.expert_biases(layer)]
        for expert, bits in enumerate(quantization.bits(layer, "w13")):
            if not bits:
                kept = quantization.bits(layer, "w13").index(max(quantization.bits(layer, "w13")))
                for name, like in zip(
                    layout.expert_weights(layer, expert),
                    layout.expert_weights(layer, kept),
                    strict=True,
                ):
                    plain[name] = torch.zeros_like(plain[like])
                for bias in biases:
                    bias[expert] = 0
        if layout.projections is None:  # gate and up in one, of all experts in one, transposed
            names = [layout.expert_weights(layer, e) for e in range(quantization.num_experts)]
            place = f"{layout.layer_prefix(layer)}{layout.place}"
            for fused, parts in zip(("gate_up_proj", "down_proj"), zip(*names), strict=True):  # noqa: B905
                plain[f"{place}.{fused}"] = torch.stack([plain.pop(n).t() for n in parts])
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
    """Log-probabilities of each prompt token but the first by transformers, float32 [P, L-1].
    ratios: of the layers whose experts are pruned, which is to give them no weight; dtype: of the
    weights and of what is computed."""

    def get(
        folder: Path,
        prompts: list[list[int]],
        ratios: Mapping[int, float] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        from transformers import AutoModelForCausalLM

        from mcmoe_kernels.pruning import drop_mask

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for layer, ratio in (ratios or {}).items():

            def prune(_: Any, given: tuple[torch.Tensor, ...], ratio: float = ratio) -> Any:
                hidden, ids, weights = given
                return hidden, ids, weights.masked_fill(drop_mask(weights, ids, ratio), 0.0)

            model.model.layers[layer].mlp.experts.register_forward_pre_hook(prune)
        rows = []
        with torch.inference_mode():
            for prompt in prompts:
                ids = torch.tensor([prompt])
                logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
                rows.append(logprobs.gather(1, ids[0, 1:, None])[:, 0])
        return torch.stack(rows)

    return get
