"""Makes tests/golden/format_v2 and format_v3, whole checkpoints with every width.

    PYTHONPATH=.:kernels python tests/golden/make_golden.py FOLDER VERSION

Every number follows from the formulas below, none from a quantizer or a random generator. The
folders in the repository are never made anew: a format that changes gets a new version and a new
folder beside them. format_v1 has the same weights, scales and zeros as format_v2, made by this
script when it wrote version 1; format_v3 is of a model whose experts have biases.
"""

import sys
from pathlib import Path

import torch

from mcmoe_kernels.formats import packing
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.checkpoint.manifest import write_manifest
from mcmoe_vllm.checkpoint.writing import shard_name, write_index, write_shard
from mcmoe_vllm.disk import write_json

HIDDEN, WIDTH, GROUP, VOCABULARY = 64, 32, 32, 8  # two groups in a row of w1, one in w2
HEADS, KEY_HEADS, HEAD_SIZE = 4, 1, 8
WIDTHS = "01234"  # expert e has e bits; expert 0 is dropped
MATRICES = {"w1": (WIDTH, HIDDEN), "w3": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH)}
LINEARS = {
    "q_proj": (HEADS * HEAD_SIZE, HIDDEN),
    "k_proj": (KEY_HEADS * HEAD_SIZE, HIDDEN),
    "v_proj": (KEY_HEADS * HEAD_SIZE, HIDDEN),
    "o_proj": (HIDDEN, HEADS * HEAD_SIZE),
}


def codes(rows: int, columns: int, bits: int, salt: int) -> torch.Tensor:
    """Bits 16 and up of (n*columns + k + 1000*salt) * 2654435761; int64 [rows, columns]."""
    place = torch.arange(rows * columns).view(rows, columns) + 1000 * salt
    return (place * 2654435761 >> 16) % (1 << bits)


def scales(rows: int, groups: int, salt: int) -> torch.Tensor:
    """(128 + (5*n + 3*g + salt) mod 128) / 2^12, exact in bfloat16; float32 [rows, groups]."""
    n, g = torch.arange(rows).view(-1, 1), torch.arange(groups)
    return (128 + (5 * n + 3 * g + salt) % 128).float() / 4096


def zeros(rows: int, groups: int, bits: int, salt: int) -> torch.Tensor:
    """0.5 at 1 bit, else (n + g + salt) mod 2^bits; float32 [rows, groups]."""
    n, g = torch.arange(rows).view(-1, 1), torch.arange(groups)
    return torch.full((rows, groups), 0.5) if bits == 1 else ((n + g + salt) % (1 << bits)).float()


def plain(*shape: int) -> torch.Tensor:
    numbers = torch.arange(torch.Size(shape).numel()) % 17 - 8
    return (numbers.float() / 16).to(torch.bfloat16).view(shape)


def packed(name: str, shape: tuple[int, int], bits: int, salt: int) -> dict[str, torch.Tensor]:
    """An expert's matrix [rows, columns]."""
    (rows, columns), groups = shape, shape[1] // GROUP
    words = packing.pack_scale(scales(rows, groups, salt), zeros(rows, groups, bits, salt), bits)
    return {
        f"{name}_packed": packing.pack(codes(rows, columns, bits, salt), bits),
        f"{name}_scale": words,
    }


def make_tensors() -> dict[str, torch.Tensor]:
    tensors = {
        "model.embed_tokens.weight": plain(VOCABULARY, HIDDEN),
        "model.norm.weight": plain(HIDDEN),
        "model.layers.0.input_layernorm.weight": plain(HIDDEN),
        "model.layers.0.post_attention_layernorm.weight": plain(HIDDEN),
        "model.layers.0.block_sparse_moe.gate.weight": plain(len(WIDTHS), HIDDEN),
    }
    for salt, (name, (rows, columns)) in enumerate(LINEARS.items()):
        prefix = f"model.layers.0.self_attn.{name}"
        tensors[f"{prefix}.qweight"] = packing.pack_int4_linear(codes(rows, columns, 4, salt))
        tensors[f"{prefix}.scales"] = scales(rows, columns // GROUP, salt).t().half()
    for bits in map(int, WIDTHS.replace("0", "")):
        for salt, (name, shape) in enumerate(MATRICES.items(), 10 * bits):
            prefix = f"model.layers.0.block_sparse_moe.experts.{bits}.{name}"
            tensors |= packed(f"{prefix}.weight", shape, bits, salt)
    return tensors


def make_biased_tensors() -> dict[str, torch.Tensor]:
    """Rows of w13 in pairs; biases of all experts, dropped ones too."""
    experts, count = "model.layers.0.mlp.experts", len(WIDTHS)
    tensors = {
        "model.embed_tokens.weight": plain(VOCABULARY, HIDDEN),
        "model.norm.weight": plain(HIDDEN),
        "model.layers.0.input_layernorm.weight": plain(HIDDEN),
        "model.layers.0.post_attention_layernorm.weight": plain(HIDDEN),
        "model.layers.0.mlp.router.weight": plain(count, HIDDEN),
        "model.layers.0.mlp.router.bias": plain(count),
        "model.layers.0.self_attn.sinks": plain(HEADS),
        f"{experts}.gate_up_proj_bias": plain(count, 2 * WIDTH),
        f"{experts}.down_proj_bias": plain(count, HIDDEN),
    }
    for name, shape in LINEARS.items():
        tensors[f"model.layers.0.self_attn.{name}.weight"] = plain(*shape)
        tensors[f"model.layers.0.self_attn.{name}.bias"] = plain(shape[0])
    for bits in map(int, WIDTHS.replace("0", "")):
        prefix = f"{experts}.{bits}"
        tensors |= packed(f"{prefix}.w13_weight", (2 * WIDTH, HIDDEN), bits, 10 * bits)
        tensors |= packed(f"{prefix}.w2_weight", (HIDDEN, WIDTH), bits, 10 * bits + 1)
    return tensors


def make_config() -> dict[str, object]:
    quantization = QuantizationConfig(
        group_size=dict.fromkeys(("w13", "w2", "dense"), GROUP),
        expert_bits={0: (WIDTHS, WIDTHS)},
        dense_bits=4,
        dense_modules=("self_attn",),
        average_bits={"nominal": 2.0},
    )
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_SIZE,
        "num_local_experts": len(WIDTHS),
        "num_experts_per_tok": 2,
        "tie_word_embeddings": True,
        "quantization_config": quantization.to_dict(),
    }


def make_biased_config() -> dict[str, object]:
    config = make_config()
    quantization = QuantizationConfig(
        group_size=dict.fromkeys(("w13", "w2", "dense"), GROUP),
        expert_bits={0: (WIDTHS, WIDTHS)},
        average_bits={"nominal": 2.0},
        format_version=3,
    )
    own = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    return {**config, **own, "quantization_config": quantization.to_dict()}


MAKERS = {2: (make_config, make_tensors), 3: (make_biased_config, make_biased_tensors)}


def make_golden(folder: Path, version: int) -> None:
    make_settings, make = MAKERS[version]
    folder.mkdir(parents=True)
    write_json(folder / "config.json", make_settings())
    write_shard(folder / shard_name(1, 1), make())
    write_index(folder, [shard_name(1, 1)])
    write_manifest(folder, [shard_name(1, 1)])


if __name__ == "__main__":
    make_golden(Path(sys.argv[1]), int(sys.argv[2]))
