"""A checkpoint ready to run layer by layer, its experts dequantized where they are packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mcmoe_kernels.formats import packing
from mcmoe_vllm.checkpoint.files import Checkpoint
from mcmoe_vllm.checkpoint.format import QuantizationConfig, stored_scale
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.architectures import Architecture, find_architecture
from mcmoe_vllm.model.streaming import Routing, StreamedModel, choose_device, experts_output
from mcmoe_vllm.pruning.table import Pruning


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
