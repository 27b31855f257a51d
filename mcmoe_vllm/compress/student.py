"""A quantized model that learns: what stays real in it, and the gradient of its divergence.

Scales (of experts and of int4 linears), routers and norms move; codes and zeros stay. The model is
held packed in main memory and unpacked layer by layer; activations are recomputed on the way back,
so that a device needs room for one layer and a batch of hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mcmoe_kernels.formats import packing
from mcmoe_kernels.quantize.columns import round_scale
from mcmoe_vllm.checkpoint.files import Checkpoint, open_checkpoint
from mcmoe_vllm.model.decoder_layer import DecoderLayer
from mcmoe_vllm.model.divergence import divergence
from mcmoe_vllm.model.expert_reader import read_biases
from mcmoe_vllm.model.experts import Expert, stack_parts
from mcmoe_vllm.model.moe_model import MoeModel
from mcmoe_vllm.model.runner import run_layer

UNPACKED_BYTES = 2**28  # of codes that are unpacked once, not in every pass through their layer


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
    """What moves in a decoder layer: parameters by their names in it, and of each expert that is
    present its matrices as they lie on disk; and what does not, biases as in `Expert`."""

    layer: DecoderLayer
    parameters: dict[str, _Parameter | _Linear]
    experts: dict[int, tuple[_Matrix, ...]]
    biases: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]]

    def expert(self, number: int) -> Expert | None:
        """An expert as it is now; gradients flow to its scales."""
        if number not in self.experts:
            return None
        dtype = self.layer.dtype
        w13, w2 = stack_parts([m.dequantize().to(dtype) for m in self.experts[number]])
        return Expert(w13, w2, *self.biases[number]).to(w13.device, dtype)

    def run(self, block: torch.Tensor) -> torch.Tensor:
        """A block [B, L, H] through the layer as it is now."""
        changed = {name: p.moved(self.layer.dtype) for name, p in self.parameters.items()}
        (output,) = run_layer(self.layer, [block], self.expert, changed=changed).outputs
        return output


class Student:
    """A compressed model whose real values may move. moves: their changes, leaves of the graph."""

    def __init__(self, model: MoeModel) -> None:
        self._model = model
        stored = open_checkpoint(model.checkpoint.path)
        layers = [_load_layer(model, stored, i) for i in range(model.num_layers)]
        self._layers = _keep_levels(layers)
        self.moves = [p.move for layer in self._layers for p in layer.parameters.values()]
        self.moves += [
            m.stretch for layer in self._layers for e in layer.experts.values() for m in e
        ]
        for move in self.moves:
            move.requires_grad_(True)

    def divergence(
        self, tokens: torch.Tensor, teacher: Sequence[torch.Tensor], learn: bool
    ) -> float:
        """Mean KL to the teacher per token, in nats; with `learn` its gradients are added.

        tokens: windows [B, L]; teacher: the 16-bit model's final hidden states of each, [L, H].
        """
        inputs = [self._model.embed(tokens)[0]]
        for layer in self._layers:
            with torch.no_grad():
                inputs.append(layer.run(inputs[-1]))
        final = inputs.pop().detach().requires_grad_(learn)
        total = 0.0
        for row, states in enumerate(teacher):
            loss = self._window_divergence(final[row], states, learn) / len(teacher)
            total += loss.item()
            if learn:
                loss.backward()
        if learn:
            self._backward(inputs, final.grad)
        return total

    def stored(self) -> dict[str, torch.Tensor]:
        """Everything that may have moved, by checkpoint name, as it is to be stored."""
        tensors = {}
        for layer in self._layers:
            for parameter in layer.parameters.values():
                tensors[parameter.name] = parameter.stored()
            for matrices in layer.experts.values():
                tensors |= {m.name: m.stored() for m in matrices}
        return tensors

    def release(self) -> None:
        """Drop the layers' weights."""
        for index in range(self._model.num_layers):
            self._model.release_layer(index)

    def _window_divergence(
        self, final: torch.Tensor, teacher: torch.Tensor, learn: bool
    ) -> torch.Tensor:
        model = self._model
        with torch.no_grad():
            q = next(model.logits([teacher.to(model.device, model.dtype)[None]]))
            log_q = q.log_softmax(-1)
        with torch.set_grad_enabled(learn):
            return divergence(log_q, model.head(final).log_softmax(-1)).mean()

    def _backward(self, inputs: Sequence[torch.Tensor], gradient: torch.Tensor | None) -> None:
        """From the last layer to the first, each run again with its gradients."""
        for layer, given in zip(reversed(self._layers), reversed(inputs), strict=True):
            given = given.detach().requires_grad_(True)
            with torch.enable_grad():
                output = layer.run(given)
            output.backward(gradient)
            gradient = given.grad


def _load_layer(model: MoeModel, checkpoint: Checkpoint, index: int) -> _Layer:
    config, layout = model.quantization, model.layout
    assert config is not None
    layer = model.load_layer(index)
    free = ("norm.weight", f"{layer.router_name}.weight")  # ends of their names in a layer
    parameters: dict[str, _Parameter | _Linear] = {}
    for name, value in layer.module.named_parameters():
        value.requires_grad_(False)
        stored = layout.stored_name(index, name)
        scales = stored.removesuffix("weight") + "scales"
        if name.endswith(free):
            exact = value.detach().float()
            unit = exact.square().mean().sqrt()
            parameters[name] = _Parameter(stored, exact, unit, torch.zeros_like(exact))
        elif scales in checkpoint:
            scale = checkpoint.read([scales])[scales]
            still = torch.zeros(scale.t().shape, device=model.device)
            parameters[name] = _Linear(scales, value.detach().float(), scale, still)
    experts: dict[int, tuple[_Matrix, ...]] = {}
    biases = {}
    if index in config.expert_bits:
        widths = zip(*(config.bits(index, group) for group in layout.groups), strict=True)
        for expert, parts in enumerate(widths):
            if parts[0]:
                experts[expert] = tuple(
                    _load_matrix(checkpoint, name, width, model.device)
                    for name, width in zip(layout.expert_weights(index, expert), parts, strict=True)
                )
                biases[expert] = read_biases(checkpoint.read_slice, layout, index, expert)
    return _Layer(layer, parameters, experts, biases)


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
            experts={e: tuple(map(keep, matrices)) for e, matrices in layer.experts.items()},
        )
        for layer in layers
    ]


def _load_matrix(checkpoint: Checkpoint, name: str, bits: int, device: torch.device) -> _Matrix:
    packed, scale = checkpoint.read([f"{name}_packed", f"{name}_scale"]).values()
    if device.type == "cuda":
        packed = packed.pin_memory()  # it goes to the GPU in every pass through its layer
    stretch = torch.zeros(scale.shape, device=device)
    return _Matrix(f"{name}_scale", bits, packed, scale, stretch)
