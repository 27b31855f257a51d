"""A Mixture of Experts that runs one decoder layer at a time, 16-bit or compressed.

The skeleton is a transformers model on the meta device, so it takes no memory; a layer's weights
are read when it is opened and dropped after it. Hidden states live in blocks of a few windows each.
What comes before the layers and behind them is the model's own forward, its layers replaced by
stand-ins: whatever a family does there is done.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mcmoe_vllm.checkpoint.files import Checkpoint
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.checkpoint.sources import with_16_bit_tensors
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.agreement import open_layout
from mcmoe_vllm.model.decoder_layer import (
    Arguments,
    DecoderLayer,
    ExpertsTap,
    LastLayer,
    StandIn,
)
from mcmoe_vllm.model.expert_reader import (
    ExpertReader,
    ExpertsOnDevice,
    LayerExperts,
    StoredExperts,
)
from mcmoe_vllm.model.layout import Layout
from mcmoe_vllm.model.memory import return_freed_memory
from mcmoe_vllm.model.packed import PackedExperts, with_original_names
from mcmoe_vllm.model.skeleton import Skeleton

BLOCK_TOKENS = 8192  # tokens that go through a layer at once


@dataclass(frozen=True)
class Outline:
    """What config.json and headers say of a model, before any weight is read."""

    checkpoint: Checkpoint
    layout: Layout
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
    layout: Layout
    skeleton: Skeleton
    device: torch.device
    dtype: torch.dtype
    experts: ExpertReader
    quantization: QuantizationConfig | None = None
    _loaded: set[str] = field(default_factory=set)
    _arguments: dict[int, list[Arguments]] = field(default_factory=dict)
    _joins: dict[int, float | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.layout.name

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
    def config(self) -> Any:
        """Transformers' config of the language model."""
        return self.skeleton.text_config

    @property
    def vocabulary(self) -> int:
        return int(self.skeleton.text_config.vocab_size)

    @property
    def moe_layers(self) -> list[int]:
        """The decoder layers with routed experts."""
        return self.skeleton.moe_layers

    @property
    def outline(self) -> Outline:
        return Outline(
            self.checkpoint,
            self.layout,
            self.num_layers,
            self.moe_layers,
            self.num_experts,
            self.hidden_size,
            self.expert_width,
        )

    def with_experts(self, experts: ExpertReader) -> MoeModel:
        """The same model with experts from elsewhere."""
        other = copy.copy(self)
        object.__setattr__(other, "experts", experts)
        return other

    @torch.no_grad()
    def embed(self, windows: torch.Tensor) -> list[torch.Tensor]:
        """Token windows [S, L] to blocks of hidden states [B, L, hidden]."""
        self._load_outside(lambda parameter: parameter not in self.skeleton.head_parameters)
        per_block = max(1, BLOCK_TOKENS // windows.shape[1])
        self._arguments.clear()  # of windows of another length
        blocks = []
        for part in windows.split(per_block):
            given = self._pass_through(input_ids=part.to(self.device))
            self._arguments[part.shape[0]] = [arguments for arguments, _ in given]
            blocks.append(given[0][1])
        self._release_outside()
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
        module = self.skeleton.body.layers[index]
        tap = None
        routers = self.skeleton.routers  # looked for while the experts are there
        if index in self.skeleton.experts:
            parent, _, name = self.skeleton.experts[index].rpartition(".")
            tap = ExpertsTap()
            setattr(module.get_submodule(parent), name, tap)
        prefix = f"{self.skeleton.layers}.{index}."
        self._load(module, prefix)
        return DecoderLayer(
            index,
            module,
            routers.get(index),
            LayerExperts(self.experts, index),
            self.num_experts,
            self.skeleton.activation(self.moe_layers[0] if tap is None else index),
            self.device,
            self.dtype,
            lambda given: self._arguments_of(index, given),
            tap,
            self._joins,
        )

    def release_layer(self, index: int) -> None:
        self.skeleton.body.layers[index].to("meta")
        return_freed_memory()

    def parameter_names(self, index: int) -> list[str]:
        """Checkpoint names of a layer's tensors that are not routed experts'."""
        return [
            name
            for name in self.checkpoint.names(self.layout.layer_prefix(index))
            if not self.layout.is_routed_expert(name)
        ]

    @torch.no_grad()
    def logits(self, blocks: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Final hidden states to float32 logits [L, vocabulary], window by window."""
        for block in blocks:
            for window in block:
                yield self.head(window.to(self.device))

    def head(self, window: torch.Tensor) -> torch.Tensor:
        """Final hidden states [L, H] to float32 logits [L, vocabulary]; gradients may flow."""
        self._load_outside(lambda parameter: parameter not in self.skeleton.embedding_parameters)
        return self._finish(window.unsqueeze(0)).squeeze(0).float()

    def _load_outside(self, wanted: Callable[[str], bool]) -> None:
        """Parameters outside the decoder layers that are wanted and not there yet."""
        skeleton = self.skeleton
        outside = [p for p in skeleton.shapes if skeleton.split(p)[0] is None and wanted(p)]
        missing = [p for p in outside if p not in self._loaded]
        if not missing:
            return
        sources = {p: self._source(p) for p in missing}
        tensors = self.checkpoint.read_weights(sorted(set(sources.values())))
        state = {p: self._placed(p, tensors[name]) for p, name in sources.items()}
        skeleton.model.load_state_dict(state, strict=False, assign=True)
        skeleton.model.requires_grad_(False)
        self._loaded.update(missing)

    def _release_outside(self) -> None:
        """Drop what comes before the layers; the head stays once it is there, as it is used window
        by window."""
        if self._loaded & set(self.skeleton.head_parameters):
            return
        for parameter in self._loaded:
            path, _, name = parameter.rpartition(".")
            module = self.skeleton.model.get_submodule(path)
            held = module._parameters if name in module._parameters else module._buffers
            value = held[name].to("meta")
            held[name] = nn.Parameter(value, False) if held is module._parameters else value
        self._loaded.clear()
        return_freed_memory()

    def _load(self, module: nn.Module, prefix: str) -> None:
        """A decoder layer's parameters and buffers."""
        skeleton = self.skeleton
        wanted = [p for p in skeleton.shapes if p.startswith(prefix) and not skeleton.is_experts(p)]
        tensors = self.checkpoint.read_weights([self._source(p) for p in wanted])
        state = {p.removeprefix(prefix): self._placed(p, tensors[self._source(p)]) for p in wanted}
        module.load_state_dict(state, strict=False, assign=True)
        skeleton.make_tables(module, self.device)

    def _source(self, parameter: str) -> str:
        """The tensor that a parameter is read from."""
        if parameter in self.skeleton.head_parameters and self.skeleton.ties_head:
            (parameter,) = self.skeleton.embedding_parameters
        return self.layout.stored[parameter]

    def _placed(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.device)
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.float32 if self.skeleton.stays_float32(parameter) else self.dtype)

    def _arguments_of(self, index: int, block: torch.Tensor) -> Arguments:
        """What transformers hands to a layer with a block of so many windows."""
        windows = block.shape[0]
        if windows not in self._arguments:
            ends = (*self.skeleton.head_parameters, *self.skeleton.embedding_parameters)
            self._load_outside(lambda parameter: parameter not in ends)
            given = self._pass_through(inputs_embeds=block)
            self._arguments[windows] = [arguments for arguments, _ in given]
        return self._arguments[windows][index]

    @torch.no_grad()
    def _pass_through(self, **inputs: torch.Tensor) -> list[tuple[Arguments, torch.Tensor]]:
        """What each decoder layer would be given, and the states that the first one is."""
        seen: list[tuple[Arguments, torch.Tensor]] = []
        with self._stand_ins(seen, stop=True), suppress(LastLayer):
            self.skeleton.base(**inputs, use_cache=False)
        return seen

    def _finish(self, block: torch.Tensor) -> torch.Tensor:
        """The last layer's output [B, L, H] to logits."""
        with self._stand_ins([], stop=False):
            return self.skeleton.model(inputs_embeds=block, use_cache=False).logits

    @contextmanager
    def _stand_ins(self, seen: list[tuple[Arguments, torch.Tensor]], stop: bool) -> Iterator[None]:
        """Layers that record what they are given; the last one ends the run, or hands it on."""
        body = self.skeleton.body
        layers = body.layers
        last = len(layers) - 1
        try:
            body.layers = nn.ModuleList(
                StandIn(layer, seen, stop and index == last) for index, layer in enumerate(layers)
            )
            yield
        finally:
            body.layers = layers


def open_model(
    checkpoint: Checkpoint,
    device: str = "auto",
    dtype: torch.dtype | None = torch.float32,
    *,
    as_stored: bool = False,
) -> MoeModel:
    """A 16-bit or mcmoe checkpoint ready to run layer by layer, or one in a format of
    `checkpoint.sources`, which runs as the 16-bit model that it dequantizes to.

    dtype: float32 on every device unless asked otherwise, so that figures do not depend on it;
    None: float32 on a CPU, bfloat16 on a GPU. as_stored: leave experts in main memory as they are
    stored, for callers that need them exactly and seldom.
    Raises UserError for unsupported architectures, other quantization methods, unusable configs,
    and for any tensor that is not as config.json says.
    """
    checkpoint = with_16_bit_tensors(checkpoint)
    settings = checkpoint.config.get("quantization_config")
    quantization = None if settings is None else QuantizationConfig.from_dict(settings)
    place = choose_device(device)
    dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    layout = open_layout(checkpoint, quantization, dtype)
    layout.skeleton.make_tables(layout.skeleton.model, place)
    reader: ExpertReader = StoredExperts(checkpoint, layout)
    if quantization is not None:
        reader = PackedExperts(checkpoint, layout, quantization)
    return MoeModel(
        checkpoint if quantization is None else with_original_names(checkpoint),
        layout,
        layout.skeleton,
        place,
        dtype,
        reader if as_stored else ExpertsOnDevice(reader, place, dtype),
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
