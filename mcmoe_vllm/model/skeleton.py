"""A model without weights: transformers' config and modules, on the meta device.

It says which parameters a model has, and runs them layer by layer once they are put in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mcmoe_vllm.checkpoint.files import Checkpoint
from mcmoe_vllm.disk import is_integer
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.architectures import Architecture


@dataclass(frozen=True, eq=False)
class Skeleton:
    """config: transformers' config object; model: its causal language model, all on meta."""

    architecture: Architecture
    config: Any
    model: Any

    @property
    def body(self) -> Any:
        """Transformers' model without its head."""
        return self.model.get_submodule(self.architecture.layers.rpartition(".")[0])

    @property
    def num_layers(self) -> int:
        return len(self.body.layers)

    @property
    def num_experts(self) -> int:
        return int(getattr(self.config, self.architecture.num_experts))

    @property
    def top_k(self) -> int:
        return int(getattr(self.config, self.architecture.top_k))

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def expert_width(self) -> int:
        return int(getattr(self.config, self.architecture.expert_width))

    @property
    def moe_layers(self) -> list[int]:
        """The decoder layers with routed experts, ascending."""
        names = self.architecture
        blocks = [getattr(layer, names.module, None) for layer in self.body.layers]
        return [i for i, block in enumerate(blocks) if hasattr(block, names.experts)]

    @property
    def ties_head(self) -> bool:
        """Whether the head is the embedding."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter and stored buffer by its name in transformers."""
        return {name: tuple(value.shape) for name, value in self.model.state_dict().items()}

    def ignored(self) -> list[str]:
        """Patterns of stored names that transformers leaves unread."""
        return list(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or [])


def make_skeleton(
    checkpoint: Checkpoint, architecture: Architecture, dtype: torch.dtype = torch.float32
) -> Skeleton:
    """The skeleton that config.json describes. Raises UserError for a config that transformers
    refuses, and for one that describes more layers than there are tensors."""
    wrong = _too_many_layers(checkpoint.config, len(checkpoint.tensors))
    if wrong:
        raise UserError(f"{checkpoint.path}/config.json is not usable: {'; '.join(wrong[:5])}")
    import transformers

    settings = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    try:
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", dtype=dtype
            ).eval()
    except Exception as e:  # whatever a config class or a module thinks of a value
        raise UserError(
            f"{checkpoint.path}/config.json cannot be used: {describe_exception(e)}"
        ) from None
    if type(model).__name__ != architecture.name:
        raise UserError(
            f"{checkpoint.path}/config.json has the model_type {config.model_type!r} of "
            f"{type(model).__name__} and names {architecture.name} in architectures"
        )
    return Skeleton(architecture, config, model)


def describe_exception(error: Exception) -> str:
    """A library's exception in a line: what it says, and what it is where that says little."""
    said = " ".join(str(error).split())[:300]
    # A KeyError says no more than its key.
    return f"{type(error).__name__}: {said}" if isinstance(error, KeyError) or not said else said


def _too_many_layers(config: dict[str, Any], most: int) -> list[str]:
    """A layer costs time even without weights, and has a tensor at least."""
    return [
        f"{path} is {value}, there are {most} tensors"
        for path, value in _numbers(config)
        if "layers" in path.rpartition(".")[2] and value > most
    ]


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Every integer in a config, with the dotted path to it."""
    if is_integer(value):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else str(key))
