"""A model without weights: transformers' config and modules, on the meta device.

It says which parameters a model has, and runs them layer by layer once they are put in. What it
knows of a family it finds in transformers' modules: experts are the module of a decoder layer that
holds a three-dimensional `down_proj`, decoder layers the list whose members have one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from mcmoe_vllm.checkpoint.files import Checkpoint
from mcmoe_vllm.disk import is_integer
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.architectures import Architecture
from mcmoe_vllm.model.experts import Activation
from mcmoe_vllm.model.gating import Gating, activation_of, measure_gating

# What families call the same setting; of a config the first that it has.
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
ACTIVATION = ("hidden_act", "hidden_activation", "mlp_hidden_act")


@dataclass(frozen=True)
class ExpertSizes:
    """Of the routed experts: how many, what they are given, and how wide they are within."""

    count: int
    hidden: int
    width: int


@dataclass(frozen=True, eq=False)
class Skeleton:
    """config: transformers' config object; model: its causal language model, all on meta; layers:
    the path to the decoder layers in it; experts: decoder layer -> path of its experts within;
    modules: those experts, which taps may have replaced in the model since; gatings: how those
    combine gate and up."""

    architecture: Architecture
    config: Any
    model: Any
    layers: str
    experts: dict[int, str]
    modules: dict[int, Any]
    gatings: dict[int, Gating]

    @property
    def text_config(self) -> Any:
        """Of the language model, where the config is that of one with eyes or ears."""
        return self.config.get_text_config()

    @property
    def body(self) -> Any:
        """The module that holds the decoder layers."""
        return self.model.get_submodule(self.layers.rpartition(".")[0])

    @cached_property
    def num_layers(self) -> int:
        return len(self.body.layers)

    @cached_property
    def sizes(self) -> ExpertSizes:
        first = next(iter(self.experts))
        return _expert_sizes(self.modules[first])

    @property
    def num_experts(self) -> int:
        return self.sizes.count

    @property
    def hidden_size(self) -> int:
        return self.sizes.hidden

    @property
    def expert_width(self) -> int:
        return self.sizes.width

    @property
    def top_k(self) -> int:
        return int(getattr(self.text_config, self.setting(TOP_K)))

    @property
    def moe_layers(self) -> list[int]:
        """The decoder layers with routed experts, ascending."""
        return sorted(self.experts)

    @property
    def ties_head(self) -> bool:
        """Whether the head is the embedding."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    def setting(self, names: tuple[str, ...]) -> str:
        """Of several names of one setting that which the config has."""
        return next((n for n in names if hasattr(self.text_config, n)), names[0])

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter and stored buffer by its name in transformers."""
        return {name: tuple(value.shape) for name, value in self.model.state_dict().items()}

    @cached_property
    def integers(self) -> dict[str, tuple[str, ...]]:
        """Stored tensors that are no floating-point numbers, and what safetensors calls their
        type."""
        names = {torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL", torch.uint8: "U8"}
        state = self.model.state_dict()
        return {n: (names[v.dtype],) for n, v in state.items() if not v.is_floating_point()}

    def split(self, parameter: str) -> tuple[int | None, str]:
        """The decoder layer of a parameter, and its name in that layer; of one outside the layers,
        None and its whole name."""
        if not parameter.startswith(f"{self.layers}."):
            return None, parameter
        layer, _, inside = parameter.removeprefix(f"{self.layers}.").partition(".")
        return int(layer), inside

    @cached_property
    def text(self) -> str:
        """What the names of the language model's parameters begin with, but for its head's: other
        parts, such as a tower for pictures, are copied and never run."""
        return f"{self.layers.rpartition('.')[0]}."

    @property
    def only_for_tokens(self) -> list[str]:
        """Parameters that a run on states does without: the embedding's, but not in a wrapper,
        which looks among the states for the embedding of a picture's place."""
        return self.embedding_parameters if self.config is self.text_config else []

    def is_text(self, parameter: str) -> bool:
        ends = (*self.head_parameters, *self.embedding_parameters)
        return parameter.startswith(self.text) or parameter in ends

    def is_experts(self, parameter: str) -> bool:
        """Whether a parameter holds routed experts, or biases of theirs."""
        layer, inside = self.split(parameter)
        return layer in self.experts and inside.startswith(f"{self.experts[layer]}.")

    @property
    def base(self) -> Any:
        """Transformers' model without its head."""
        return getattr(self.model, self.model.base_model_prefix, self.model)

    @cached_property
    def embedding_parameters(self) -> list[str]:
        return self._parameters_of(self.model.get_input_embeddings())

    @cached_property
    def head_parameters(self) -> list[str]:
        return self._parameters_of(self.model.get_output_embeddings())

    def _parameters_of(self, module: Any) -> list[str]:
        paths = [path for path, m in self.model.named_modules() if m is module]
        return [f"{path}.{n}" for path in paths for n, _ in module.named_parameters()]

    def are_transposed(self, layer: int) -> bool:
        """Whether a layer's experts, all in one tensor, are stored [in, out]."""
        return bool(getattr(self.modules[layer], "is_transposed", False))

    def expert_parameters(self, layer: int) -> tuple[str, str]:
        """Gate and up, and down, of all experts of a layer."""
        path = f"{self.layers}.{layer}.{self.experts[layer]}"
        return f"{path}.gate_up_proj", f"{path}.down_proj"

    def expert_biases(self, layer: int) -> tuple[str, ...]:
        """Those of gate and up, and of down, of all experts of a layer; none where there are
        none."""
        names = tuple(f"{weight}_bias" for weight in self.expert_parameters(layer))
        return names if names[0] in self.shapes else ()

    @cached_property
    def has_biases(self) -> bool:
        """Whether experts have biases."""
        return any(self.expert_biases(layer) for layer in self.moe_layers)

    @property
    def activation_setting(self) -> tuple[str, Any]:
        """What the config calls the experts' activation, and its value."""
        name = self.setting(ACTIVATION)
        return name, getattr(self.text_config, name, "silu")  # a class without a choice

    def activation(self, layer: int) -> Activation:
        """What lies between the projections of a layer's experts."""
        return activation_of(self.modules[layer], self.gatings[layer])

    @cached_property
    def routers(self) -> dict[int, str | None]:
        """Decoder layer -> name of its router within it, where that is one matrix, with or without
        a bias."""
        shape = (self.num_experts, self.hidden_size)
        found: dict[int, str | None] = {}
        for layer, experts in self.experts.items():
            parent = experts.rpartition(".")[0]
            module = self.body.layers[layer].get_submodule(parent)
            weights = {name: getattr(m, "weight", None) for name, m in module.named_modules()}
            names = [n for n, weight in weights.items() if getattr(weight, "shape", ()) == shape]
            whole = [f"{parent}.{name}" if parent else name for name in names]
            found[layer] = whole[0] if whole else None
        return found

    def stays_float32(self, parameter: str) -> bool:
        """Whether a tensor keeps float32 in a model of 16 bits: a buffer, or as its class says."""
        if parameter not in self._parameters:
            return True
        kept = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        return any(re.search(rf"(^|\.){re.escape(name)}(\.|$)", parameter) for name in kept)

    @cached_property
    def _parameters(self) -> set[str]:
        return {name for name, _ in self.model.named_parameters(remove_duplicate=False)}

    def make_tables(self, module: nn.Module, device: torch.device) -> None:
        """Buffers that no checkpoint stores, such as rotary tables, on the device, as transformers
        initialises them."""
        for part in module.modules():
            unstored = part._non_persistent_buffers_set
            tables = {n: t for n, t in part._buffers.items() if n in unstored and t is not None}
            if any(table.is_meta for table in tables.values()):
                for name, table in tables.items():
                    part._buffers[name] = torch.empty_like(table, device=device)
                with torch.device(device):  # where they are computed decides their last bits
                    self.model._init_weights(part)

    def ignored(self) -> list[str]:
        """Patterns of stored names that transformers leaves unread."""
        return list(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or [])


