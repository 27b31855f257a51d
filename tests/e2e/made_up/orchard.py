"""An architecture that nobody ships, in one file: all that adding it takes.

Mixtral under other names: transformers and vLLM get a class each, the compressor a row.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig
from transformers import MixtralForCausalLM as TransformersMixtral
from vllm import ModelRegistry
from vllm.model_executor.models.mixtral import MixtralForCausalLM as VllmMixtral

from mcmoe_vllm.model.architectures import ARCHITECTURES, Architecture

NAME = "OrchardForCausalLM"
MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}  # ours -> Mixtral's


class OrchardConfig(MixtralConfig):
    model_type = "orchard"


class OrchardForCausalLM(TransformersMixtral):
    config_class = OrchardConfig


class Served(VllmMixtral):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights((as_mixtral(name), tensor) for name, tensor in weights)


def as_mixtral(name: str) -> str:
    name = name.replace(".moe.", ".block_sparse_moe.")
    for ours, theirs in MATRICES.items():
        if ".experts." in name:
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def register() -> None:
    AutoConfig.register("orchard", OrchardConfig)
    AutoModelForCausalLM.register(OrchardConfig, OrchardForCausalLM)
    ModelRegistry.register_model(NAME, Served)
    ARCHITECTURES[NAME] = Architecture(
        NAME, projections=("gate", "up", "down"), renames=((".moe.", ".mlp."),)
    )


def save(folder: Path, **settings: object) -> None:
    """A random model with the names that are this architecture's on disk."""
    config = OrchardConfig(**settings, architectures=[NAME], dtype="bfloat16")
    torch.manual_seed(0)
    model = OrchardForCausalLM._from_config(config, dtype=torch.bfloat16)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1:
            tensor = torch.randn_like(tensor) * tensor.shape[-1] ** -0.5
        name = name.replace(".mlp.", ".moe.")
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor.contiguous()
            continue
        prefix = name.rpartition(".")[0]
        for expert, matrix in enumerate(tensor):
            parts = {"down": matrix}
            if name.endswith("gate_up_proj"):
                parts = dict(zip(("gate", "up"), matrix.chunk(2), strict=True))
            for part, weight in parts.items():
                tensors[f"{prefix}.{expert}.{part}.weight"] = weight.clone()
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
