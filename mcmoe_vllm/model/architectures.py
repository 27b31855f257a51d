"""Where each supported architecture keeps its router, experts, shared experts and attention.

A new architecture is a new row of `ARCHITECTURES`; nothing else in the compressor knows a model
by name. Names are those of the checkpoint on disk, relative to `model.layers.<i>.`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcmoe_vllm.errors import UserError

if TYPE_CHECKING:
    from mcmoe_vllm.compress.job import Job


@dataclass(frozen=True)
class Architecture:
    """One row: the layout of a decoder layer with routed experts.

    block: name of the MoE block on disk; transformers calls the module `mlp` everywhere.
    projections: gate, up and down projection of an expert (w1, w3, w2 in Mixtral's words).
    num_experts, expert_width, top_k: the attributes of the Hugging Face config.
    dense: the parents of the linears that become int4, attention and shared experts.
    dense_linears: those linears, grouped by the input that they share.
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

    def expert_prefix(self, layer: int, expert: int) -> str:
        """`model.layers.3.mlp.experts.5`, without a final dot."""
        return f"model.layers.{layer}.{self.block}.experts.{expert}"

    def expert_weights(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Checkpoint names of the gate, up and down weight."""
        prefix = self.expert_prefix(layer, expert)
        gate, up, down = (f"{prefix}.{p}.weight" for p in self.projections)
        return gate, up, down

    def is_routed_expert(self, name: str) -> bool:
        """Whether a tensor belongs to a routed expert (and so is never copied as it is)."""
        return f".{self.block}.experts." in name

    def moe_layers(self, names: Iterable[str]) -> list[int]:
        """The decoder layers that have routed experts, from a checkpoint's tensor names."""
        marker = f".{self.block}.experts.0.{self.projections[0]}."
        return sorted(int(name.split(".")[2]) for name in names if marker in name)

    def module_name(self, tensor: str) -> str:
        """The transformers parameter that holds a (non-expert) checkpoint tensor."""
        return tensor.replace(f".{self.block}.", ".mlp.")


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


ROUTER = "mlp.gate"


def dense_weight(job: Job, layer: int, linear: str) -> str:
    """Checkpoint name of a dense linear's weight; `linear` is transformers' name in the layer."""
    return _stored_name(job, layer, f"{linear}.weight")


def _stored_name(job: Job, layer: int, parameter: str) -> str:
    """Checkpoint name of a layer's parameter; `parameter` is transformers' name in the layer."""
    on_disk = parameter.replace("mlp.", f"{job.architecture.block}.", 1)
    return f"model.layers.{layer}.{on_disk}"
