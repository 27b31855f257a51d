"""What transformers does not say of a family: what vLLM computes of it.

A family needs no row to be read: `model.skeleton` and `model.layout` find everything in
transformers' modules. A row corrects what cannot be found there. TESTED says what is known to hold.
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
    "LongcatFlashForCausalLM": "some of its experts hand on what they are given",
    "NemotronHForCausalLM": "its experts have no gate",
}


END_TO_END = "end to end"  # vLLM served the compressed model, and computed what our own run does
BY_BLOCK = "by block"  # vLLM loads it, and its blocks of experts compute what transformers' do
BY_LAYER = "by layer"  # read, compressed, evaluated and pruned


@dataclass(frozen=True)
class Trial:
    """What was tested of a class, with a small random model: `python -m tests.families.matrix`.
    family: as people call it."""

    family: str
    level: str = END_TO_END


TESTED = {
    "MixtralForCausalLM": Trial("Mixtral"),
    "Qwen2MoeForCausalLM": Trial("Qwen2-MoE"),
    "Qwen3MoeForCausalLM": Trial("Qwen3-MoE"),
    "OlmoeForCausalLM": Trial("OLMoE"),
    "DeepseekV2ForCausalLM": Trial("DeepSeek-V2"),
    "DeepseekV3ForCausalLM": Trial("DeepSeek-V3, R1, V3.1, Kimi-K2"),
    "DeepseekV32ForCausalLM": Trial("DeepSeek-V3.2", BY_LAYER),
    "Glm4MoeForCausalLM": Trial("GLM-4.5 to 4.7"),
    "Glm4MoeLiteForCausalLM": Trial("GLM-4.7-Flash"),
    "Qwen3NextForCausalLM": Trial("Qwen3-Next", BY_BLOCK),
    "Qwen3_5MoeForCausalLM": Trial("Qwen3.5-MoE, its text model", BY_LAYER),
    "Qwen3_5MoeForConditionalGeneration": Trial("Qwen3.5-MoE", BY_LAYER),
    "Qwen3VLMoeForConditionalGeneration": Trial("Qwen3-VL-MoE", BY_LAYER),
    "PhiMoEForCausalLM": Trial("Phi-3.5-MoE"),
    "Ernie4_5_MoeForCausalLM": Trial("ERNIE-4.5"),
    "Lfm2MoeForCausalLM": Trial("LFM2-MoE"),
    "HYV3ForCausalLM": Trial("Hy3"),
    "MiniMaxM2ForCausalLM": Trial("MiniMax-M2"),
    "GptOssForCausalLM": Trial("GPT-OSS"),
    "Gemma4ForCausalLM": Trial("Gemma 4, its text model"),
    "Gemma4ForConditionalGeneration": Trial("Gemma 4", BY_LAYER),
    "GraniteMoeForCausalLM": Trial("Granite 3"),
    "GraniteMoeHybridForCausalLM": Trial("Granite 4-H"),
    "HunYuanMoEV1ForCausalLM": Trial("Hunyuan-A13B"),
    "Dots1ForCausalLM": Trial("dots.llm1"),
    "LagunaForCausalLM": Trial("Laguna", BY_LAYER),
    "MiMoV2FlashForCausalLM": Trial("MiMo-V2-Flash", BY_LAYER),
    "ExaoneMoeForCausalLM": Trial("EXAONE-MoE"),
    "AfmoeForCausalLM": Trial("AFMoE"),
    "SolarOpenForCausalLM": Trial("Solar-Open"),
    "Cohere2MoeForCausalLM": Trial("Cohere2-MoE"),
    "FlexOlmoForCausalLM": Trial("FlexOlmo"),
    "JambaForCausalLM": Trial("Jamba", BY_LAYER),
}


def why_unsure(name: str) -> str | None:
    """What a user should know before trusting a class, or None."""
    tested = TESTED.get(name)
    if tested is None:
        return (
            f"{name} was never tested: it is read by what transformers says of it. Compare `mcmoe "
            "eval` and the served model with the 16-bit one before you rely on it"
        )
    if tested.level == BY_LAYER:
        return f"{name} was tested up to serving, which is not known to be right"
    if tested.level == BY_BLOCK:
        return f"{name} was tested up to its blocks of experts in vLLM, not served as a whole"
    return None


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
        f"Tested are {', '.join(sorted(TESTED))}."
    )