def make_skeleton(
    checkpoint: Checkpoint, architecture: Architecture, dtype: torch.dtype = torch.float32
) -> Skeleton:
    """The skeleton that config.json describes.

    Raises UserError for a config that transformers refuses, one that describes more layers than
    there are tensors, and experts that are computed in a way that mcmoe does not know.
    """
    file = checkpoint.path / "config.json"
    wrong = _too_many_layers(checkpoint.config, len(checkpoint.tensors))
    if wrong:
        raise UserError(f"{file} is not usable: {'; '.join(wrong[:5])}")
    import transformers

    settings = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    settings = _decode_floats(settings)
    try:
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = _build(architecture.alias or architecture.name, config, dtype)
    except ImportError as e:
        raise UserError(f"{architecture.name} needs a package: {describe_exception(e)}") from None
    except Exception as e:  # whatever a config class or a module thinks of a value
        raise UserError(f"{file} cannot be used: {describe_exception(e)}") from None
    # By name, not by class: vLLM registers config classes of its own for some families.
    known = getattr(getattr(type(model), "config_class", None), "model_type", config.model_type)
    wanted = architecture.alias or architecture.name
    if known != config.model_type or type(model).__name__ != wanted:
        raise UserError(
            f"{file} has the model_type {config.model_type!r}, which is not that of "
            f"{architecture.name}, named in architectures"
        )
    layers, experts = _find_experts(model)
    if not experts:
        raise UserError(f"{file} describes a model without routed experts that mcmoe knows")
    stack = model.get_submodule(layers)
    modules = {layer: stack[layer].get_submodule(path) for layer, path in experts.items()}
    gatings = {i: _known_gating(module, architecture.name) for i, module in modules.items()}
    return Skeleton(architecture, config, model, layers, experts, modules, gatings)


