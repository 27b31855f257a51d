"""Perplexity and KL divergence by one fixed protocol, so that all figures compare.

The documents of the text, each followed by the end token, are joined and cut into
non-overlapping windows of min(2048, the model's maximum) tokens. At least 256 windows (all, if
there are fewer) at a fixed stride over the whole text are scored; every token but a window's
first is predicted. Reported are exp(mean loss), the standard error of the mean over windows, and
against a base model the mean KL(base || model) per token and the paired standard error of the
difference in loss. A goal is met when the mean plus two paired standard errors is within it.

The model is run layer by layer in float32 with dequantized weights: its memory is one layer's.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mcmoe_kernels import packing
from mcmoe_vllm.checkpoint import Checkpoint, open_checkpoint, resolve_model, stored_scale
from mcmoe_vllm.config import QUANT_METHOD, QuantizationConfig
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.models import Architecture, find_architecture
from mcmoe_vllm.pruning import DECODE_ONLY, Pruning, parse_switch, read_table
from mcmoe_vllm.streaming import Routing, StreamedModel, choose_device, experts_output
from mcmoe_vllm.text import load_tokenizer, strided_windows

WINDOWS = 256
MAX_SEQUENCE_LENGTH = 2048
ENGINES = ("transformers", "vllm")


@dataclass(frozen=True)
class Evaluation:
    """loss: mean negative log-likelihood per token (nats); stderr: of loss, over windows.

    dropped_fraction: expert activations that online pruning dropped (transformers engine).
    Against a base: kl: mean KL(base || model) per token; loss_difference = loss - base loss and
    its paired standard error. All None without one.
    """

    model: str
    engine: str
    text: str
    windows: int
    sequence_length: int
    loss: float
    perplexity: float
    stderr: float
    dropped_fraction: float = 0.0
    base: str | None = None
    base_perplexity: float | None = None
    loss_difference: float | None = None
    paired_stderr: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Scores:
    """Mean loss of each window, and mean KL to the base where there is one; float64 [S]."""

    loss: torch.Tensor
    kl: torch.Tensor | None


def evaluate(
    model: str,
    text: str,
    *,
    against: str | None = None,
    engine: str = "transformers",
    windows: int = WINDOWS,
    sequence_length: int | None = None,
    pruning: str | float | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Evaluation:
    """Score a model (16-bit or mcmoe; folder or Hub name) on a text file.

    engine: "transformers" (dequantized weights, layer by layer) or "vllm" (perplexity alone).
    pruning: as `parse_switch`; None prunes what is calibrated, as serving does.
    Raises UserError for unusable models or text, a base with another vocabulary, and a pruning that
    leaves prompts alone.
    """
    if engine not in ENGINES:
        raise UserError(f"engine is {engine!r}, allowed are {list(ENGINES)}")
    if windows < 2:
        raise UserError(f"windows is {windows}, needs at least 2 for a standard error")
    if pruning == DECODE_ONLY:
        raise UserError(
            f'pruning is "{DECODE_ONLY}", which prunes no prompt, and prompts are what is scored; '
            'ask for "on", "off" or a share'
        )
    path = resolve_model(model)
    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer(path, trust_remote_code)
    length = window_length(checkpoint, sequence_length)
    tokens = strided_windows(text, tokenizer, windows, length)
    settings = checkpoint.config.get("quantization_config") or {}
    ours = settings.get("quant_method") == QUANT_METHOD
    table = read_table(QuantizationConfig.from_dict(settings) if ours else None)
    ratios = parse_switch(pruning, table)
    active = Pruning(ratios, table.renormalize) if table and ratios else None
    if engine == "vllm":
        scores = _Scores(_score_with_vllm(path, tokens, trust_remote_code, pruning), None)
        base_scores = (
            _Scores(_score_with_vllm(resolve_model(against), tokens, trust_remote_code), None)
            if against
            else None
        )
    else:
        scored = load_streamed(checkpoint, device)
        base_model = None
        if against:
            base_checkpoint = open_checkpoint(resolve_model(against))
            sizes = [int(c.config["vocab_size"]) for c in (checkpoint, base_checkpoint)]
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"{model} has a vocabulary of {sizes[0]}, {against} one of {sizes[1]}: "
                    "only models with the same tokens can be compared"
                )
            base_model = load_streamed(base_checkpoint, device)
        scores, base_scores = _score_streamed(scored, base_model, tokens, active)
    return Evaluation(
        model=model,
        engine=engine,
        text=text,
        windows=tokens.shape[0],
        sequence_length=length,
        dropped_fraction=active.dropped_fraction if active else 0.0,
        base=against,
        **_figures(scores, base_scores),
    )


def window_length(checkpoint: Checkpoint, asked: int | None) -> int:
    """Tokens of a window, by default min(2048, the model's maximum). Raises UserError beyond it."""
    longest = int(checkpoint.config.get("max_position_embeddings", MAX_SEQUENCE_LENGTH))
    length = asked or min(MAX_SEQUENCE_LENGTH, longest)
    if not 2 <= length <= longest:
        raise UserError(f"sequence_length is {length}, allowed are 2 to {longest}")
    return length


def _figures(scores: _Scores, base: _Scores | None) -> dict[str, float]:
    """The numbers of an Evaluation."""
    loss, stderr = _mean_and_error(scores.loss)
    figures = {"loss": loss, "perplexity": math.exp(loss), "stderr": stderr}
    if base is not None:
        difference, paired = _mean_and_error(scores.loss - base.loss)
        figures["base_perplexity"] = math.exp(float(base.loss.mean()))
        figures |= {"loss_difference": difference, "paired_stderr": paired}
    if scores.kl is not None:
        figures["kl"], figures["kl_stderr"] = _mean_and_error(scores.kl)
    return figures


@dataclass(frozen=True)
class LoadedModel:
    """A streamed model and the way to its experts' weights."""

    model: StreamedModel
    architecture: Architecture
    quantization: QuantizationConfig | None
    num_experts: int

    def expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """w13 [2I, H] and w2 [H, I] in the model's dtype; None for a dropped expert."""
        names = self.architecture.expert_weights(layer, expert)
        checkpoint, model = self.model.checkpoint, self.model
        if self.quantization is None:
            found = checkpoint.read_weights(names)
            parts = [found[name].to(model.device, model.dtype) for name in names]
        else:
            bits13 = self.quantization.bits(layer, "w13")[expert]
            bits2 = self.quantization.bits(layer, "w2")[expert]
            if bits13 == 0:
                return None
            parts = [
                read_expert_matrix(checkpoint, name, bits).to(model.device, model.dtype)
                for name, bits in zip(names, (bits13, bits13, bits2), strict=True)
            ]
        gate, up, down = parts
        return torch.cat([gate, up]), down


def read_expert_matrix(checkpoint: Checkpoint, name: str, bits: int) -> torch.Tensor:
    """A packed expert matrix, dequantized to float32 [N, K].

    Raises UserError if the tensors' shapes contradict the width in config.json.
    """
    prefix = name.removesuffix("weight")
    found = checkpoint.read([prefix + "weight_packed", prefix + "weight_scale"])
    packed, scale = found[prefix + "weight_packed"], found[prefix + "weight_scale"]
    scale = stored_scale(scale, bits, prefix + "weight_scale")
    if packed.shape[1] % bits or (packed.shape[1] * 8 // bits) % scale.shape[1]:
        raise UserError(
            f"{prefix}weight_packed is {list(packed.shape)} with scales {list(scale.shape)}: "
            f"config.json says {bits} bits, which does not fit"
        )
    return packing.dequantize(packed, scale, bits)


def load_streamed(
    checkpoint: Checkpoint, device: str = "auto", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """A 16-bit or mcmoe checkpoint ready to run layer by layer; float32 on every device unless
    asked otherwise, so that figures do not depend on it.

    Raises UserError for unsupported architectures and other quantization methods.
    """
    architecture = find_architecture(checkpoint.config)
    settings = checkpoint.config.get("quantization_config")
    quantization = None if settings is None else QuantizationConfig.from_dict(settings)
    model = StreamedModel(
        checkpoint if quantization is None else _with_dense_weights(checkpoint),
        architecture,
        device=choose_device(device),
        dtype=dtype,
        read=checkpoint.read_weights if quantization is None else _DenseReader(checkpoint),
    )
    num_experts = int(getattr(model.config, architecture.num_experts))
    return LoadedModel(model, architecture, quantization, num_experts)


RunBlock = Callable[[torch.Tensor, "Pruning | None"], tuple[torch.Tensor, "Routing | None"]]


@contextmanager
def open_layer(loaded: LoadedModel, index: int) -> Iterator[RunBlock]:
    """A decoder layer in memory: a function from a block [B, L, H] and what to prune to the layer's
    output in main memory and its routing, None for a dense layer. Experts are read when needed."""
    model = loaded.model
    layer, activation = model.load_layer(index), model.activation()
    experts: dict[int, tuple[torch.Tensor, torch.Tensor] | None] = {}

    def run(block: torch.Tensor, pruning: Pruning | None) -> tuple[torch.Tensor, Routing | None]:
        output, routing = model.run_layer(layer, index, block.to(model.device))
        if routing is None:
            return output.cpu(), None
        if not experts:
            experts.update({e: loaded.expert(index, e) for e in range(loaded.num_experts)})
        kept = routing
        if pruning is not None:
            weights, ids = pruning(index, routing.weights, routing.ids)
            kept = Routing(routing.hidden, ids, weights)
        routed = experts_output(kept, experts.__getitem__, loaded.num_experts, activation)
        return (output + routed.view_as(output).to(output.dtype)).cpu(), routing

    yield run
    model.release_layer(index)


def final_hidden(
    loaded: LoadedModel, tokens: torch.Tensor, pruning: Pruning | None = None
) -> list[torch.Tensor]:
    """Token windows [S, L] through all decoder layers; blocks [B, L, H] in main memory."""
    blocks = [block.cpu() for block in loaded.model.embed(tokens)]
    for index in range(loaded.model.num_layers):
        with open_layer(loaded, index) as run:
            blocks[:] = [run(block, pruning)[0] for block in blocks]
    return blocks


@torch.no_grad()
def mean_divergences(
    loaded: LoadedModel, base: list[torch.Tensor], others: Sequence[list[torch.Tensor]]
) -> list[float]:
    """Mean KL(base || other) per token of one model's hidden states, blocks [B, L, H], in nats."""
    if not others:
        return []
    # Window by window, the base first: its logits are computed once and the head is read once.
    windows = [
        states[b][w : w + 1]
        for b, block in enumerate(base)
        for w in range(block.shape[0])
        for states in (base, *others)
    ]
    found: list[list[torch.Tensor]] = [[] for _ in others]
    for i, row in enumerate(loaded.model.logits(windows)):
        other = i % (1 + len(others)) - 1
        if other < 0:
            log_q = row.log_softmax(-1)
        else:
            found[other].append(_divergence(log_q, row.log_softmax(-1)).mean())
    return [float(torch.stack(each).double().mean()) for each in found]


def _divergence(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """KL(q || p) of each row of log-probabilities [L, vocabulary]."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def compare(
    scored: LoadedModel,
    hidden: list[torch.Tensor],
    base: LoadedModel,
    base_hidden: list[torch.Tensor],
    tokens: torch.Tensor,
) -> dict[str, float]:
    """The figures of an Evaluation, from the `final_hidden` of a model and of its base."""
    return _figures(*_score(scored, hidden, base, base_hidden, tokens))


def _score_streamed(
    scored: LoadedModel,
    base: LoadedModel | None,
    tokens: torch.Tensor,
    pruning: Pruning | None,
) -> tuple[_Scores, _Scores | None]:
    base_hidden = None if base is None else final_hidden(base, tokens)
    return _score(scored, final_hidden(scored, tokens, pruning), base, base_hidden, tokens)


def _score(
    scored: LoadedModel,
    hidden: list[torch.Tensor],
    base: LoadedModel | None,
    base_hidden: list[torch.Tensor] | None,
    tokens: torch.Tensor,
) -> tuple[_Scores, _Scores | None]:
    logits = scored.model.logits(hidden)
    base_logits: Iterator[torch.Tensor | None] = iter([None] * len(tokens))
    if base is not None and base_hidden is not None:
        base_logits = base.model.logits(base_hidden)
    losses, base_losses, divergences = [], [], []
    for window, row, base_row in zip(tokens, logits, base_logits, strict=True):
        target = window[1:].to(row.device).unsqueeze(1)
        log_p = row[:-1].log_softmax(-1)
        losses.append(-log_p.gather(1, target).double().mean())
        if base_row is not None:
            log_q = base_row[:-1].to(row.device).log_softmax(-1)
            base_losses.append(-log_q.gather(1, target).double().mean())
            divergences.append(_divergence(log_q, log_p).double().mean())
    loss = torch.stack(losses).cpu()
    if base is None:
        return _Scores(loss, None), None
    return (
        _Scores(loss, torch.stack(divergences).cpu()),
        _Scores(torch.stack(base_losses).cpu(), None),
    )


class _DenseReader:
    """Reads tensors by their original names, dequantizing int4 linears on the way."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __call__(self, names: list[str]) -> Mapping[str, torch.Tensor]:
        plain = [name for name in names if name in self._checkpoint]
        found = self._checkpoint.read_weights(plain)
        for name in names:
            if name not in found:
                prefix = name.removesuffix("weight")
                pair = self._checkpoint.read([prefix + "qweight", prefix + "scales"])
                found[name] = packing.dequantize_int4_linear(*pair.values())
        return found


def _with_dense_weights(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint's table of tensors with int4 linears under their original names."""
    tensors = dict(checkpoint.tensors)
    for name in checkpoint.tensors:
        if name.endswith(".qweight"):
            tensors[name.removesuffix("qweight") + "weight"] = tensors.pop(name)
            tensors.pop(name.removesuffix("qweight") + "scales", None)
    return Checkpoint(checkpoint.path, checkpoint.config, tensors)


_VLLM_PROGRAM = """
import json, os, sys
job = json.load(open(sys.argv[1]))
from vllm import LLM, SamplingParams
llm = LLM(model=job["model"], max_model_len=job["length"] + 1, enforce_eager=True,
          trust_remote_code=job["trust_remote_code"], enable_prefix_caching=False,
          dtype="auto", additional_config=job["additional_config"])
params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
outputs = llm.generate([{"prompt_token_ids": w} for w in job["windows"]], params)
losses = []
for window, output in zip(job["windows"], outputs):
    rows = output.prompt_logprobs[1:]
    losses.append(-sum(r[t].logprob for r, t in zip(rows, window[1:])) / len(rows))
with open(sys.argv[2] + ".part", "w") as f:
    json.dump(losses, f)
os.rename(sys.argv[2] + ".part", sys.argv[2])
"""


def _score_with_vllm(
    path: Path,
    tokens: torch.Tensor,
    trust_remote_code: bool,
    pruning: str | float | None = None,
) -> torch.Tensor:
    """Mean loss of each window from vLLM's prompt logprobs; in a process of its own, which gives
    the engine's memory back."""
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise UserError('vLLM is not installed; pip install "mcmoe-vllm[vllm]"')
    job = {
        "model": str(path),
        "length": tokens.shape[1],
        "windows": tokens.tolist(),
        "trust_remote_code": trust_remote_code,
        "additional_config": {} if pruning is None else {"mcmoe": {"pruning": pruning}},
    }
    losses = run_engine_program(
        _VLLM_PROGRAM,
        job,
        f"vLLM could not score {path}",
        # The engine insists on generating a token after a full window; nothing is computed at its
        # position, so the model's maximum still holds.
        VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",
    )
    return torch.tensor(losses, dtype=torch.float64)


def run_engine_program(program: str, job: Mapping[str, Any], failure: str, **settings: str) -> Any:
    """What a Python program writes as JSON. It is given two files, of `job` and for its result,
    and `settings` in its environment, where else what the user set stays.

    Raises UserError with `failure` and the last lines of its stderr if it writes no result.
    """
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "job.json"), Path(folder, "result.json")
        given.write_text(json.dumps(job))
        process = subprocess.run(
            [sys.executable, "-c", program, str(given), str(result)],
            env={**defaults, **os.environ, **settings},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # The result is renamed into place when it is whole. What an engine's threads do after
        # that, while the process ends, is not asked: some abort.
        if not result.exists():
            tail = "\n".join(process.stderr.strip().splitlines()[-15:])
            raise UserError(f"{failure}:\n{tail}")
        return json.loads(result.read_text())


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def print_evaluation(result: Evaluation) -> None:
    """The figures as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.windows} windows of {result.sequence_length} tokens")
    for column in ("", "perplexity", "loss", "standard error"):
        table.add_column(column, justify="left" if not column else "right")
    if result.base is not None and result.base_perplexity is not None:
        base_loss = math.log(result.base_perplexity)
        table.add_row(f"base {result.base}", f"{result.base_perplexity:.4f}", f"{base_loss:.5f}")
    table.add_row(
        result.model, f"{result.perplexity:.4f}", f"{result.loss:.5f}", f"{result.stderr:.5f}"
    )
    console = Console(highlight=False)
    console.print(table)
    if result.loss_difference is not None:
        change = 100 * math.expm1(result.loss_difference)
        console.print(
            f"loss {result.loss_difference:+.5f} (paired standard error "
            f"{result.paired_stderr:.5f}), perplexity {change:+.2f} %"
        )
    if result.kl is not None:
        console.print(f"mean KL to the base {result.kl:.5f} nats (error {result.kl_stderr:.5f})")
