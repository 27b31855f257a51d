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

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mcmoe_vllm.checkpoint.files import open_checkpoint, own_config, resolve_model
from mcmoe_vllm.errors import UserError, reason_of
from mcmoe_vllm.evaluate.engine import score_with_vllm
from mcmoe_vllm.flags import out_of_range
from mcmoe_vllm.limits import MAX_WINDOWS
from mcmoe_vllm.model.divergence import divergence, require_finite
from mcmoe_vllm.model.moe_model import MoeModel, open_model
from mcmoe_vllm.model.runner import final_hidden
from mcmoe_vllm.model.text import (
    load_tokenizer,
    require_known_tokens,
    strided_windows,
    window_length,
)
from mcmoe_vllm.pruning.table import DECODE_ONLY, Pruning, parse_switch, read_table

WINDOWS = 256
ENGINES = ("transformers", "vllm")


@dataclass(frozen=True)
class Evaluation:
    """loss: mean negative log-likelihood per token (nats); stderr: of loss, over windows.

    dropped_fraction: expert activations that online pruning dropped; None where vLLM dropped them,
    which does not say.
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
    dropped_fraction: float | None = 0.0
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
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    engine: str = "transformers",
    windows: int = WINDOWS,
    sequence_length: int | None = None,
    pruning: str | float | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Evaluation:
    """Score a model (16-bit or mcmoe; folder or Hub name) on a text.

    engine: "transformers" (dequantized weights, layer by layer) or "vllm" (perplexity alone).
    pruning: as `parse_switch`; None prunes what is calibrated, as serving does.
    Raises UserError for unusable models or text, a base with another vocabulary, a pruning that
    leaves prompts alone, and losses that are not finite.
    """
    _require_usable(engine, windows, pruning, device)
    model, text = os.fspath(model), os.fspath(text)
    against = None if against is None else os.fspath(against)
    checkpoint = open_checkpoint(resolve_model(model))
    table = read_table(own_config(checkpoint))
    ratios = parse_switch(pruning, table)
    active = Pruning(ratios, table.renormalize) if table and ratios else None
    base = None if against is None else open_checkpoint(resolve_model(against))
    opened = [open_model(c, device) for c in (checkpoint, base) if c and engine != "vllm"]
    configs = [m.config for m in opened] or [
        _read_config(c.path, trust_remote_code) for c in (checkpoint, base) if c
    ]
    sizes = [int(config.vocab_size) for config in configs]
    if len(set(sizes)) > 1:
        raise UserError(
            f"{model} has a vocabulary of {sizes[0]}, {against} one of {sizes[1]}: "
            "only models with the same tokens can be compared"
        )
    tokenizer = load_tokenizer(checkpoint.path, trust_remote_code)
    length = window_length(configs[0], sequence_length)
    tokens = strided_windows(text, tokenizer, windows, length)
    require_known_tokens(tokens, sizes[0], checkpoint.path)
    base_scores = None
    if engine == "vllm":
        losses = score_with_vllm(checkpoint.path, tokens, trust_remote_code, pruning)
        scores = _Scores(losses, None)
        if base is not None:
            base_scores = _Scores(score_with_vllm(base.path, tokens, trust_remote_code), None)
    else:
        base_model = None if base is None else opened[1]
        scores, base_scores = _score_streamed(opened[0], base_model, tokens, active)
    dropped = active.dropped_fraction if active else 0.0
    return Evaluation(
        model=model,
        engine=engine,
        text=text,
        windows=tokens.shape[0],
        sequence_length=length,
        dropped_fraction=None if active and engine == "vllm" else dropped,
        base=against,
        **_figures(scores, base_scores),
    )


def _require_usable(engine: str, windows: int, pruning: str | float | None, device: str) -> None:
    wrong = out_of_range("windows", windows, 2, MAX_WINDOWS)  # two for a standard error
    if engine not in ENGINES:
        wrong.append(f"engine is {engine!r:.60}, allowed are {list(ENGINES)}")
    elif engine == "vllm" and device != "auto":
        wrong.append(f"device is {device!r:.60}, but vLLM chooses its device itself; leave it out")
    if pruning == DECODE_ONLY:
        wrong.append(
            f'pruning is "{DECODE_ONLY}", which prunes no prompt, and prompts are what is scored; '
            'ask for "on", "off" or a share'
        )
    if wrong:
        raise UserError("\n".join(wrong))


def _read_config(path: Path, trust_remote_code: bool) -> Any:
    """Transformers' config of any model that vLLM runs."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        return config.get_text_config()
    except Exception as e:  # its errors share no base
        raise UserError(f"{path}/config.json cannot be used: {reason_of(e)}") from None


