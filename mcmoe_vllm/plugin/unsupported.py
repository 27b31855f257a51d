"""What vLLM does with other models and not with an mcmoe one: a sentence for each flag, for each
setting of experts and for each call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.platforms import current_platform

from mcmoe_vllm.errors import UserError

# Those that hand over the folder's own tensors by name (and dummy none), so that what is loaded can
# be checked.
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mcmoe", "dummy")
ATTENTION = "q_proj k_proj v_proj o_proj"
NO_SAVING = (
    "{call} cannot save an mcmoe model, since loaded experts ({where}) are laid out for this "
    "machine's kernels and are no tensors of a checkpoint: copy the folder that is served instead"
)


def refuse_flags(vllm_config: Any) -> None:
    """Raise UserError, with every flag of the launch that an mcmoe model is not served with.

    vllm_config: vLLM's VllmConfig of the model that it builds.
    """
    wrong = [sentence for find in FLAGS if (sentence := find(vllm_config))]
    if wrong:
        raise UserError("mcmoe does not serve with " + "; nor with ".join(wrong))


def _load_format(config: Any) -> str | None:
    given = config.load_config.load_format
    if given in LOAD_FORMATS:
        return None
    return (
        f"--load-format {given}, by which what was loaded could not be checked: use "
        f"{', '.join(LOAD_FORMATS)}"
    )


def _lora(config: Any) -> str | None:
    lora = getattr(config, "lora_config", None)
    targets = getattr(lora, "target_modules", None) or ["experts"]  # None stands for all modules
    if lora is None or not any(name.rpartition(".")[2] == "experts" for name in targets):
        return None
    return (
        f"--enable-lora for experts, whose codes take no adapters: name the modules of adapters "
        f"for attention alone, as in --lora-target-modules {ATTENTION}"
    )


def _offload(config: Any) -> str | None:
    offload = getattr(config, "offload_config", None)
    given = {
        "--cpu-offload-gb": getattr(getattr(offload, "uva", None), "cpu_offload_gb", 0),
        "--offload-group-size": getattr(
            getattr(offload, "prefetch", None), "offload_group_size", 0
        ),
    }
    flags = [f"{flag} {value:g}" for flag, value in given.items() if value]
    if not flags:
        return None
    return (
        f"{' and '.join(flags)}, which would leave the experts where they are: drop it, and "
        f"compress to fewer bits or use more GPUs if memory is short"
    )


def _weight_transfer(config: Any) -> str | None:
    if getattr(config, "weight_transfer_config", None) is None:
        return None
    return (
        "--weight-transfer-config, since uncompressed weights cannot take the place of codes: "
        "compress the new model, and call reload_weights with its folder if its widths are the same"
    )


def _rotary_kernel(config: Any) -> str | None:
    """Of models that hand queries on head by head: those with latent attention, and LFM2."""
    ops, model = config.compilation_config.custom_ops, config.model_config
    on = {"all", "+rotary_embedding"}.intersection(ops) and "-rotary_embedding" not in ops
    if model is None or not on or not current_platform.is_cpu():
        return None
    by_head = model.use_mla or any(name.startswith("Lfm2") for name in model.architectures)
    if not by_head or _rotates_every_head():
        return None
    return (
        "vLLM's rotary kernel for CPUs (--enforce-eager), which misreads this model's queries: add "
        """--compilation-config '{"custom_ops": ["-rotary_embedding"]}' or drop the flag"""
    )


def _rotates_every_head() -> bool:
    """Whether vLLM's kernel rotates queries [T, heads, width] as it does [T, heads * width]."""
    from vllm import _custom_ops as ops

    results = []
    for shape in ((2, 2, 16), (2, 32)):
        query, key = torch.ones(shape), torch.ones(2, 16)
        ops.rotary_embedding(torch.arange(2), query, key, 16, torch.eye(2, 16), False)
        results.append(query.flatten())
    return torch.equal(*results)


FLAGS: tuple[Callable[[Any], str | None], ...] = (
    _load_format,
    _lora,
    _offload,
    _weight_transfer,
    _rotary_kernel,
)


def _has_zero_experts(layer: Any, moe: Any) -> bool:
    """Whether tokens may be sent to experts that are not there, which hand on what they are given:
    the bias of the choice counts them in."""
    bias = layer.e_score_correction_bias
    return bias is not None and bias.numel() > moe.num_experts


def _given(name: str) -> Callable[[Any, Any], bool]:
    """Whether a layer, or its config where it is there alone, has a setting of this name."""
    return lambda layer, moe: getattr(layer, name, getattr(moe, name, None)) is not None


# What vLLM's classes ask of experts and mcmoe's kernels do not compute, and which layers ask.
EXPERTS: dict[str, Callable[[Any, Any], bool]] = {
    "experts without a gate": lambda layer, moe: not getattr(moe, "is_act_and_mul", True),
    "a bounded activation (activation_situ_beta)": _given("activation_situ_beta"),
    "a bounded activation (activation_situ_linear_beta)": _given("activation_situ_linear_beta"),
    "routing weights that multiply what experts are given (apply_router_weight_on_input)": (
        lambda layer, moe: bool(layer.apply_router_weight_on_input)
    ),
    "experts that hand on what they are given (zero experts)": _has_zero_experts,
}


def refuse_experts(layer: Any, moe: Any, prefix: str) -> None:
    """Raise UserError, with everything that a layer asks of its experts in vain.

    layer: vLLM's RoutedExperts. moe: its FusedMoEConfig.
    """
    wrong = [what for what, asked in EXPERTS.items() if asked(layer, moe)]
    if wrong:
        raise UserError(
            f"{prefix}: mcmoe does not serve {'; nor '.join(wrong)}. Serve the model without "
            "compression."
        )


def refuse_state_dict(layer: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    """A hook that a loaded layer's `state_dict` begins with: nobody is to take it for complete, as
    vLLM's save_sharded_state and torch.save would. Raises UserError."""
    call = "save_sharded_state (or another use of state_dict)"
    raise UserError(NO_SAVING.format(call=call, where=prefix.rstrip(".")))


def refuse_saving(loader: Any, call: str) -> None:
    """Let `loader.save_model(model, ...)`, which `call` is for, refuse an mcmoe model."""
    save = loader.save_model

    @functools.wraps(save)
    def save_model(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(hasattr(getattr(m, "quant_method", None), "counted") for m in model.modules()):
            raise UserError(NO_SAVING.format(call=call, where="of every layer"))
        return save(model, *args, **kwargs)

    loader.save_model = staticmethod(save_model)
