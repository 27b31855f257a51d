"""A compressed checkpoint, read by the names and shapes of the original model."""

from __future__ import annotations

import torch

from mcmoe_kernels.formats import packing
from mcmoe_vllm.checkpoint.files import Checkpoint
from mcmoe_vllm.checkpoint.format import QuantizationConfig, stored_scale
from mcmoe_vllm.checkpoint.view import Computed, View
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.expert_reader import read_biases
from mcmoe_vllm.model.experts import Expert, stack_parts
from mcmoe_vllm.model.layout import Layout
from mcmoe_vllm.widths import code_bits


class PackedExperts:
    """Experts of an mcmoe checkpoint, dequantized to float32."""

    def __init__(
        self, checkpoint: Checkpoint, layout: Layout, quantization: QuantizationConfig
    ) -> None:
        self._checkpoint, self._layout = checkpoint, layout
        self._quantization = quantization

    def read(self, layer: int, expert: int) -> Expert | None:
        names, groups = self._layout.expert_weights(layer, expert), self._layout.groups
        widths = [self._quantization.bits(layer, group)[expert] for group in groups]
        if widths[0] == 0:
            return None
        parts = [
            read_expert_matrix(self._checkpoint, name, width)
            for name, width in zip(names, widths, strict=True)
        ]
        biases = read_biases(self._checkpoint.read_slice, self._layout, layer, expert)
        return Expert(*stack_parts(parts), *biases)


def read_expert_matrix(checkpoint: Checkpoint, name: str, bits: int) -> torch.Tensor:
    """A packed expert matrix, dequantized to float32 [N, K].

    Raises UserError if the tensors' shapes contradict the width in config.json.
    """
    packed, scale = checkpoint.read([f"{name}_packed", f"{name}_scale"]).values()
    scale = stored_scale(scale, bits, f"{name}_scale")
    width = code_bits(bits)
    if packed.shape[1] % width or (packed.shape[1] * 8 // width) % scale.shape[1]:
        raise UserError(
            f"{name}_packed is {list(packed.shape)} with scales {list(scale.shape)}: "
            f"config.json says {bits} bits, which does not fit"
        )
    return packing.dequantize(packed, scale, bits)


def with_original_names(checkpoint: Checkpoint) -> View:
    """The checkpoint with quantized tensors under their original names; what its table says of
    those is of their codes. int4 linears are dequantized to float32 when they are read; experts,
    whose widths only config.json tells, are not read here."""
    tensors, computed = dict(checkpoint.tensors), {}
    for name in checkpoint.tensors:
        for codes, scales, weight in (
            (".qweight", ".scales", ".weight"),
            ("weight_packed", "weight_scale", "weight"),
        ):
            if name.endswith(codes):
                prefix = name.removesuffix(codes)
                original, pair = prefix + weight, (name, prefix + scales)
                tensors[original] = tensors.pop(name)
                tensors.pop(prefix + scales, None)
                if codes == ".qweight":
                    computed[original] = Computed(pair, packing.dequantize_int4_linear)
    return View(checkpoint.path, checkpoint.config, tensors, checkpoint, computed)
