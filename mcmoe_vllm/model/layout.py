"""Where a checkpoint keeps the parts of its model: names on disk for modules of transformers.

Transformers says how each of its families is stored (its conversion mapping); routed experts are
found by their names, of which there are two fashions, and by the tensors that hold all of a layer.
The names of a compressed checkpoint's experts are those of the 16-bit one where each expert has
tensors of its own, else gate_proj, up_proj and down_proj where transformers has the experts, or
those that vLLM's class asks for. Biases stay in the tensors that hold all of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from mcmoe_vllm.checkpoint.format import FORMAT_VERSION, NEWEST_VERSION
from mcmoe_vllm.model.skeleton import Skeleton

# Gate, up and down of an expert as checkpoints call them.
FASHIONS = (
    ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    ("w1.weight", "w3.weight", "w2.weight"),
)
# Gate and up in one, in pairs of rows, and down.
PAIRED = ("w13_weight", "w2_weight")
EXPERT = (
    r"^(?P<layer>(?:.*\.)?layers\.(?P<index>\d+)\.)(?P<place>(?:.*\.)?experts)\.(?P<expert>\d+)\."
    r"(?P<matrix>{})$"
)
# Parents of linears that may be int4, and the linears, grouped by the input that they share.
DENSE: dict[str, tuple[tuple[str, ...], ...]] = {
    "self_attn": (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    **dict.fromkeys(
        ("shared_expert", "shared_experts", "shared_mlp"),
        (("gate_proj", "up_proj"), ("down_proj",)),
    ),
}
SPLIT_INPUTS = (".o_proj.weight", ".down_proj.weight")  # of which each rank holds some columns


@dataclass(frozen=True, eq=False)
class Layout:
    """Names on disk.

    layers: what the names of decoder layers begin with, "model.layers"; stored: parameter of
    transformers -> tensor, for all but routed experts; place, matrices: of an expert's own tensors
    within a layer, "mlp.experts" and the names of its gate, up and down, or of two as `PAIRED`.
    dense_linears: those that may be int4, by their names in transformers' layer, grouped by the
    input that they share; dense: the names of their parents, by which vLLM tells them. converted:
    tensors that transformers puts together or takes apart -> what becomes of them.
    """

    name: str
    layers: str
    stored: Mapping[str, str]
    place: str
    matrices: tuple[str, ...]
    dense_linears: tuple[tuple[str, ...], ...]
    dense: tuple[str, ...]
    skeleton: Skeleton = field(repr=False)
    converted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def layer_prefix(self, layer: int) -> str:
        """`model.layers.3.`, of every tensor of a decoder layer."""
        return f"{self.layers}.{layer}."

    def expert_prefix(self, layer: int, expert: int) -> str:
        """`model.layers.3.mlp.experts.5`, without a final dot."""
        return f"{self.layer_prefix(layer)}{self.place}.{expert}"

    def expert_weights(self, layer: int, expert: int) -> tuple[str, ...]:
        """Names of an expert's weights: gate, up and down, or both in pairs of rows and down."""
        prefix = self.expert_prefix(layer, expert)
        return tuple(f"{prefix}.{name}" for name in self.matrices)

    @property
    def projections(self) -> tuple[str, str, str] | None:
        """What an expert's gate, up and down are called; None where gate and up are one."""
        if len(self.matrices) != 3:
            return None
        gate, up, down = (name.removesuffix(".weight") for name in self.matrices)
        return gate, up, down

    @property
    def groups(self) -> tuple[str, ...]:
        """Of `expert_weights`, whose width each has: "w13" or "w2"."""
        return ("w13",) * (len(self.matrices) - 1) + ("w2",)

    @property
    def format_version(self) -> int:
        """The lowest version of docs/FORMAT.md that has words for a compressed checkpoint."""
        skeleton = self.skeleton
        is_plain = all(gating.formula is None for gating in skeleton.gatings.values())
        as_ever = is_plain and not skeleton.has_biases and self.matrices != PAIRED
        return FORMAT_VERSION if as_ever else NEWEST_VERSION

    def fused_experts(self, layer: int) -> tuple[str, str]:
        """Names of the tensors with gate and up, and with down, of all experts of a layer, where
        the 16-bit model has such."""
        gate_up, down = self.skeleton.expert_parameters(layer)
        return self.stored[gate_up], self.stored[down]

    def expert_biases(self, layer: int) -> tuple[str, ...]:
        """Names of the tensors with the biases of gate and up, and of down, of all experts of a
        layer; none where there are none."""
        return tuple(self.stored[p] for p in self.skeleton.expert_biases(layer))

    def has_fused_experts(self, layer: int) -> bool:
        return any(p in self.stored for p in self.skeleton.expert_parameters(layer))

    def is_routed_expert(self, name: str) -> bool:
        """Whether a tensor holds weights of routed experts (and so is never copied as it is)."""
        if not self.is_of_layers(name):
            return False
        inside = name.removeprefix(f"{self.layers}.").partition(".")[2]
        expert = inside.removeprefix(f"{self.place}.").partition(".")[0]
        # Beside the experts may stand what the router chooses with.
        is_numbered = inside.startswith(f"{self.place}.") and expert.isdecimal()
        return is_numbered or name in self._fused

    def is_of_layers(self, name: str) -> bool:
        """Whether a tensor belongs to one of the model's decoder layers."""
        if not name.startswith(f"{self.layers}."):
            return False
        index = name.removeprefix(f"{self.layers}.").partition(".")[0]
        return index.isdecimal() and int(index) < self.skeleton.num_layers

    def stored_name(self, layer: int, parameter: str) -> str:
        """Name on disk of a layer's parameter, given its name in transformers' layer; of what an
        int4 linear is stored as too."""
        whole = f"{self.skeleton.layers}.{layer}.{parameter}"
        if whole in self.stored:
            return self.stored[whole]
        prefix, _, kind = whole.rpartition(".")
        return self.stored[f"{prefix}.weight"].removesuffix("weight") + kind

    def expected_name(self, parameter: str) -> str:
        """Name on disk of a parameter, or, where no tensor stands for it, what it would be: as in
        another layer, or as transformers calls it."""
        if parameter in self.stored:
            return self.stored[parameter]
        layer, inside = self.skeleton.split(parameter)
        if layer is None:
            return parameter
        for other in range(self.skeleton.num_layers):
            if name := self.stored.get(f"{self.skeleton.layers}.{other}.{inside}"):
                return self.layer_prefix(layer) + name.removeprefix(self.layer_prefix(other))
        return self.layer_prefix(layer) + inside

    def parameter(self, tensor: str) -> str:
        """The parameter of transformers that a tensor stands for: the inverse of `stored`."""
        return self._parameters[tensor]

    @property
    def ends(self) -> tuple[str, str]:
        """The parameters of head and embedding."""
        (head,), (embedding,) = (
            self.skeleton.head_parameters[:1],
            self.skeleton.embedding_parameters,
        )
        return head, embedding

    def drafts(self) -> list[str]:
        """Patterns of names of draft layers behind the model's own."""
        settings, layers = self.skeleton.text_config, self.skeleton.num_layers
        count = getattr(settings, "num_nextn_predict_layers", None) or 0
        return [rf"^{re.escape(self.layers)}\.{layers + i}\." for i in range(count)]

    def dense_weights(self, layer: int) -> list[str]:
        """Names of the weights of a layer that may become int4."""
        path = f"{self.skeleton.layers}.{layer}."
        wanted = [f"{path}{linear}.weight" for group in self.dense_linears for linear in group]
        return [self.stored[name] for name in wanted if name in self.stored]

    @cached_property
    def _parameters(self) -> dict[str, str]:
        return {tensor: parameter for parameter, tensor in self.stored.items()}

    @cached_property
    def _fused(self) -> Collection[str]:
        layers = self.skeleton.moe_layers
        weights = (p for layer in layers for p in self.skeleton.expert_parameters(layer))
        return {self.stored[p] for p in weights if p in self.stored}


