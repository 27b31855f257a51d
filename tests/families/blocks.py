"""What vLLM's blocks of experts compute from a compressed folder, beside transformers' blocks of
the same weights: router, experts and shared experts, without attention and without an engine."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mcmoe_vllm.checkpoint.files import open_checkpoint

TOKENS, SEED = 40, 3


def block_errors(folder: Path, work: Path, cls: str, launch: dict[str, Any]) -> list[float]:
    """Root mean square error over root mean square, float32, of each layer with routed experts.

    work: a folder for the dequantized weights. cls: of transformers. launch: arguments for vLLM.
    """
    theirs = transformers_blocks(folder, work / "dequantized", cls)
    hidden_size = open_checkpoint(folder).config["hidden_size"]
    x = torch.randn(TOKENS, hidden_size, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        expected = {layer: run(block, x[None]) for layer, block in theirs.items()}
        measured = vllm_outputs(folder, work, x, launch)
    assert measured.keys() == expected.keys()
    return [float((measured[i] - expected[i]).norm() / expected[i].norm()) for i in measured]


def transformers_blocks(folder: Path, target: Path, cls: str) -> dict[int, Any]:
    import transformers

    from tests.e2e.conftest import write_dequantized

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    write_dequantized(folder, target)
    model, found = getattr(transformers, cls).from_pretrained(
        target, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    return blocks(
        model.eval(), lambda m: isinstance(getattr(m, "down_proj", None), torch.nn.Parameter)
    )


def vllm_outputs(
    folder: Path, work: Path, x: torch.Tensor, launch: dict[str, Any]
) -> dict[int, torch.Tensor]:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import (
        initialize_model,
        process_weights_after_loading,
    )

    from mcmoe_vllm.plugin import register

    register()
    asked = {"enforce_eager": True, "dtype": "float32", "max_model_len": 256, **launch}
    config = EngineArgs(str(folder), skip_tokenizer_init=True, **asked).create_engine_config()
    with set_current_vllm_config(config):
        store = work / f"store-{os.getpid()}"
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        torch.set_default_dtype(torch.float32)
        model = initialize_model(config)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        with set_forward_context(None, config, num_tokens=len(x)):
            found = blocks(model, lambda m: hasattr(m, "routed_experts"))
            return {layer: run(block, x.clone()) for layer, block in found.items()}


def blocks(model: Any, is_experts: Callable[[Any], bool]) -> dict[int, Any]:
    """Decoder layer -> the module that holds its experts."""
    found = {}
    for path, module in model.named_modules():
        if is_experts(module):
            layer = re.search(r"layers\.(\d+)\.", path)
            assert layer is not None, path
            found[int(layer.group(1))] = model.get_submodule(path.rpartition(".")[0])
    return dict(sorted(found.items()))


def run(block: Any, x: torch.Tensor) -> torch.Tensor:
    out = block(x)
    return (out[0] if isinstance(out, tuple) else out).reshape(TOKENS, -1)
