#!/usr/bin/env python3
"""Other quantizers on the same model, text and samples: `python peers.py MODEL ...`.

    python benchmarks/quality/peers.py MODEL --calibration A.jsonl --text B.jsonl --bits 2 3

Each tool runs in a virtual environment of its own under --venvs, made from PyPI if it is not there,
and writes a folder of dequantized float32 weights, which is scored by the protocol of `mcmoe eval`.
Experts get --bits at group size 128, attention 4 bits at 128; router, norms, embeddings and head
stay as they are. Appends rows to benchmarks/results/quality.jsonl; true_bits are those of the
experts, with what the tool stores for scales and zeros. A tool that fails is reported with its
last words and recorded with the error instead of figures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "quality.jsonl"
GROUP_SIZE, ATTENTION_BITS = 128, 4
EXPERT = re.compile(r"\.experts\.\d+\.")
PROJECTION = re.compile(r"\b(gate|up|down)_proj\b")
MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
ATTENTION = re.compile(r"\.self_attn\.[qkvo]_proj\.")


@dataclass(frozen=True)
class Peer:
    """requirements: what pip installs. zero_is_code: a group's zero takes as many bits as a code,
    not 16; its scale takes 16. environment: variables that it needs."""

    requirements: tuple[str, ...]
    zero_is_code: bool
    environment: tuple[tuple[str, str], ...] = ()

    def true_bits(self, bits: int) -> float:
        return bits + (16 + (bits if self.zero_is_code else 16)) / GROUP_SIZE


PEERS = {
    "hqq": Peer(("hqq==0.2.8.post1",), False),
    # Its pool of two loaders must fit into the workers, of which two cores get one by default.
    "gptqmodel": Peer(("gptqmodel==7.7.0",), True, (("GPTQMODEL_CPU_WORKERS", "2"),)),
    "auto-round": Peer(("auto-round==0.16.1",), True),
    "llm-compressor": Peer(("llmcompressor==0.14.0.1", "torchvision"), True),
}


# --- in the tool's own environment ---------------------------------------------------------------


def tensors_of(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def is_mixtral(model: Path) -> bool:
    return bool(json.loads((model / "config.json").read_text())["model_type"] == "mixtral")


def stored_name(name: str, mixtral: bool) -> str:
    """A tensor's name in the model's checkpoint, from what transformers calls it."""
    if not mixtral:
        return name
    name = name.replace(".mlp.", ".block_sparse_moe.")
    return PROJECTION.sub(lambda m: MIXTRAL_NAMES[m[0]], name) if EXPERT.search(name) else name


def width_of(name: str, bits: int) -> int | None:
    """The width of a tensor, None for those that stay as they are."""
    if EXPERT.search(name):
        return bits
    return ATTENTION_BITS if ATTENTION.search(name) and name.endswith("weight") else None


def run_hqq(model: Path, output: Path, bits: int, windows: list[list[int]]) -> None:
    import torch
    from hqq.core.quantize import Quantizer
    from safetensors.torch import save_file

    found = {}
    for name, tensor in tensors_of(model):
        width = width_of(name, bits)
        found[name] = tensor
        if width is not None:
            codes, meta = Quantizer.quantize(
                tensor.float(), nbits=width, group_size=GROUP_SIZE, axis=1, optimize=True,
                device="cpu", compute_dtype=torch.float32, bitpack=False,
            )  # fmt: skip
            meta |= {key: meta[key].half().float() for key in ("scale", "zero")}  # as it is stored
            found[name] = Quantizer.dequantize(codes, meta).reshape(tensor.shape).float()
    save_file({name: t.contiguous() for name, t in found.items()}, output / "model.safetensors")


def run_gptqmodel(model: Path, output: Path, bits: int, windows: list[list[int]]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import save_file

    settings = QuantizeConfig(
        bits=bits, group_size=GROUP_SIZE, sym=False,
        dynamic={r"+:.*self_attn\..*": {"bits": ATTENTION_BITS, "group_size": GROUP_SIZE}},
    )  # fmt: skip
    mixtral = is_mixtral(model)
    loaded = GPTQModel.load(str(model), settings, device="cpu")
    loaded.quantize(
        [{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows], batch_size=1
    )
    with tempfile.TemporaryDirectory() as saved:
        loaded.save(saved)
        packed = dict(tensors_of(Path(saved)))
    found = {stored_name(name, mixtral): t.contiguous() for name, t in unpack_gptq(packed, bits)}
    save_file(found, output / "model.safetensors")


def unpack_gptq(packed: dict[str, Any], bits: int) -> Iterator[tuple[str, Any]]:
    """The float32 weights of a checkpoint in GPTQ's format; other tensors as they are."""
    import torch

    def fields(words: Any, width: int) -> Any:
        """int32 [N, ...] -> [N * 32 / width, ...]: fields of a stream of bits."""
        stream = (words.long().unsqueeze(1) >> torch.arange(32).view(1, 32, 1)) & 1
        stream = stream.reshape(-1, width, words.shape[1])
        return (stream << torch.arange(width).view(1, width, 1)).sum(1)

    for name, tensor in packed.items():
        if not name.endswith((".qweight", ".qzeros", ".scales", ".g_idx")):
            yield name, tensor
        elif name.endswith(".qweight"):
            prefix = name.removesuffix("qweight")
            width = width_of(prefix + "weight", bits)
            assert width is not None
            scales, group = packed[prefix + "scales"].float(), packed[prefix + "g_idx"].long()
            zeros = fields(packed[prefix + "qzeros"].T.contiguous(), width).T[:, : scales.shape[1]]
            codes = fields(tensor, width)
            weight = (codes - zeros[group] - 1) * scales[group]
            yield prefix + "weight", weight.T.contiguous().float()


