"""Where each supported architecture keeps its router, experts, shared experts and attention.

A new architecture is a new row of `ARCHITECTURES`; nothing else in the compressor knows a model, or
one of its modules, by name.
"""

from dataclasses import dataclass
from typing import Any

from mcmoe_vllm.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """One row: where a model keeps what the compressor looks for.

    block: name of the MoE block on disk, within a layer; module: the same in transformers.
    projections: gate, up and down of an expert, as on disk.
    num_experts, expert_width, top_k: the attributes of the Hugging Face config.
    dense: the parents of the linears that become int4, attention and shared experts.
    dense_linears: those linears, grouped by the input that they share.
    router, experts: names in the MoE block; activation: the config's attribute; activations: the
    values of it that vLLM's class computes, whatever config.json says.
    layers, embedding, norm, head: names in the whole model, the same on disk and in transformers.
    """

    name: str
    block: str
    projections: tuple[str, str, str]
    num_experts: str
    expert_width: str
    dense: tuple[str, ...] = ("self_attn",)
    dense_linears: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
    )
    module: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    activation: str = "hidden_act"
    activations: tuple[str, ...] = ("silu",)
    top_k: str = "num_experts_per_tok"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def router_module(self) -> str:
        """The router's name within a decoder layer of transformers."""
        return f"{self.module}.{self.router}"

    def layer_prefix(self, layer: int) -> str:
        """`model.layers.3.`, of every tensor of a decoder layer."""
        return f"{self.layers}.{layer}."

    def expert_prefix(self, layer: int, expert: int) -> str:
        """`model.layers.3.mlp.experts.5`, without a final dot."""
        return f"{self.layer_prefix(layer)}{self.block}.{self.experts}.{expert}"

    def expert_weights(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Checkpoint names of the gate, up and down weight."""
        prefix = self.expert_prefix(layer, expert)
        gate, up, down = (f"{prefix}.{p}.weight" for p in self.projections)
        return gate, up, down

    def is_routed_expert(self, name: str) -> bool:
        """Whether a tensor belongs to a routed expert (and so is never copied as it is)."""
        return f".{self.block}.{self.experts}." in name

    def is_of_layers(self, name: str) -> bool:
        """Whether a tensor belongs to a decoder layer."""
        return name.startswith(f"{self.layers}.")

    def split_parameter(self, parameter: str) -> tuple[int | None, str]:
        """The decoder layer of a parameter of transformers, and its name in that layer; of one
        outside the layers, None and its whole name."""
        if not self.is_of_layers(parameter):
            return None, parameter
        layer, _, inside = parameter.removeprefix(f"{self.layers}.").partition(".")
        return int(layer), inside

    def module_name(self, tensor: str) -> str:
        """The transformers parameter that holds a (non-expert) checkpoint tensor."""
        return tensor.replace(f".{self.block}.", f".{self.module}.")

    def stored_name(self, layer: int, parameter: str) -> str:
        """Checkpoint name of a layer's parameter, given its name in transformers' layer."""
        inside, dot, rest = parameter.partition(".")
        on_disk = f"{self.block}{dot}{rest}" if inside == self.module else parameter
        return self.layer_prefix(layer) + on_disk

    def dense_weights(self, layer: int) -> list[str]:
        """Checkpoint names of the weights of a layer that may become int4."""
        return [
            self.stored_name(layer, f"{linear}.weight")
            for group in self.dense_linears
            for linear in group
        ]


_QWEN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture(
            "MixtralForCausalLM",
            block="block_sparse_moe",
            projections=("w1", "w3", "w2"),
            num_experts="num_local_experts",
            expert_width="intermediate_size",
        ),
        Architecture(
            "Qwen2MoeForCausalLM",
            block="mlp",
            projections=_QWEN_PROJECTIONS,
            num_experts="num_experts",
            expert_width="moe_intermediate_size",
            dense=("self_attn", "shared_expert"),
            dense_linears=(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("self_attn.o_proj",),
                ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
                ("mlp.shared_expert.down_proj",),
            ),
        ),
        Architecture(
            "Qwen3MoeForCausalLM",
            block="mlp",
            projections=_QWEN_PROJECTIONS,
            num_experts="num_experts",
            expert_width="moe_intermediate_size",
        ),
        Architecture(
            "OlmoeForCausalLM",
            block="mlp",
            projections=_QWEN_PROJECTIONS,
            num_experts="num_experts",
            expert_width="intermediate_size",
        ),
    )
}


# Mixture-of-Experts models that are recognised and refused, with what stands in the way.
REFUSED = {
    "DeepseekV2ForCausalLM": "latent attention and grouped routing are not covered by tests yet",
    "DeepseekV3ForCausalLM": "latent attention and grouped routing are not covered by tests yet",
    "GptOssForCausalLM": "its experts have biases and a width that no group size divides",
    "PhiMoEForCausalLM": "its outputs are NaN on the CPU engine even without quantization",
    "PhimoeForCausalLM": "its outputs are NaN on the CPU engine even without quantization",
}


def find_architecture(config: dict[str, Any]) -> Architecture:
    """The row for a config.json.

    Raises UserError for a model that is no Mixture of Experts or that is not supported.
    """
    names = config.get("architectures") or []
    supported = ", ".join(sorted(ARCHITECTURES))
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
        if name in REFUSED:
            raise UserError(
                f"{name} is not supported yet: {REFUSED[name]}. Supported are {supported}."
            )
    what = ", ".join(names) or "config.json, which names no architecture,"
    expert_keys = [k for k in config if "expert" in k and config[k]]
    if expert_keys:
        raise UserError(
            f"{what} is an unsupported Mixture-of-Experts architecture. Supported are {supported}."
        )
    raise UserError(
        f"{what} is not a Mixture-of-Experts model: its config.json names no experts. "
        f"Supported are {supported}."
    )
