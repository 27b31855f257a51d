"""Tuning: what stays real in a quantized model answers for what rounding changed.

Scales (of experts and of int4 linears), routers and norms are moved by gradient descent on the KL
divergence to the 16-bit model, over the calibration text. Codes and zeros stay, and so does
everything else, so the checkpoint keeps its size and layout.

The model is held packed in main memory and unpacked layer by layer; activations are recomputed on
the way back, so that a device needs room for one layer and a batch of hidden states.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from mcmoe_kernels.formats import packing
from mcmoe_vllm.checkpoint.files import Checkpoint, open_checkpoint
from mcmoe_vllm.checkpoint.writing import write_index, write_shard
from mcmoe_vllm.compress.workdirectory import WorkDirectory
from mcmoe_vllm.disk import read_json, write_json
from mcmoe_vllm.model.loaded import LoadedModel, load_streamed
from mcmoe_vllm.model.streaming import run_expert
from mcmoe_vllm.quantize.codes import round_scale

if TYPE_CHECKING:
    from mcmoe_vllm.compress.job import Job


def finetune(job: Job, work: WorkDirectory) -> dict[str, Any]:
    """Tune the finished checkpoint in its place; the mean KL before and after, and its seconds.

    What changed is kept in a file of its own first, so that a job killed while it rewrites shards
    tunes nothing twice.
    """
    traits, folder = job.options.traits, work.checkpoint
    kept = work.path / "tuned.safetensors"
    summary = work.path / "tuned.json"
    if not summary.exists():
        began = time.perf_counter()
        found = work.load_hidden("quantize")
        assert found is not None
        compressed = open_checkpoint(folder)
        tuned = tune_model(
            load_streamed(compressed, str(job.model.device), job.model.dtype),
            job.windows,
            found[1][-len(found[1]) // 2 :] if traits.sequential else found[1],
            passes=traits.tuning_passes,
            rate=traits.tuning_rate,
            seed=job.options.seed,
            report=lambda step, steps, loss: job.progress.say(
                f"tuning step {step}/{steps}: KL {loss:.4f}"
            ),
        )
        dtypes = compressed.read(list(tuned.tensors)) if tuned.tensors else {}
        write_shard(kept, {n: t.to(dtypes[n].dtype) for n, t in tuned.tensors.items()})
        seconds = round(time.perf_counter() - began, 3)
        write_json(summary, {"before": tuned.before, "after": tuned.after, "seconds": seconds})
    changed = load_file(kept)
    compressed = open_checkpoint(folder)
    by_shard: dict[str, list[str]] = {}
    for name, info in compressed.tensors.items():
        by_shard.setdefault(Path(info.shard).name, []).append(name)
    for shard, names in by_shard.items():
        if set(names) & set(changed):
            tensors = compressed.read(names)
            write_shard(folder / shard, {n: changed.get(n, t) for n, t in tensors.items()})
    write_index(folder, sorted(by_shard))
    return dict(read_json(summary))


HELD_OUT = 8  # one window in so many decides whether tuning helped


FITTED = 2  # one in so many of the others is learned from: all of them take twice the time


BATCH_TOKENS, BATCH_WINDOWS = 1024, 2  # a step's, at least: unpacking takes most of its time


UNPACKED_BYTES = 2**28  # of codes that are unpacked once, not in every pass through their layer


SHARES = (1.0, 0.5, 0.25, 0.125)  # of the way tuned, in the order in which they are tried


WARM_UP = 0.1  # of the steps


NORMS_AND_ROUTER = ("norm.weight", "mlp.gate.weight")  # ends of their names in a layer


@dataclass(frozen=True)
class Tuned:
    """tensors: what changed, by checkpoint name, as it is to be stored; before, after: mean KL to
    the 16-bit model per token on windows that were held out (nats)."""

    tensors: dict[str, torch.Tensor]
    before: float
    after: float


@dataclass(frozen=True)
class _Matrix:
    """An expert matrix as it is stored (main memory), and the logarithm by which its scales grow,
    float32 [N, K/G] on the device. kept: its levels, where there is room for them."""

    name: str
    bits: int
    packed: torch.Tensor
    scale: torch.Tensor
    stretch: torch.Tensor
    kept: torch.Tensor | None = None

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros on the device, float32 [N, K/G]."""
        return packing.unpack_scale(self.scale.to(self.stretch.device), self.bits)

    def levels(self, zero: torch.Tensor) -> torch.Tensor:
        """Codes less zeros on the device, float32 [N, K/G, G]."""
        packed = self.packed.to(zero.device, non_blocking=True)
        codes = packing.unpack(packed, self.bits).float()
        return codes.unflatten(-1, (zero.shape[-1], -1)) - zero.unsqueeze(-1)

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K] on the device; gradients flow to the stretch."""
        scale, zero = self.grid()
        levels = self.levels(zero) if self.kept is None else self.kept
        return (levels * (scale * self.stretch.exp()).unsqueeze(-1)).flatten(-2)

    def stored(self) -> torch.Tensor:
        """The tensor of scales and zeros with the new scales."""
        scale, zero = packing.unpack_scale(self.scale, self.bits)
        grown = round_scale(scale * self.stretch.detach().cpu().exp())
        return packing.pack_scale(grown, zero, self.bits)


@dataclass(frozen=True)
class _Parameter:
    """A norm or router: its stored value, its size, and its move in units of that."""

    name: str
    value: torch.Tensor
    unit: torch.Tensor
    move: torch.Tensor

    def moved(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.value + self.unit * self.move).to(dtype)

    def stored(self) -> torch.Tensor:
        return self.moved(torch.float32).detach().cpu()


@dataclass(frozen=True)
class _Linear:
    """An int4 linear: its weights dequantized [N, K], its scales [K/G, N] as they are stored, and
    the logarithm by which these grow, [N, K/G]."""

    name: str
    value: torch.Tensor
    scale: torch.Tensor
    move: torch.Tensor

    def moved(self, dtype: torch.dtype) -> torch.Tensor:
        groups = self.value.unflatten(1, (self.move.shape[1], -1))
        return (groups * self.move.exp().unsqueeze(-1)).flatten(1).to(dtype)

    def stored(self) -> torch.Tensor:
        return round_scale(self.scale.float() * self.move.detach().cpu().t().exp())


@dataclass(frozen=True)
class _Layer:
    module: torch.nn.Module
    parameters: dict[str, _Parameter | _Linear]
    experts: dict[int, tuple[_Matrix, _Matrix, _Matrix]]  # gate, up, down


def tune_model(
    loaded: LoadedModel,
    windows: torch.Tensor,
    teacher: Sequence[torch.Tensor],
    *,
    passes: int,
    rate: float,
    seed: int,
    report: Callable[[int, int, float], None] = lambda *_: None,
) -> Tuned:
    """Tune a quantized model towards what the 16-bit model says.

    windows: tokens [S, L]; teacher: the 16-bit model's final hidden states of them, blocks
    [B, L, H]; passes: over the windows; rate: largest step, relative to a value's size.
    report: called with step, steps and loss. `tensors` is empty if the held-out windows say that
    nothing was gained.
    """
    model = loaded.model
    stored = open_checkpoint(model.checkpoint.path)
    layers = _keep_levels([_load_layer(loaded, stored, i) for i in range(model.num_layers)])
    learned = [p.move for layer in layers for p in layer.parameters.values()]
    learned += [m.stretch for layer in layers for e in layer.experts.values() for m in e]
    for value in learned:
        value.requires_grad_(True)
    states = [state for block in teacher for state in block]
    size = max(BATCH_WINDOWS, BATCH_TOKENS // windows.shape[1])
    held = [i for i in range(len(windows)) if i % HELD_OUT == HELD_OUT - 1] or [0]
    fitted = [i for i in range(len(windows)) if i not in held][::FITTED] or held

    def divergence(chosen: Sequence[int], learn: bool) -> float:
        """Mean KL over the chosen windows; with `learn` its gradients are added."""
        inputs = [model.embed(windows[list(chosen)])[0]]
        for index, layer in enumerate(layers):
            with torch.no_grad():
                inputs.append(_run(loaded, layer, index, inputs[-1]))
        final = inputs.pop().detach().requires_grad_(learn)
        total = 0.0
        for row, i in enumerate(chosen):
            with torch.no_grad():
                q = next(model.logits([states[i].to(model.device, model.dtype)[None]]))
                log_q = q.log_softmax(-1)
            with torch.set_grad_enabled(learn):
                log_p = model.head(final[row]).log_softmax(-1)
                loss = (log_q.exp() * (log_q - log_p)).sum(-1).mean() / len(chosen)
                total += loss.item()
            if learn:
                loss.backward()
        gradient = final.grad
        for index in reversed(range(len(layers)) if learn else ()):
            given = inputs[index].detach().requires_grad_(True)
            with torch.enable_grad():
                output = _run(loaded, layers[index], index, given)
            output.backward(gradient)
            gradient = given.grad
        return total

    def mean_divergence() -> float:
        parts = [held[i : i + size] for i in range(0, len(held), size)]
        return sum(divergence(part, False) * len(part) for part in parts) / len(held)

    before = mean_divergence()
    optimizer = torch.optim.Adam(learned, lr=rate, betas=(0.9, 0.95))
    steps = passes * -(-len(fitted) // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    generator = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(passes):
        order = torch.randperm(len(fitted), generator=generator).tolist()
        for start in range(0, len(order), size):
            optimizer.zero_grad(set_to_none=True)
            loss = divergence([fitted[i] for i in order[start : start + size]], True)
            optimizer.step()
            schedule.step()
            step += 1
            report(step, steps, loss)
    after = shorten(learned, before, mean_divergence)
    for index in range(model.num_layers):
        model.release_layer(index)
    if not after < before:
        return Tuned({}, before, before)
    tensors = {}
    for layer in layers:
        for parameter in layer.parameters.values():
            tensors[parameter.name] = parameter.stored()
        for matrices in layer.experts.values():
            tensors |= {m.name: m.stored() for m in matrices}
    return Tuned(tensors, before, after)


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


def _load_layer(loaded: LoadedModel, checkpoint: Checkpoint, index: int) -> _Layer:
    model, config = loaded.model, loaded.quantization
    assert config is not None
    module = model.load_layer(index)
    names = {model.architecture.module_name(n): n for n in model.parameter_names(index)}
    parameters: dict[str, _Parameter | _Linear] = {}
    for name, value in module.named_parameters():
        value.requires_grad_(False)
        stored = names.get(f"model.layers.{index}.{name}", name)
        scales = stored.removesuffix("weight") + "scales"
        if name.endswith(NORMS_AND_ROUTER):
            exact = value.detach().float()
            unit = exact.square().mean().sqrt()
            parameters[name] = _Parameter(stored, exact, unit, torch.zeros_like(exact))
        elif scales in checkpoint:
            scale = checkpoint.read([scales])[scales]
            still = torch.zeros(scale.t().shape, device=model.device)
            parameters[name] = _Linear(scales, value.detach().float(), scale, still)
    experts = {}
    if index in config.expert_bits:
        for e, (b13, b2) in enumerate(
            zip(config.bits(index, "w13"), config.bits(index, "w2"), strict=True)
        ):
            if b13:
                weights = zip(
                    model.architecture.expert_weights(index, e), (b13, b13, b2), strict=True
                )
                gate, up, down = (
                    _load_matrix(checkpoint, name, bits, model.device) for name, bits in weights
                )
                experts[e] = (gate, up, down)
    return _Layer(module, parameters, experts)


def _keep_levels(layers: Sequence[_Layer]) -> list[_Layer]:
    """The layers with the levels of as many matrices kept as UNPACKED_BYTES have room for."""
    room = UNPACKED_BYTES

    def keep(matrix: _Matrix) -> _Matrix:
        nonlocal room
        needed = 4 * (8 * matrix.packed.numel() // matrix.bits)  # float32 for every code
        if needed > room:
            return matrix
        room -= needed
        return replace(matrix, kept=matrix.levels(matrix.grid()[1]))

    return [
        replace(
            layer,
            experts={
                e: (keep(gate), keep(up), keep(down))
                for e, (gate, up, down) in layer.experts.items()
            },
        )
        for layer in layers
    ]


def _load_matrix(checkpoint: Checkpoint, name: str, bits: int, device: torch.device) -> _Matrix:
    prefix = name.removesuffix("weight")
    packed, scale = checkpoint.read([prefix + "weight_packed", prefix + "weight_scale"]).values()
    if device.type == "cuda":
        packed = packed.pin_memory()  # it goes to the GPU in every pass through its layer
    stretch = torch.zeros(scale.shape, device=device)
    return _Matrix(prefix + "weight_scale", bits, packed, scale, stretch)


def _run(loaded: LoadedModel, layer: _Layer, index: int, hidden: torch.Tensor) -> torch.Tensor:
    """A block [B, L, H] through a decoder layer with its parameters as they are now."""
    model = loaded.model
    changed = {name: p.moved(model.dtype) for name, p in layer.parameters.items()}
    output, routing = model.run_layer(layer.module, index, hidden, changed)
    if routing is None:
        return output
    total = torch.zeros_like(routing.hidden, dtype=torch.float32)
    for e, matrices in layer.experts.items():
        rows, weights = routing.tokens_of(e)
        if not rows.numel():
            continue
        gate, up, down = (m.dequantize().to(model.dtype) for m in matrices)
        y = run_expert(routing.hidden[rows], torch.cat([gate, up]), down, model.activation())
        total = total.index_add(0, rows, y.float() * weights.float().unsqueeze(1))
    return output + total.view_as(output).to(output.dtype)


def _share(step: int, steps: int) -> float:
    """Of the largest rate: a linear rise, then half a cosine."""
    rise = max(1, int(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