def _build(name: str, config: Any, dtype: torch.dtype) -> Any:
    """The class of that name, or the causal language model that was registered for the config."""
    import transformers

    cls = getattr(transformers, name, None)
    maker = transformers.AutoModelForCausalLM.from_config if cls is None else cls._from_config
    attention = "sdpa" if getattr(cls, "_supports_sdpa", True) else "eager"
    with torch.device("meta"):
        return maker(config, attn_implementation=attention, dtype=dtype).eval()


def _find_experts(model: nn.Module) -> tuple[str, dict[int, str]]:
    """Path of the decoder layers, and of the experts in each that has some."""
    for path, module in model.named_modules():
        if not (isinstance(module, nn.ModuleList) and path.rpartition(".")[2] == "layers"):
            continue
        found = {}
        for index, layer in enumerate(module):
            places = [name for name, m in layer.named_modules() if name and _holds_experts(m)]
            if places:
                found[index] = places[0]
        if found:
            return path, found
    return "", {}


def _holds_experts(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "down_proj" in own and own["down_proj"].dim() == 3


def _expert_sizes(experts: Any) -> ExpertSizes:
    count, rows, columns = experts.down_proj.shape
    if getattr(experts, "is_transposed", False):
        rows, columns = columns, rows
    return ExpertSizes(count, rows, columns)


def _known_gating(experts: Any, name: str) -> Gating:
    """How experts combine gate and up. Raises UserError for experts that are more than a gate, an
    up and a down projection, with or without biases."""
    own = {name for name, _ in experts.named_parameters()}
    weights = {"gate_up_proj", "down_proj"}
    biases = {f"{weight}_bias" for weight in weights}
    wrong = []
    if "gate_up_proj" not in own:
        wrong.append("have no gate")
    elif gating := measure_gating(experts):
        if own in (weights, weights | biases):
            return gating
        wrong.append("have further parameters, or half of the biases")
    else:
        wrong.append("combine gate and up in a way of their own")
    raise UserError(f"{name} is not supported yet: its experts {' and '.join(wrong)}")


def describe_exception(error: Exception) -> str:
    """A library's exception in a line: what it says, and what it is where that says little."""
    said = " ".join(str(error).split())[:300]
    # A KeyError says no more than its key.
    return f"{type(error).__name__}: {said}" if isinstance(error, KeyError) or not said else said


def _decode_floats(value: Any) -> Any:
    """Transformers writes infinity, which JSON lacks, as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _decode_floats(inner) for key, inner in value.items()}
    return [_decode_floats(inner) for inner in value] if isinstance(value, list) else value


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