def find_layout(names: Iterable[str], skeleton: Skeleton) -> Layout:
    """Where tensors of these names stand in the model. Names that have no place in it are left
    out: `model.agreement` lists them."""
    names, row = list(names), skeleton.architecture
    own = tuple(f"{name}.weight" for name in row.projections or ())
    fashions = (*FASHIONS, PAIRED, own)
    matrices = "|".join(re.escape(name) for fashion in fashions for name in fashion)
    pattern = re.compile(EXPERT.format(matrices))
    experts = [m for m in map(pattern.match, names) if m]
    separate = {m.string for m in experts}
    stored, converted = _stored_names((n for n in names if n not in separate), skeleton)
    layers = _layers_on_disk(stored, skeleton)
    ours = [m for m in experts if m["layer"] == f"{layers}.{m['index']}."]
    place = next(iter(skeleton.experts.values()))
    fashion: tuple[str, ...] = PAIRED if row.paired else FASHIONS[0]
    if ours:
        place = ours[0]["place"]
        fashion = next(f for f in fashions if ours[0]["matrix"] in f)
    linears = tuple(_dense_groups(skeleton))
    # Engines tell linears by the names on disk.
    names16 = [
        stored.get(f"{skeleton.layers}.{layer}.{group[0]}.weight")
        for group in linears
        for layer in range(skeleton.num_layers)
    ]
    parents = {name.split(".")[-3]: None for name in names16 if name}
    name = skeleton.architecture.name
    dense = tuple(parents)
    return Layout(name, layers, stored, place, fashion, linears, dense, skeleton, converted)


