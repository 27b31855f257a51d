"""A Mixture of Experts that runs one decoder layer at a time, 16-bit or compressed.

The skeleton is a transformers model on the meta device, so it takes no memory; a layer's weights
are read when it is opened and dropped after it. Hidden states live in blocks of a few windows each.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mcmoe_vllm.checkpoint.files import Checkpoint
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.agreement import require_agreement, require_one_head
from mcmoe_vllm.model.architectures import Architecture, find_architecture
from mcmoe_vllm.model.expert_reader import (
    ExpertReader,
    ExpertsOnDevice,
    LayerExperts,
    SeparateExperts,
)
from mcmoe_vllm.model.experts import Activation, Routing
from mcmoe_vllm.model.memory import return_freed_memory
from mcmoe_vllm.model.packed import DequantizedLinears, PackedExperts, with_original_names
from mcmoe_vllm.model.skeleton import Skeleton, make_skeleton

BLOCK_TOKENS = 8192  # tokens that go through a layer at once

ReadTensors = Callable[[list[str]], Mapping[str, torch.Tensor]]


class _RoutedExpertsTap(nn.Module):
    """Stands where transformers keeps the routed experts: records the routing and adds nothing,
    so that a layer returns everything but the routed experts' part."""

    def __init__(self) -> None:
        super().__init__()
        self.routing: Routing | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.routing = Routing(hidden_states, top_k_index, top_k_weights)
        return torch.zeros_like(hidden_states)


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """A decoder layer in memory, and its routed experts.

    module: transformers' layer, its experts replaced by a tap; arguments: of a block of so many
    windows, what transformers hands to the layer; router_name: of the router in the module.
    """

    index: int
    module: nn.Module
    router_name: str
    experts: LayerExperts
    num_experts: int
    activation: Activation
    device: torch.device
    dtype: torch.dtype
    arguments: Callable[[torch.Tensor], dict[str, Any]]
    tap: _RoutedExpertsTap | None

    @property
    def is_moe(self) -> bool:
        return self.tap is not None

    @property
    def router(self) -> Any:
        """The router of a layer with experts."""
        return self.module.get_submodule(self.router_name)

    def run(
        self, block: torch.Tensor, changed: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, Routing | None]:
        """A block [B, L, H] on the device through everything but the routed experts; and what
        these would be given (None for a dense layer).

        changed: parameters to use instead of the layer's, by their names in it; gradients flow to
        these alone.
        """
        arguments = self.arguments(block)
        if changed is None:
            with torch.no_grad():
                output = self.module(block, **arguments)
        else:
            output = torch.func.functional_call(self.module, dict(changed), (block,), arguments)
        output = output[0] if isinstance(output, tuple) else output
        if self.tap is None:
            return output, None
        routing, self.tap.routing = self.tap.routing, None
        return output, routing


@dataclass(frozen=True)
class Outline:
    """What config.json and headers say of a model, before any weight is read."""

    checkpoint: Checkpoint
    architecture: Architecture
    num_layers: int
    moe_layers: list[int]
    num_experts: int
    hidden_size: int
    expert_width: int


