"""Where the weights of routed experts come from, and how often they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from mcmoe_vllm.checkpoint.files import Checkpoint
from mcmoe_vllm.model.experts import Expert, ExpertWeights, deinterleave, stack_parts
from mcmoe_vllm.model.layout import Layout

ReadSlice = Callable[[str, int], torch.Tensor]  # name, i -> tensor[i]
KEPT_BYTES = 16 << 30  # of a layer's experts that wait for their next use


class ExpertReader(Protocol):
    """How a checkpoint keeps its experts; the rest sees `Expert`s."""

    def read(self, layer: int, expert: int) -> Expert | None:
        """The weights of an expert; None for a dropped one.

        Raises UserError for tensors that are missing, damaged or of other shapes.
        """
        ...


class StoredExperts:
    """The experts of a 16-bit checkpoint, in main memory, as they are stored: a matrix for each
    projection of each expert, or a tensor with those of all."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout) -> None:
        self._checkpoint, self._layout = checkpoint, layout

    def read(self, layer: int, expert: int) -> Expert:
        layout = self._layout
        biases = read_biases(self._checkpoint.read_slice, layout, layer, expert)
        if not layout.has_fused_experts(layer):
            names = layout.expert_weights(layer, expert)
            weights = self._checkpoint.read_weights(names)
            return Expert(*stack_parts([weights[name] for name in names]), *biases)
        gate_up, down = (
            self._checkpoint.read_slice(name, expert) for name in layout.fused_experts(layer)
        )
        if layout.skeleton.are_transposed(layer):
            gate_up, down = gate_up.t().contiguous(), down.t().contiguous()
        if layout.skeleton.gatings[layer].interleaved:
            gate_up = deinterleave(gate_up)
        return Expert(gate_up, down, *biases)


def read_biases(
    read_slice: ReadSlice, layout: Layout, layer: int, expert: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Those of an expert's gate and up [2I], gates above ups, and of its down [H]; None where it
    has none. Compressed checkpoints have them as they were. read_slice: of the checkpoint."""
    names = layout.expert_biases(layer)
    if not names:
        return None, None
    gate_up, down = (read_slice(name, expert) for name in names)
    is_paired = layout.skeleton.gatings[layer].interleaved
    return deinterleave(gate_up) if is_paired else gate_up, down


class ExpertsOnDevice:
    """Another reader's experts, brought to a device and a dtype when they are read."""

    def __init__(self, reader: ExpertReader, device: torch.device, dtype: torch.dtype) -> None:
        self._reader, self._device, self._dtype = reader, device, dtype

    def read(self, layer: int, expert: int) -> Expert | None:
        found = self._reader.read(layer, expert)
        return None if found is None else found.to(self._device, self._dtype)


class LayerExperts:
    """The experts of one layer, each read once while the layer is open: `layer_experts(expert)`.

    Beyond KEPT_BYTES they are read again at every use.
    """

    def __init__(self, reader: ExpertReader, layer: int) -> None:
        self._reader, self._layer = reader, layer
        self._kept: dict[int, Expert | None] = {}
        self._room = KEPT_BYTES

    def __call__(self, expert: int) -> Expert | None:
        if expert in self._kept:
            return self._kept[expert]
        found = self._reader.read(self._layer, expert)
        nbytes = 0 if found is None else found.nbytes
        if nbytes <= self._room:
            self._room -= nbytes
            self._kept[expert] = found
        return found

    def present(self, expert: int) -> Expert:
        """An expert of a model that has dropped none."""
        found = self(expert)
        assert found is not None, f"expert {expert} of layer {self._layer} was dropped"
        return found

    def on(self, device: torch.device, dtype: torch.dtype) -> ExpertWeights:
        """The same experts on a device in a dtype, for `run_layer`."""

        def experts(expert: int) -> Expert | None:
            found = self(expert)
            return None if found is None else found.to(device, dtype)

        return experts

    def release(self) -> None:
        """Keep nothing any more."""
        self._kept.clear()
        self._room = KEPT_BYTES