def _stored_names(
    names: Iterable[str], skeleton: Skeleton
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Parameter of transformers -> tensor on disk, by transformers' own conversion mapping; and
    tensors of which some are made to one parameter, or one to several, as `Layout.converted`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(skeleton.model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    known = skeleton.model.state_dict()
    prefix = skeleton.model.base_model_prefix
    several = {
        source: converter.target_patterns
        for converter in converters
        if len(converter.source_patterns) + len(converter.target_patterns) > 2
        for source in converter.source_patterns
    }
    found: dict[str, str] = {}
    converted: dict[str, tuple[str, ...]] = {}
    for name in names:
        plain = name
        for on_disk, module in skeleton.architecture.renames:
            plain = plain.replace(on_disk, module)
        parameter, source = rename_source_key(plain, renamings, converters, prefix, known)
        # As transformers' loader does where a renaming was not meant for this name.
        parameter = parameter if parameter in known or name not in known else name
        if source in several and parameter in known:
            first, *_ = targets = several[source]
            before, _, after = parameter.rpartition(first)
            converted[name] = tuple(f"{before}{target}{after}" for target in targets)
        elif parameter in known:
            found.setdefault(parameter, name)
    return found, converted


def _layers_on_disk(stored: Mapping[str, str], skeleton: Skeleton) -> str:
    """What the names of decoder layers begin with, told by the first that is known."""
    for parameter, tensor in stored.items():
        layer, _ = skeleton.split(parameter)
        place = f"layers.{layer}."
        if layer is not None and place in tensor:
            return tensor[: tensor.index(place)] + "layers"
    return skeleton.layers


def _dense_groups(skeleton: Skeleton) -> Iterator[tuple[str, ...]]:
    """The linears that may be int4 in any layer: all linears of a parent, or none of it."""
    found: dict[tuple[str, ...], None] = {}
    for layer in skeleton.body.layers:
        for path, module in layer.named_modules():
            groups = DENSE.get(path.rpartition(".")[2])
            linears = {n for n, child in module.named_children() if _is_linear(child)}
            if groups and linears == {name for group in groups for name in group}:
                found |= dict.fromkeys(tuple(f"{path}.{n}" for n in group) for group in groups)
    return iter(found)


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear)
