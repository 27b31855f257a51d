"""What vLLM calls an activation of experts, and what is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mcmoe_kernels.activations import Activation
from mcmoe_vllm.errors import UserError

# What vLLM's kernels compute without being told more, and what a layer may set of it.
ACTIVATIONS: dict[str, tuple[Activation, tuple[str, ...]]] = {
    "gelu": (Activation("gelu"), ()),
    "gelu_tanh": (Activation("gelu_tanh"), ()),
    "silu": (Activation("silu"), ("limit",)),
    "swigluoai": (Activation("silu", limit=7.0, alpha=1.702, up_offset=1.0), ()),
    "swigluoai_uninterleave": (Activation("silu"), ("limit", "alpha", "up_offset")),
    "swiglustep": (Activation("silu", limit=7.0, limit_after=True), ()),
}
SETTINGS = {"limit": "swiglu_limit", "alpha": "swiglu_alpha", "up_offset": "swiglu_beta"}


def find_activation(layer: Any, moe: Any, prefix: str) -> Activation:
    """What a layer's experts compute between their projections.

    layer: vLLM's RoutedExperts; moe: its FusedMoEConfig. Raises UserError for what is not computed,
    and for settings that vLLM's kernels would not heed.
    """
    name = _name(layer)
    if name not in ACTIVATIONS:
        raise UserError(
            f"{prefix} has activation {name!r}; mcmoe serves "
            f"{', '.join(sorted(ACTIVATIONS))}. Serve the model without compression."
        )
    activation, allowed = ACTIVATIONS[name]
    settings = {field: _setting(layer, moe, setting) for field, setting in SETTINGS.items()}
    given: dict[str, Any] = {f: value for f, value in settings.items() if value is not None}
    wrong = [
        f"{SETTINGS[field]} {value:g}"
        for field, value in given.items()
        if field not in allowed and value != getattr(activation, field)
    ]
    if wrong:
        raise UserError(
            f"{prefix} has activation {name!r} with {' and '.join(wrong)}, which vLLM computes "
            "without. Serve the model without compression."
        )
    return replace(activation, **{field: given[field] for field in allowed if field in given})


def takes_pairs(layer: Any) -> bool:
    """Whether gate and up of a layer's experts lie in pairs of rows in vLLM's parameters."""
    return _name(layer) == "swigluoai"


def _name(layer: Any) -> str:
    return str(getattr(layer.activation, "value", layer.activation))


def _setting(layer: Any, moe: Any, name: str) -> float | None:
    own: float | None = getattr(layer, name, None)
    return getattr(moe, name, None) if own is None else own
