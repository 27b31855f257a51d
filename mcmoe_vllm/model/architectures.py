"""What transformers does not say of a family: what vLLM computes of it.

A family needs no row to be read: `model.skeleton` and `model.layout` find everything in
transformers' modules. A row corrects what cannot be found there.
"""

from dataclasses import dataclass
from typing import Any

from mcmoe_kernels.activations import Activation as Formula
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.gating import Gating


@dataclass(frozen=True)
class Architecture:
    """A row.

    activations: the values of the config's activation that vLLM's class computes, whatever
    config.json says; alias: the class in transformers, where config.json names another;
    projections: what checkpoints call gate, up and down of an expert, where that is none of the
    fashions of `model.layout`; renames: parts of names on disk, and what transformers calls them,
    where its own mapping does not say; gating: how vLLM's class combines gate and up, where that is
    not read from config.json; paired: whether that class takes gate and up of an expert as one
    tensor; tied: whether it takes the embedding for the head whatever config.json says.
    """

    name: str
    activations: tuple[str, ...] = ("silu",)
    projections: tuple[str, str, str] | None = None
    renames: tuple[tuple[str, str], ...] = ()
    alias: str | None = None
    gating: Gating | None = None
    paired: bool = False
    tied: bool = False


ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("MixtralForCausalLM"),
        Architecture("Qwen2MoeForCausalLM"),
        Architecture("Qwen3MoeForCausalLM"),
        Architecture("OlmoeForCausalLM"),
        Architecture("PhiMoEForCausalLM", alias="PhimoeForCausalLM"),
        Architecture("Lfm2MoeForCausalLM", tied=True),
        Architecture("Cohere2MoeForCausalLM", tied=True),
        Architecture("Gemma4ForCausalLM", ("gelu_pytorch_tanh",)),
        Architecture("Gemma4ForConditionalGeneration", ("gelu_pytorch_tanh",)),
        Architecture(
            "GptOssForCausalLM",
            gating=Gating(True, Formula(limit=7.0, alpha=1.702, up_offset=1.0)),
            paired=True,
        ),
    )
}


# Mixture-of-Experts models that are recognised and refused, with what stands in the way.
REFUSED = {
    "DeepseekV4ForCausalLM": "its layers hand on several streams of states",
    "Glm5NextForConditionalGeneration": "its layers hand on several streams of states",
    "GlmMoeDsaForCausalLM": "its layers hand on which tokens they attend to",
    "HYV4ForCausalLM": "its layers hand on several streams of states",
    "Llama4ForCausalLM": "routing weights multiply what its experts are given",
    "Llama4ForConditionalGeneration": "routing weights multiply what its experts are given",
    "NemotronHForCausalLM": "its experts have no gate",
}


def find_architecture(config: dict[str, Any]) -> Architecture:
    """The row for a config.json, or an empty one for a family that has none.

    Raises UserError for a model that is no Mixture of Experts or is known not to be supported.
    """
    names = config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
        if name in REFUSED:
            raise UserError(f"{name} is not supported yet: {REFUSED[name]}")
    what = ", ".join(names) or "config.json, which names no architecture,"
    settings = {**config, **(config.get("text_config") or {})}
    if names and any("expert" in key and settings[key] for key in settings):
        return Architecture(names[0])
    raise UserError(
        f"{what} is not a Mixture-of-Experts model: its config.json names no experts. "
        f"Tried are {', '.join(sorted(ARCHITECTURES))}."
    )