def run_auto_round(model: Path, output: Path, bits: int, windows: list[list[int]]) -> None:
    import torch
    from auto_round import AutoRound
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    attention = [n for n, _ in loaded.named_modules() if ATTENTION.search(f".{n}.")]
    rounder = AutoRound(
        loaded, AutoTokenizer.from_pretrained(model), bits=bits, group_size=GROUP_SIZE, sym=False,
        layer_config={name: {"bits": ATTENTION_BITS} for name in attention},
        dataset=[torch.tensor([w]) for w in windows], nsamples=len(windows), seqlen=len(windows[0]),
        device_map="cpu",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as saved:
        rounder.quantize_and_save(saved, format="fake")
        mixtral = is_mixtral(model)
        found = {stored_name(name, mixtral): t for name, t in tensors_of(Path(saved))}
        save_file(found, output / "model.safetensors")


def run_llm_compressor(model: Path, output: Path, bits: int, windows: list[list[int]]) -> None:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    def scheme(target: str, width: int) -> QuantizationScheme:
        weights = QuantizationArgs(
            num_bits=width, symmetric=False, strategy="group", group_size=GROUP_SIZE
        )
        return QuantizationScheme(targets=[target], weights=weights)

    with load_quantizable_moe():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    groups = {
        "experts": scheme(r"re:.*\.experts\.\d+\.(gate|up|down)_proj$", bits),
        "attention": scheme(r"re:.*\.self_attn\.[qkvo]_proj$", ATTENTION_BITS),
    }
    oneshot(
        model=loaded, recipe=GPTQModifier(config_groups=groups),
        dataset=Dataset.from_list(
            [{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows]
        ),
        num_calibration_samples=len(windows), max_seq_length=len(windows[0]),
    )  # fmt: skip
    mixtral, known = is_mixtral(model), dict(tensors_of(model))
    found = {stored_name(name, mixtral): t for name, t in loaded.state_dict().items()}
    save_file({name: found[name].contiguous() for name in known}, output / "model.safetensors")


RUNS = {
    "hqq": run_hqq, "gptqmodel": run_gptqmodel, "auto-round": run_auto_round,
    "llm-compressor": run_llm_compressor,
}  # fmt: skip


def run_child(arguments: argparse.Namespace) -> None:
    windows = json.loads(arguments.windows_file.read_text())
    RUNS[arguments.child](arguments.model, arguments.output, arguments.bits[0], windows)


# --- in ours -------------------------------------------------------------------------------------


def interpreter(peer: str, venvs: Path) -> Path:
    """The Python of the tool's environment, made if it is not there."""
    python = venvs / peer / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venvs / peer)], check=True)
        packages = [*PEERS[peer].requirements, "torch", "transformers", "accelerate"]
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    return python


def quantize_with(peer: str, bits: int, windows: Path, output: Path, given: Any) -> str | None:
    """The tool's folder at `output`; its last words if it failed."""
    output.mkdir()
    command = [
        str(interpreter(peer, given.venvs)), __file__, str(given.model), "--child", peer,
        "--bits", str(bits), "--windows-file", str(windows), "--output", str(output),
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": "", **dict(PEERS[peer].environment)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        return done.stderr.strip()[-2000:]
    for file in given.model.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(file, output / file.name)
    return None


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        run_child(arguments)
        return
    from machine import machine

    from mcmoe_vllm.checkpoint.files import open_checkpoint
    from mcmoe_vllm.evaluate.perplexity import compare
    from mcmoe_vllm.model.moe_model import open_model
    from mcmoe_vllm.model.runner import final_hidden
    from mcmoe_vllm.model.text import (
        load_tokenizer,
        sample_windows,
        strided_windows,
        window_length,
    )

    base = open_model(open_checkpoint(arguments.model))
    length = window_length(base.config, None)
    tokenizer = load_tokenizer(arguments.model)
    tokens = strided_windows(arguments.text, tokenizer, arguments.windows, length)
    samples = sample_windows(
        arguments.calibration, tokenizer, arguments.samples, length, arguments.seed
    )
    hidden = final_hidden(base, tokens)
    run = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for peer in arguments.peers:
        for bits in arguments.bits:
            row: dict[str, Any] = {
                "model": arguments.model.name, "method": "uniform", "recipe": peer,
                "nominal_bits": float(bits), "true_bits": PEERS[peer].true_bits(bits),
                "seed": arguments.seed, "text": Path(arguments.text).name, "windows": len(tokens),
                "sequence_length": length, "calibration": Path(arguments.calibration).name,
                "samples": arguments.samples, "run": run,
            }  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                file, output = Path(folder, "windows.json"), Path(folder, "out")
                file.write_text(json.dumps(samples.tolist()))
                error = quantize_with(peer, bits, file, output, arguments)
                if error is None:
                    loaded = open_model(open_checkpoint(output))
                    scored = final_hidden(loaded, tokens)
                    row |= compare(loaded, scored, base, hidden, tokens)
                else:
                    row["error"] = error.splitlines()[-1]
                    print(error, file=sys.stderr)
            row |= machine(arguments.commit)
            with arguments.results.open("a") as f:
                f.write(json.dumps(row) + "\n")
            shown = ("true_bits", "perplexity", "loss_difference", "paired_stderr", "kl", "error")
            print(row["model"], peer, bits, {k: row[k] for k in shown if k in row}, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration")
    parser.add_argument("--text")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--venvs", type=Path, default=Path(tempfile.gettempdir(), "mcmoe-quality-peers")
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="recorded in the rows (default: of this checkout)")
    for flag in ("--child", "--windows-file", "--output"):
        kind = str if flag == "--child" else Path
        parser.add_argument(flag, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