def _figures(scores: _Scores, base: _Scores | None) -> dict[str, float]:
    """The numbers of an Evaluation. Raises UserError for losses that are not finite."""
    loss, stderr = _mean_and_error(scores.loss, "the loss")
    figures = {"loss": loss, "perplexity": _perplexity(loss), "stderr": stderr}
    if base is not None:
        base_loss, _ = _mean_and_error(base.loss, "the base's loss")
        difference, paired = _mean_and_error(scores.loss - base.loss, "the difference in loss")
        figures["base_perplexity"] = _perplexity(base_loss)
        figures |= {"loss_difference": difference, "paired_stderr": paired}
    if scores.kl is not None:
        figures["kl"], figures["kl_stderr"] = _mean_and_error(scores.kl, "the KL divergence")
    return figures


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        raise UserError(
            f"the loss is {loss:g} nats a token, its perplexity is beyond any number: the model's "
            "weights are damaged. Download or compress it again"
        ) from None


def compare(
    scored: MoeModel,
    hidden: list[torch.Tensor],
    base: MoeModel,
    base_hidden: list[torch.Tensor],
    tokens: torch.Tensor,
) -> dict[str, float]:
    """The figures of an Evaluation, from the `final_hidden` of a model and of its base."""
    return _figures(*_score(scored, hidden, base, base_hidden, tokens))


def _score_streamed(
    scored: MoeModel,
    base: MoeModel | None,
    tokens: torch.Tensor,
    pruning: Pruning | None,
) -> tuple[_Scores, _Scores | None]:
    base_hidden = None if base is None else final_hidden(base, tokens)
    return _score(scored, final_hidden(scored, tokens, pruning), base, base_hidden, tokens)


def _score(
    scored: MoeModel,
    hidden: list[torch.Tensor],
    base: MoeModel | None,
    base_hidden: list[torch.Tensor] | None,
    tokens: torch.Tensor,
) -> tuple[_Scores, _Scores | None]:
    logits = scored.logits(hidden)
    base_logits: Iterator[torch.Tensor | None] = iter([None] * len(tokens))
    if base is not None and base_hidden is not None:
        base_logits = base.logits(base_hidden)
    losses, base_losses, divergences = [], [], []
    for window, row, base_row in zip(tokens, logits, base_logits, strict=True):
        target = window[1:].to(row.device).unsqueeze(1)
        log_p = row[:-1].log_softmax(-1)
        losses.append(-log_p.gather(1, target).double().mean())
        if base_row is not None:
            log_q = base_row[:-1].to(row.device).log_softmax(-1)
            base_losses.append(-log_q.gather(1, target).double().mean())
            divergences.append(divergence(log_q, log_p).double().mean())
    loss = torch.stack(losses).cpu()
    if base is None:
        return _Scores(loss, None), None
    return (
        _Scores(loss, torch.stack(divergences).cpu()),
        _Scores(torch.stack(base_losses).cpu(), None),
    )


def _mean_and_error(values: torch.Tensor, what: str) -> tuple[float, float]:
    """Mean and its standard error."""
    require_finite(values, what)
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def print_evaluation(result: Evaluation) -> None:
    """The figures as a table on stdout."""
    from rich.table import Table

    from mcmoe_vllm.report.console import Console

    table = Table(title=f"{result.windows} windows of {result.sequence_length} tokens")
    for column in ("", "perplexity", "loss", "standard error"):
        table.add_column(column, justify="left" if not column else "right")
    if result.base is not None and result.base_perplexity is not None:
        base_loss = math.log(result.base_perplexity)
        table.add_row(f"base {result.base}", f"{result.base_perplexity:.4f}", f"{base_loss:.5f}")
    table.add_row(
        result.model, f"{result.perplexity:.4f}", f"{result.loss:.5f}", f"{result.stderr:.5f}"
    )
    console = Console()
    console.print(table)
    if result.loss_difference is not None:
        change = 100 * math.expm1(result.loss_difference)
        console.print(
            f"loss {result.loss_difference:+.5f} (paired standard error "
            f"{result.paired_stderr:.5f}), perplexity {change:+.2f} %"
        )
    if result.kl is not None:
        console.print(f"mean KL to the base {result.kl:.5f} nats (error {result.kl_stderr:.5f})")