@dataclass(frozen=True, eq=False)
class MoeModel:
    """Embedding, decoder layers and head of a checkpoint, each in memory only while in use.

    experts: where the routed experts' weights come from; quantization: None for a 16-bit model.
    Made by `open_model`.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    skeleton: Skeleton
    device: torch.device
    dtype: torch.dtype
    experts: ExpertReader
    read: ReadTensors
    quantization: QuantizationConfig | None = None
    _head: list[torch.Tensor] = field(default_factory=list)
    _arguments: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return self.skeleton.num_layers

    @property
    def num_experts(self) -> int:
        return self.skeleton.num_experts

    @property
    def hidden_size(self) -> int:
        return self.skeleton.hidden_size

    @property
    def expert_width(self) -> int:
        return self.skeleton.expert_width

    @property
    def moe_layers(self) -> list[int]:
        """The decoder layers with routed experts."""
        return self.skeleton.moe_layers

    @property
    def outline(self) -> Outline:
        return Outline(
            self.checkpoint,
            self.architecture,
            self.num_layers,
            self.moe_layers,
            self.num_experts,
            self.hidden_size,
            self.expert_width,
        )

    @property
    def activation(self) -> Activation:
        """The experts' activation function."""
        from transformers.activations import ACT2FN

        return ACT2FN[getattr(self.config, self.architecture.activation)]

    @property
    def config(self) -> Any:
        """Transformers' config object."""
        return self.skeleton.config

    def with_experts(self, experts: ExpertReader) -> MoeModel:
        """The same model with experts from elsewhere."""
        other = copy.copy(self)
        object.__setattr__(other, "experts", experts)
        return other

    @torch.no_grad()
    def embed(self, windows: torch.Tensor) -> list[torch.Tensor]:
        """Token windows [S, L] to blocks of hidden states [B, L, hidden]."""
        name = f"{self.architecture.embedding}.weight"
        weight = self.read([name])[name].to(self.device, self.dtype)
        per_block = max(1, BLOCK_TOKENS // windows.shape[1])
        blocks = [
            nn.functional.embedding(part.to(self.device), weight)
            for part in windows.split(per_block)
        ]
        self._arguments.clear()  # of windows of another length
        for block in blocks:
            self._arguments_of(0, block)
        return blocks

    @contextmanager
    def open_layer(self, index: int) -> Iterator[DecoderLayer]:
        """`load_layer` for a while."""
        layer = self.load_layer(index)
        yield layer
        layer.experts.release()
        self.release_layer(index)

    def load_layer(self, index: int) -> DecoderLayer:
        """Decoder layer `index` with its weights; its routed experts are read when needed."""
        module = self._body.layers[index]
        block = getattr(module, self.architecture.module)
        tap = None
        if hasattr(block, self.architecture.experts):
            tap = _RoutedExpertsTap()
            setattr(block, self.architecture.experts, tap)
        self._load_parameters(module, index)
        return DecoderLayer(
            index,
            module,
            self.architecture.router_module,
            LayerExperts(self.experts, index),
            self.num_experts,
            self.activation,
            self.device,
            self.dtype,
            lambda given: self._arguments_of(index, given),
            tap,
        )

    def release_layer(self, index: int) -> None:
        self._body.layers[index].to("meta")
        return_freed_memory()

    def parameter_names(self, index: int) -> list[str]:
        """Checkpoint names of a layer's tensors that are not routed experts'."""
        return [
            name
            for name in self.checkpoint.names(self.architecture.layer_prefix(index))
            if not self.architecture.is_routed_expert(name)
        ]

    @torch.no_grad()
    def logits(self, blocks: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Final hidden states to float32 logits [L, vocabulary], window by window."""
        for block in blocks:
            for window in block:
                yield self.head(window.to(self.device))

    def head(self, window: torch.Tensor) -> torch.Tensor:
        """Final hidden states [L, H] to float32 logits [L, vocabulary]; gradients may flow."""
        if not self._head:
            self._head.append(self._read_head())
        return nn.functional.linear(self._body.norm(window), self._head[0]).float()

    @property
    def _body(self) -> Any:
        return self.skeleton.body

    def _load_parameters(self, module: nn.Module, index: int) -> None:
        prefix = self.architecture.layer_prefix(index)
        names = {
            self.architecture.module_name(name).removeprefix(prefix): name
            for name in self.parameter_names(index)
        }
        wanted = dict(module.named_parameters())
        tensors = self.read([names[name] for name in wanted])
        state = {name: tensors[names[name]].to(self.device, self.dtype) for name in wanted}
        module.load_state_dict(state, strict=False, assign=True)

    def _arguments_of(self, index: int, block: torch.Tensor) -> dict[str, Any]:
        """What transformers hands to a layer with a block of so many windows."""
        windows = block.shape[0]
        if windows not in self._arguments:
            self._arguments[windows] = _record_layer_arguments(self._body, block)
        return self._arguments[windows][index]

    def _read_head(self) -> torch.Tensor:
        names = self.architecture
        source = names.embedding if self.skeleton.ties_head else names.head
        norm, head = f"{names.norm}.weight", f"{source}.weight"
        tensors = self.read([norm, head])
        weight = tensors[norm].to(self.device, self.dtype)
        self._body.norm.load_state_dict({"weight": weight}, assign=True)
        self._body.norm.requires_grad_(False)
        return tensors[head].to(self.device, self.dtype)


def open_model(
    checkpoint: Checkpoint,
    device: str = "auto",
    dtype: torch.dtype | None = torch.float32,
    *,
    as_stored: bool = False,
) -> MoeModel:
    """A 16-bit or mcmoe checkpoint ready to run layer by layer.

    dtype: float32 on every device unless asked otherwise, so that figures do not depend on it;
    None: float32 on a CPU, bfloat16 on a GPU. as_stored: leave experts in main memory as they are
    stored, for callers that need them exactly and seldom.
    Raises UserError for unsupported architectures, other quantization methods, unusable configs,
    and for any tensor that is not as config.json says.
    """
    architecture = find_architecture(checkpoint.config)
    settings = checkpoint.config.get("quantization_config")
    quantization = None if settings is None else QuantizationConfig.from_dict(settings)
    place = choose_device(device)
    dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    skeleton = make_skeleton(checkpoint, architecture, dtype)
    require_agreement(checkpoint, skeleton, quantization)
    require_one_head(checkpoint, skeleton)
    _make_tables(skeleton, place)
    reader: ExpertReader = SeparateExperts(checkpoint, architecture)
    if quantization is not None:
        reader = PackedExperts(checkpoint, architecture, quantization)
    return MoeModel(
        checkpoint if quantization is None else with_original_names(checkpoint),
        architecture,
        skeleton,
        place,
        dtype,
        reader if as_stored else ExpertsOnDevice(reader, place, dtype),
        checkpoint.read_weights if quantization is None else DequantizedLinears(checkpoint),
        quantization,
    )


def choose_device(name: str) -> torch.device:
    """ "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N". Raises UserError for others."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise UserError(f"device is {name!r:.60}, allowed are auto, cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device is {name!r} but torch finds no CUDA GPU; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"device is {name!r}, this machine's are cuda:0 to "
                f"cuda:{torch.cuda.device_count() - 1}"
            )
    return device


def _make_tables(skeleton: Skeleton, device: torch.device) -> None:
    """The rotary tables, which no checkpoint stores, on the device."""
    with torch.device(device):
        skeleton.body.rotary_emb = type(skeleton.body.rotary_emb)(config=skeleton.config)


def _record_layer_arguments(body: Any, block: torch.Tensor) -> list[dict[str, Any]]:
    """The keyword arguments (mask, rotary tables, ...) that each decoder layer would be given."""
    recorded: list[dict[str, Any]] = []

    class Recorder(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            # Models may choose masks by an attribute of the layer.
            for name in ("attention_type", "layer_type"):
                if hasattr(layer, name):
                    setattr(self, name, getattr(layer, name))

        def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
            recorded.append(arguments)
            return hidden_states

    layers, norm = body.layers, body.norm
    try:
        body.layers = nn.ModuleList(Recorder(layer) for layer in layers)
        body.norm = nn.Identity()
        with torch.no_grad():
            body(inputs_embeds=block, use_cache=False)
    finally:
        body.layers, body.norm = layers, norm
    return recorded
