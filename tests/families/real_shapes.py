"""Checkpoints with the shapes and names of models that people run: headers whose data are holes in
the file, which take no room, or random weights.

    PYTHONPATH=.:kernels python -m tests.families.real_shapes FAMILY DIR --layers 1 --fill

Shapes are those of transformers' config classes, whose defaults are a published model's, but for
what `settings` says; names are those that transformers saves, which are the official ones.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.conftest import EXAMPLE_MODEL

FILE = "model.safetensors"
DTYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64",
    torch.bool: "BOOL", torch.uint8: "U8",
}  # fmt: skip


@dataclass(frozen=True)
class Real:
    """A published model. cls, model_type: of transformers; billions: parameters as its makers count
    them, without draft layers; dense: how many layers before the first with experts; settings: of
    its config, where the class has other defaults; engine: what its config.json has besides;
    names: patterns of names that transformers saves wrongly, and what they are on disk; groups:
    the largest group sizes that fit, where that is not 128."""

    name: str
    cls: str
    model_type: str
    billions: float
    dense: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[tuple[str, str], ...] = ()
    groups: Mapping[str, int] = field(default_factory=dict)


LITE = {
    "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1408,
    "num_experts_per_tok": 6, "q_lora_rank": None, "first_k_dense_replace": 1,
}  # fmt: skip
BY_64 = {"w13": 64, "w2": 64, "dense": 64}
OSS_20B = {"num_hidden_layers": 24, "num_local_experts": 32}
LFM2_LAYERS = [
    "full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)
]  # fmt: skip
KIMI_K2 = {
    "n_routed_experts": 384, "first_k_dense_replace": 1, "num_attention_heads": 64,
    "num_key_value_heads": 64, "vocab_size": 163840,
}  # fmt: skip
SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}

REAL = {
    "deepseek_v2": Real("DeepSeek-V2-Lite", "DeepseekV2ForCausalLM", "deepseek_v2", 15.7, 1, LITE,
                        {"n_group": 1, "topk_group": 1}),
    "deepseek_v3": Real("DeepSeek-V3", "DeepseekV3ForCausalLM", "deepseek_v3", 671, 3,
                        engine=SIGMOID),
    "glm4_moe": Real("GLM-4.5-Air", "Glm4MoeForCausalLM", "glm4_moe", 107, 1, {"head_dim": 128}),
    "glm4_moe_lite": Real("GLM-4.7-Flash", "Glm4MoeLiteForCausalLM", "glm4_moe_lite", 30, 1,
                          engine={**SIGMOID, "first_k_dense_replace": 1}),
    "qwen3_next": Real("Qwen3-Next-80B-A3B", "Qwen3NextForCausalLM", "qwen3_next", 80),
    "qwen3_5_moe": Real("Qwen3.5-35B-A3B", "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", 35),
    "gpt_oss": Real("gpt-oss-120b", "GptOssForCausalLM", "gpt_oss", 116.8, groups=BY_64),
    "gpt_oss_20b": Real("gpt-oss-20b", "GptOssForCausalLM", "gpt_oss", 20.9, 0, OSS_20B,
                        groups=BY_64),
    "phimoe": Real("Phi-3.5-MoE", "PhimoeForCausalLM", "phimoe", 41.9, 0,
                   {"attention_bias": True, "lm_head_bias": True},
                   {"architectures": ["PhiMoEForCausalLM"]}),
    "ernie4_5_moe": Real("ERNIE-4.5-21B-A3B", "Ernie4_5_MoeForCausalLM", "ernie4_5_moe", 21.9, 1),
    "lfm2_moe": Real("LFM2-8B-A1B", "Lfm2MoeForCausalLM", "lfm2_moe", 8.3, 2,
                     {"num_hidden_layers": 24, "layer_types": LFM2_LAYERS}),
    "hy_v3": Real("Hy3", "HYV3ForCausalLM", "hy_v3", 295, 1, engine={"first_k_dense_replace": 1}),
    "minimax_m2": Real("MiniMax-M2", "MiniMaxM2ForCausalLM", "minimax_m2", 229,
                       engine={"scoring_func": "sigmoid"}),
    "mimo_v2_flash": Real("MiMo-V2-Flash", "MiMoV2FlashForCausalLM", "mimo_v2_flash", 309, 1),
    "deepseek_v32": Real("DeepSeek-V3.2", "DeepseekV32ForCausalLM", "deepseek_v32", 671, 3,
                         engine=SIGMOID),
    "mistral4": Real("Mistral-Small-4", "Mistral4ForCausalLM", "mistral4", 119),
    "solar_open": Real("Solar-Open-100B", "SolarOpenForCausalLM", "solar_open", 102.6),
    "kimi_k25": Real("Kimi-K2.5", "Kimi_K25ForConditionalGeneration", "kimi_k25", 1027, 1, KIMI_K2,
                     names=((r"^(language_model\.model)\.blocks\.", r"\1.layers."),)),
}  # fmt: skip


def write_real(
    family: str, folder: Path, *, moe_layers: int | None = None, fill: bool = False
) -> Path:
    """A checkpoint of a row of REAL with so many layers that have experts, by default all. Its
    weights are random, or holes in the file that read as zeros."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    row = REAL[family]
    config = make_config(row, moe_layers)
    with torch.device("meta"):
        model = getattr(transformers, row.cls)._from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    config.architectures, config.dtype = [row.cls], torch.bfloat16
    settings = {**json.loads(config.to_json_string(use_diff=False)), **row.engine}
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE_MODEL / name, folder / name)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if ties_head(config) else set()
    state = {n: t for n, t in model.state_dict().items() if n not in tied}
    stored = revert_weight_conversion(model, state)
    for pattern, name in row.names:
        stored = {re.sub(pattern, name, n): t for n, t in stored.items()}
    write_tensors(folder / FILE, stored, fill)
    return folder


def make_config(row: Real, moe_layers: int | None) -> Any:
    """Transformers' config, cut behind so many layers with experts."""
    import transformers

    settings = dict(row.settings)
    if moe_layers is not None:
        settings["num_hidden_layers"] = row.dense + moe_layers
        if "layer_types" in settings:
            settings["layer_types"] = settings["layer_types"][: row.dense + moe_layers]
    text = "text_config" if row.model_type in ("qwen3_5_moe", "kimi_k25") else None
    return transformers.AutoConfig.for_model(
        row.model_type, **({text: settings} if text else settings)
    )


def ties_head(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def write_tensors(file: Path, state: Mapping[str, torch.Tensor], fill: bool) -> None:
    """A safetensors file of tensors on the meta device."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in state.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for part in random_bytes(state) if fill else ():
            f.write(part)
        f.truncate(8 + len(text) + end)


def random_bytes(state: Mapping[str, torch.Tensor]) -> Iterator[bytes]:
    """Weights that keep the size of what they are multiplied with; norms are ones."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in state.items():
        made = torch.ones(tensor.shape, dtype=torch.float32, device=device)
        if tensor.dim() > 1 or name.endswith("bias"):
            made.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)
        made = made.to(tensor.dtype).cpu().contiguous()
        yield made.view(torch.uint8).numpy().tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=REAL)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="with experts; by default all")
    parser.add_argument("--fill", action="store_true", help="random weights instead of holes")
    asked = parser.parse_args()
    write_real(asked.family, asked.folder, moe_layers=asked.layers, fill=asked.fill)


if __name__ == "__main__":
    main()
