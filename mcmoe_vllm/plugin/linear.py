"""Dense int4 linears: vLLM's own GPTQ kernels, or dequantized once at load where none applies."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod
from vllm.platforms import current_platform

from mcmoe_kernels.formats.packing import dequantize_int4_linear
from mcmoe_vllm.checkpoint.format import DENSE_WIDTH, QuantizationConfig
from mcmoe_vllm.checkpoint.verification import wrong_values
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin.launch import Launch

logger = init_logger("vllm.mcmoe")
STORED = {"qweight": torch.int32, "scales": torch.float16}


# vLLM chooses the weight loader by the name of the method's class.
@register_weight_loader_v2_supported_method
class McmoeLinearMethod(AutoGPTQLinearMethod):
    """qweight int32 [K/8, N] and scales [K/G, N] of a symmetric int4 linear (docs/FORMAT.md).

    Three cases compute from weights dequantized at load: float32 activations, exactly, which is the
    mode for checking accuracy; on a CPU weights that fit into the cache, because the int4 kernel is
    slower than the plain one from a few tokens on; and on a CPU for which vLLM has no int4 kernel.
    """

    kernel: Any  # vLLM's MPLinearKernel
    # Parameters of which it knows itself whether all was loaded, and those that are in no file.
    counted = ("qweight", "scales", "qzeros", "g_idx")

    def __init__(self, config: QuantizationConfig, launch: Launch, prefix: str) -> None:
        self.group_size = config.group_size["dense"]
        # bits, group size, act order, symmetric, quantized lm_head, per-module rules, full config
        super().__init__(AutoGPTQConfig(4, self.group_size, False, True, False, {}, {}))
        self.input_dtype = None
        self.launch = launch
        self.prefix = prefix
        self.plain: UnquantizedLinearMethod | None = None  # once the weights are dequantized
        # Parameter -> what vLLM has loaded of it: "q", "k", "v" or 0, 1 of fused linears, or None
        # for all.
        self.filled: dict[str, set[Any]] = {name: set() for name in STORED}

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if input_size_per_partition % self.group_size:
            raise UserError(
                f"{self.prefix}: in_features of {input_size} split over "
                f"{input_size // input_size_per_partition} ranks gives "
                f"{input_size_per_partition}, no multiple of the group size {self.group_size}. "
                f"Use a smaller --tensor-parallel-size, or compress with --tensor-parallel "
                f"{input_size // input_size_per_partition}."
            )
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        self.kernel = prefer_marlin(self.kernel)
        self.dtype = params_dtype
        self.parts = len(output_partition_sizes)
        for name in STORED:
            param = getattr(layer, name)
            param.weight_loader = self._counting(name, param.weight_loader)

    def _counting(self, name: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        """vLLM's loader of a parameter, which refuses another dtype and notes what was loaded."""
        held = weakref.WeakMethod(loader) if inspect.ismethod(loader) else lambda: loader

        def weight_loader(
            param: torch.nn.Parameter, loaded_weight: torch.Tensor, *part: Any, **named: Any
        ) -> Any:
            self._check_tensor(name, loaded_weight)
            load = held()
            assert load is not None, "the layer is gone"
            result = load(param, loaded_weight, *part, **named)
            self.filled[name].add(next(iter((*part, *named.values())), None))
            return result

        return weight_loader

    def _check_tensor(self, name: str, tensor: torch.Tensor) -> None:
        wrong: list[str] = []
        if tensor.dtype != STORED[name]:
            wrong = [f"{name} is {_short(tensor.dtype)}, needs {_short(STORED[name])}"]
        elif name == "scales":
            wrong = list(wrong_values(name, tensor, DENSE_WIDTH))
        if wrong:
            raise UserError(
                f"{self.prefix}: {'; '.join(wrong)}. The folder is damaged: copy or compress it "
                f"again."
            )

    def _refuse_gaps(self) -> None:
        missing = [
            f"{name} ({len(filled)} of {self.parts} parts loaded)"
            for name, filled in self.filled.items()
            if None not in filled and len(filled) != self.parts
        ]
        if missing:
            raise UserError(
                f"{self.prefix}: the checkpoint lacks {' and '.join(missing)} of an int4 linear. "
                f"The folder is incomplete: copy or compress it again. `mcmoe inspect --check "
                f"<folder>` lists what is there."
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        if not self.launch.dummy:
            self._refuse_gaps()
        for filled in self.filled.values():  # what is loaded next must be whole by itself
            filled.clear()
        if self.plain is None and self._dequantize_here(layer):
            self.plain = UnquantizedLinearMethod()
        if self.plain is None:
            if current_platform.is_cpu():
                self.kernel.config = keep_activations(self.kernel.config)
            super().process_weights_after_loading(layer)
            return
        logger.info_once("mcmoe: dense int4 weights are dequantized to %s at load", str(self.dtype))
        weight = dequantize_int4_linear(layer.qweight.data, layer.scales.data).to(self.dtype)
        for name in ("qweight", "scales", "qzeros", "g_idx"):
            if name in layer._parameters:
                delattr(layer, name)
        layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
        self.plain.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.plain is not None:
            return self.plain.apply(layer, x, bias)
        return super().apply(layer, x, bias)

    def _dequantize_here(self, layer: Any) -> bool:
        """Decide, once, whether to keep the weights dequantized; on a CPU the launch's budget pays
        for them."""
        if self.dtype == torch.float32:
            return True
        if not current_platform.is_cpu():
            return False
        if self.launch.budget.take(8 * layer.qweight.numel() * self.dtype.itemsize):
            return True
        if hasattr(torch.ops._C, "cpu_gemm_wna16"):
            return False
        logger.warning_once(
            "mcmoe: this vLLM has no int4 kernel for this CPU (AVX-512 is needed): dense int4 "
            "weights are dequantized, whatever cpu_weight_cache_gib allows"
        )
        return True


def keep_activations(config: Any) -> Any:
    """The config of vLLM's CPU kernel for which it leaves bfloat16 activations as they are, unless
    the user chose (VLLM_CPU_INT4_W4A8).

    On CPUs with AMX it makes 8-bit numbers of them, which nearly doubles how far a compressed
    model's log-probabilities are off: 0.032 on average where 0.017 is bfloat16's own. It decides by
    act_type, which nothing else reads. AMX, which the other kernel uses, a process must ask for.
    """
    if "VLLM_CPU_INT4_W4A8" in os.environ or not torch.cpu._is_amx_tile_supported():
        return config
    return replace(config, act_type=torch.float16) if torch.cpu._init_amx() else config


def prefer_marlin(kernel: Any) -> Any:
    """Marlin in the place of Machete, vLLM's first choice on Hopper, unless the user chose
    (--linear-backend, VLLM_DISABLED_KERNELS) or Marlin cannot compute the layer.

    Marlin is faster for few requests at a time, Machete for many (docs/speed.md): who serves many
    on Hopper may choose Machete.
    """
    if type(kernel).__name__ != "MacheteLinearKernel":
        return kernel
    from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel

    chosen = getattr(get_current_vllm_config_or_none(), "kernel_config", None)
    if (
        getattr(chosen, "linear_backend", "auto") != "auto"
        or getattr(chosen, "linear_backend_per_quant", None)
        or MarlinLinearKernel.__name__ in envs.VLLM_DISABLED_KERNELS
        or not MarlinLinearKernel.can_implement(kernel.config)[0]
    ):
        return kernel
    logger.info_once("mcmoe: dense int4 linears run on Marlin; for Machete, disable Marlin")
    names = [kernel.w_q_name, kernel.w_s_name, kernel.w_zp_name]
    names += [kernel.w_gidx_name] if hasattr(kernel, "w_gidx_name") else []  # vLLM 0.26
    return MarlinLinearKernel(kernel.config, *names)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
