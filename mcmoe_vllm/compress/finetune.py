"""Finetuning: what stays real in a quantized model answers for what rounding changed.

Scales, routers and norms are moved by gradient descent on the KL divergence to the 16-bit model,
over the calibration text. Codes and zeros stay, and so does everything else, so the checkpoint
keeps its size and layout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mcmoe_vllm.checkpoint.files import Checkpoint, open_checkpoint
from mcmoe_vllm.checkpoint.writing import write_shard
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.compress.student import Student
from mcmoe_vllm.compress.workdirectory import WorkDirectory
from mcmoe_vllm.model.divergence import require_finite
from mcmoe_vllm.model.moe_model import MoeModel, open_model

HELD_OUT = 8  # one window in so many decides whether finetuning helped
FITTED = 2  # one in so many of the others is learned from: all of them take twice the time
BATCH_TOKENS, BATCH_WINDOWS = 1024, 2  # a step's, at least: unpacking takes most of its time
SHARES = (1.0, 0.5, 0.25, 0.125)  # of the way that was moved, in the order in which they are tried
WARM_UP = 0.1  # of the steps
KEPT = "finetuned"  # the name of what is kept of it


@dataclass(frozen=True)
class Finetuned:
    """tensors: what changed, by checkpoint name, as it is to be stored; before, after: mean KL to
    the 16-bit model per token on windows that were held out (nats)."""

    tensors: dict[str, torch.Tensor]
    before: float
    after: float


def finetune(
    windows: torch.Tensor,
    teacher: Sequence[torch.Tensor],
    options: QuantizeOptions,
    device: torch.device,
    dtype: torch.dtype,
    work: WorkDirectory,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Finetune the finished checkpoint in its place; the mean KL before and after, and its seconds.

    windows, teacher: as in `finetune_model`; device, dtype: where and in what it is computed. What
    changed is kept in a file of its own first, so that a job killed while it rewrites shards learns
    nothing twice.
    """
    compressed = open_checkpoint(work.checkpoint)
    if not work.has(KEPT):
        began = time.perf_counter()
        found = finetune_model(
            open_model(compressed, str(device), dtype),
            windows,
            teacher,
            passes=options.traits.finetune_passes,
            rate=options.traits.finetune_rate,
            seed=options.seed,
            report=lambda step, steps, loss: say(f"finetuning step {step}/{steps}: KL {loss:.4f}"),
        )
        dtypes = compressed.read(list(found.tensors)) if found.tensors else {}
        work.save_tensors(KEPT, {n: t.to(dtypes[n].dtype) for n, t in found.tensors.items()})
        seconds = round(time.perf_counter() - began, 3)
        work.save(KEPT, {"before": found.before, "after": found.after, "seconds": seconds})
    _rewrite_shards(compressed, work.load_tensors(KEPT))
    return work.load(KEPT)


def _rewrite_shards(checkpoint: Checkpoint, changed: dict[str, torch.Tensor]) -> None:
    by_shard: dict[str, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        by_shard.setdefault(Path(info.shard).name, []).append(name)
    for shard, names in by_shard.items():
        if set(names) & set(changed):
            tensors = checkpoint.read(names)
            write_shard(checkpoint.path / shard, {n: changed.get(n, t) for n, t in tensors.items()})


def finetune_model(
    model: MoeModel,
    windows: torch.Tensor,
    teacher: Sequence[torch.Tensor],
    *,
    passes: int,
    rate: float,
    seed: int,
    report: Callable[[int, int, float], None] = lambda *_: None,
) -> Finetuned:
    """Move a quantized model towards what the 16-bit model says.

    windows: tokens [S, L]; teacher: the 16-bit model's final hidden states of them, blocks
    [B, L, H]; passes: over the windows; rate: largest step, relative to a value's size.
    report: called with step, steps and loss. `tensors` is empty if the held-out windows say that
    nothing was gained.
    """
    student = Student(model)
    states = [state for block in teacher for state in block]
    size = max(BATCH_WINDOWS, BATCH_TOKENS // windows.shape[1])
    held = [i for i in range(len(windows)) if i % HELD_OUT == HELD_OUT - 1] or [0]
    fitted = [i for i in range(len(windows)) if i not in held][::FITTED] or held

    def divergence(chosen: Sequence[int], learn: bool) -> float:
        loss = student.divergence(windows[list(chosen)], [states[i] for i in chosen], learn)
        require_finite(torch.tensor([loss]), "the KL divergence of finetuning")
        return loss

    def mean_divergence() -> float:
        parts = [held[i : i + size] for i in range(0, len(held), size)]
        return sum(divergence(part, False) * len(part) for part in parts) / len(held)

    before = mean_divergence()
    optimizer = torch.optim.Adam(student.moves, lr=rate, betas=(0.9, 0.95))
    steps = passes * -(-len(fitted) // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    for step, batch in enumerate(_batches(fitted, size, passes, seed), 1):
        optimizer.zero_grad(set_to_none=True)
        loss = divergence(batch, True)
        optimizer.step()
        schedule.step()
        report(step, steps, loss)
    after = shorten(student.moves, before, mean_divergence)
    student.release()
    if not after < before:
        return Finetuned({}, before, before)
    return Finetuned(student.stored(), before, after)


def _batches(items: Sequence[int], size: int, passes: int, seed: int) -> Iterator[list[int]]:
    """All items in a new order for each pass."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        order = torch.randperm(len(items), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [items[i] for i in order[start : start + size]]


@torch.no_grad()
def shorten(moves: Sequence[torch.Tensor], before: float, measure: Callable[[], float]) -> float:
    """Keep the share of SHARES of all moves, or none of them, that `measure` likes best; returns
    what it says of that. before: what it says of no move. Steps that are too long for a model that
    is nearly right already still point the right way."""
    ends = [move.clone() for move in moves]
    best, kept = before, 0.0

    def go(share: float) -> None:
        for move, end in zip(moves, ends, strict=True):
            move.copy_(end * share)

    for share in SHARES:
        go(share)
        found = measure()
        if found < best:
            best, kept = found, share
        elif kept:
            break
    go(kept)
    return best


def _share(step: int, steps: int) -> float:
    """Of the largest rate: a linear rise, then half a cosine."""
    rise = max(1, int(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
