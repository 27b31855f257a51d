"""Small random models of the classes that people run: a row for each family.

Sizes are such that group size 64 divides every width; what a real config.json has and transformers
does not write, vLLM's classes need: `ENGINE_SETTINGS`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HIDDEN, WIDTH, EXPERTS, TOP_K = 256, 128, 8, 2
BASE: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
HEADS = {"head_dim": 64}
TIED = {"tie_word_embeddings": True}
DENSE = {"intermediate_size": 512, "moe_intermediate_size": WIDTH}
# vLLM's latent attention on a CPU was only tried with these.
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 512, "q_lora_rank": 128, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
# vLLM's rotary kernel for CPUs misreads queries [T, heads, width]; plain torch does not.
PLAIN_ROPE = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
SLIDING = {
    "layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 128,
}  # fmt: skip
LINEAR = {
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "shared_expert_intermediate_size": WIDTH,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1,
    "mamba_expand": 2,
}  # fmt: skip


# Tokens that stand for a picture or a sound.
PLACES = {"image_token_id": 8000, "video_token_id": 8001, "audio_token_id": 8002}
TOWER = {
    "depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
    "out_hidden_size": HIDDEN, "num_position_embeddings": 64,
}  # fmt: skip


def count(name: str, top_k: str = "num_experts_per_tok") -> dict[str, int]:
    return {name: EXPERTS, top_k: TOP_K}


@dataclass(frozen=True)
class Family:
    """model_type, cls: of transformers; settings: of its config; engine: what config.json needs
    besides; serves: whether vLLM 0.32 runs the plain model on a CPU; spread: how wide the experts'
    random gates and ups are, or a limit to them would not show; launch: arguments for vLLM's LLM
    without which it computes something else there; vision: settings of its tower for pictures,
    where the class has one."""

    model_type: str
    cls: str
    settings: dict[str, Any]
    engine: dict[str, Any] = field(default_factory=dict)
    serves: bool = False
    spread: float = 0.05
    launch: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] | None = None


ROUTED, LOCAL, PLAIN = count("n_routed_experts"), count("num_local_experts"), count("num_experts")
SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
GROUPS = {"n_group": 1, "topk_group": 1}
FIRST_DENSE = {"first_k_dense_replace": 1}
SHARED = {"n_shared_experts": 1}

GEMMA4 = {
    **HEADS, **count("num_experts", "top_k_experts"), **DENSE, "enable_moe_block": True,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "vocab_size_per_layer_input": 8192, "hidden_size_per_layer_input": 0, "global_head_dim": 64,
    "num_global_key_value_heads": 2, "sliding_window": 128, "num_kv_shared_layers": 0,
}  # fmt: skip

FAMILIES = {
    "qwen2_moe": Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**PLAIN, **DENSE, "shared_expert_intermediate_size": WIDTH},
        serves=True,
    ),
    "qwen3_moe": Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", {**HEADS, **PLAIN, **DENSE}, serves=True
    ),
    "olmoe": Family(
        "olmoe", "OlmoeForCausalLM", {**PLAIN, "intermediate_size": WIDTH}, serves=True
    ),
    "mixtral": Family(
        "mixtral", "MixtralForCausalLM", {**HEADS, **LOCAL, "intermediate_size": WIDTH}, serves=True
    ),
    "deepseek_v2": Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {**LATENT, **ROUTED, **DENSE, **FIRST_DENSE, "n_shared_experts": 2, "q_lora_rank": None,
         "topk_method": "greedy"},
        GROUPS,
        serves=True,
        launch=PLAIN_ROPE,
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {**LATENT, **ROUTED, **DENSE, **SHARED, **FIRST_DENSE, "n_group": 2, "topk_group": 1,
         "num_nextn_predict_layers": 0},
        SIGMOID,
        serves=True,
        launch=PLAIN_ROPE,
    ),
    "deepseek_v32": Family(
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        {**LATENT, **ROUTED, **DENSE, **SHARED, **SPARSE, **GROUPS, "index_head_dim": 128,
         "index_n_heads": 4, "index_topk": 64},
        SIGMOID,
    ),
    "glm4_moe": Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {**HEADS, **ROUTED, **DENSE, **SHARED, **FIRST_DENSE, **GROUPS,
         "num_nextn_predict_layers": 0},
        serves=True,
    ),
    "glm4_moe_lite": Family(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        {**LATENT, **ROUTED, **DENSE, **SHARED, **SPARSE},
        {**SIGMOID, **FIRST_DENSE},
        serves=True,
        launch=PLAIN_ROPE,
    ),
    "qwen3_next": Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {**HEADS, **LINEAR, **PLAIN, **DENSE},
        serves=True,
    ),
    "qwen3_5_moe": Family(
        "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", {**HEADS, **LINEAR, **PLAIN, **DENSE}
    ),
    "qwen3_5_moe_vision": Family(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        {**HEADS, **LINEAR, **PLAIN, **DENSE},
        vision=TOWER,
    ),
    "qwen3_vl_moe": Family(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        {**HEADS, **PLAIN, **DENSE, "rope_parameters": {"rope_type": "default",
         "rope_theta": 10000.0, "mrope_section": [12, 10, 10]}},
        vision={**TOWER, "deepstack_visual_indexes": [0]},
    ),
    "phimoe": Family(
        "phimoe",
        "PhimoeForCausalLM",
        {**LOCAL, "intermediate_size": WIDTH, "attention_bias": True, "lm_head_bias": True},
        {"architectures": ["PhiMoEForCausalLM"]},
        serves=True,
    ),
    "ernie4_5_moe": Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        {**count("moe_num_experts", "moe_k"), **DENSE, "moe_num_shared_experts": 1,
         "moe_layer_start_index": 1, "moe_layer_end_index": 2, **TIED},
    ),
    "lfm2_moe": Family(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        {**PLAIN, **DENSE, **TIED, "num_dense_layers": 1,
         "layer_types": ["conv", "full_attention", "conv"]},
        launch=PLAIN_ROPE,
    ),
    "hy_v3": Family(
        "hy_v3",
        "HYV3ForCausalLM",
        {**HEADS, **PLAIN, **DENSE, **SPARSE},
        {**FIRST_DENSE, "expert_hidden_dim": WIDTH, "qk_norm": True, "route_norm": True},
        serves=True,
    ),
    "minimax_m2": Family(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        {**HEADS, **LOCAL, "intermediate_size": WIDTH, "rotary_dim": 32},
        {"scoring_func": "sigmoid", "use_routing_bias": True},
    ),
    "gemma4": Family("gemma4_text", "Gemma4ForCausalLM", GEMMA4, serves=True),
    "gemma4_vision": Family(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        GEMMA4,
        vision={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
            "global_head_dim": 32,
        },
    ),
    "granitemoe": Family(
        "granitemoe",
        "GraniteMoeForCausalLM",
        {**LOCAL, "intermediate_size": WIDTH, "residual_multiplier": 0.22,
         "embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "logits_scaling": 0.5},
        serves=True,
    ),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {**LOCAL, **MAMBA, "intermediate_size": WIDTH, "shared_intermediate_size": 128,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        serves=True,
    ),
    "hunyuan_v1_moe": Family(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        {**HEADS, **count("num_experts", "moe_topk"), "intermediate_size": WIDTH},
        serves=True,
    ),
    "dots1": Family(
        "dots1",
        "Dots1ForCausalLM",
        {**HEADS, **ROUTED, **DENSE, **SHARED, **FIRST_DENSE, **GROUPS, "norm_topk_prob": True},
        serves=True,
    ),
    "laguna": Family(
        "laguna",
        "LagunaForCausalLM",
        {**HEADS, **PLAIN, **DENSE, **SPARSE, **SLIDING, "shared_expert_intermediate_size": WIDTH,
         "num_attention_heads_per_layer": [4, 4, 4], "moe_routed_scaling_factor": 2.5},
    ),
    "mimo_v2_flash": Family(
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        {**HEADS, **ROUTED, **DENSE, **SPARSE, **SLIDING, **GROUPS, "v_head_dim": 64},
        {"hybrid_layer_pattern": [0, 1, 0], "moe_layer_freq": [0, 1, 1], "layernorm_epsilon": 1e-5,
         "sliding_window_size": 128, "swa_head_dim": 64, "swa_v_head_dim": 64,
         "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "rope_theta": 5e6,
         "swa_rope_theta": 1e4, "partial_rotary_factor": 0.334,
         "add_swa_attention_sink_bias": True},
    ),
    "exaone_moe": Family(
        "exaone_moe",
        "ExaoneMoeForCausalLM",
        {**HEADS, **PLAIN, **DENSE, **SPARSE, **SLIDING, **GROUPS, **FIRST_DENSE},
        serves=True,
    ),
    "afmoe": Family(
        "afmoe",
        "AfmoeForCausalLM",
        {**HEADS, **PLAIN, **DENSE, "num_dense_layers": 1, "num_shared_experts": 1,
         "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {**GROUPS, "score_func": "sigmoid", "route_norm": True},
    ),
    "solar_open": Family(
        "solar_open",
        "SolarOpenForCausalLM",
        {**HEADS, **ROUTED, **SHARED, "moe_intermediate_size": WIDTH},
        serves=True,
    ),
    "cohere2_moe": Family(
        "cohere2_moe",
        "Cohere2MoeForCausalLM",
        {**HEADS, **PLAIN, **TIED, "intermediate_size": WIDTH, "num_shared_experts": 1,
         "logit_scale": 1.0,  # or errors would not show in the logits
         "mlp_layer_types": ["sparse"] * 3,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        serves=True,
    ),
    "flex_olmo": Family(
        "flex_olmo", "FlexOlmoForCausalLM", {**PLAIN, "intermediate_size": WIDTH}, serves=True
    ),
    "gpt_oss": Family(
        "gpt_oss",
        "GptOssForCausalLM",
        {**HEADS, **LOCAL, "hidden_size": 192, "intermediate_size": 192, "sliding_window": 128,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        serves=True,
        spread=0.3,
    ),
    "minimax_m3": Family(
        "minimax_m3_vl_text",
        "MiniMaxM3VLForCausalLM",
        {**HEADS, **LOCAL, **SPARSE, "intermediate_size": WIDTH, "dense_intermediate_size": 512,
         "shared_intermediate_size": WIDTH, "layer_types": ["full_attention"] * 3},
        spread=0.3,
    ),
    "jamba": Family(
        "jamba",
        "JambaForCausalLM",
        {**PLAIN, "num_hidden_layers": 4, "intermediate_size": WIDTH, "attn_layer_period": 2,
         "attn_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 16,
         "use_mamba_kernels": False},
    ),
}  # fmt: skip


def make_config(name: str, **settings: Any) -> Any:
    """Transformers' config of a family, with other settings than the table's if given."""
    import transformers

    family = FAMILIES[name]
    values = {**BASE, **family.settings, **settings}
    if family.vision is not None:
        values = {"text_config": values, "vision_config": family.vision, **PLACES}
    return transformers.CONFIG_MAPPING[family.model_type](**values, architectures=[family.cls])


def save_family(name: str, folder: Path, tokenizer: Path) -> Path:
    """A random model of a family with another model's tokenizer; the same each time."""
    import torch
    import transformers

    family = FAMILIES[name]
    config = make_config(name)
    torch.manual_seed(0)
    with torch.no_grad():
        model = getattr(transformers, family.cls)(config).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                is_wide = parameter_name.endswith("experts.gate_up_proj")
                parameter.normal_(0, family.spread if is_wide else 0.05)
            elif parameter_name.endswith(("proj.bias", "router.bias", "sinks")):
                parameter.normal_(0, 0.05)
        for buffer_name, buffer in model.named_buffers():
            if "bias" in buffer_name:  # what a router chooses with
                buffer.normal_(0, 0.02)
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / file, folder / file)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **family.engine}, indent=2))
    return folder
