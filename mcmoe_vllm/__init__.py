"""Extreme compression of Mixture-of-Experts language models, served by vLLM.

The compressor's functions carry the names of the commands: `plan`, `allocate`, `quantize`,
`inspect`, `evaluate`. They are imported on first use, so that `import mcmoe_vllm` touches
neither vLLM nor transformers nor a GPU.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "UserError": "mcmoe_vllm.errors",
    "plan": "mcmoe_vllm.compress.pipeline",
    "quantize": "mcmoe_vllm.compress.pipeline",
    "QuantizeOptions": "mcmoe_vllm.compress.options",
    "allocate": "mcmoe_vllm.allocate.pmq:allocate_file",
    "inspect": "mcmoe_vllm.inspection:inspect_checkpoint",
    "evaluate": "mcmoe_vllm.evaluate.perplexity:evaluate",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    return getattr(import_module(module), attribute or name)


class _Callable(ModuleType):
    """A module that has the name of a command's function, and can be called as that."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return __getattr__(self.__name__.rpartition(".")[2])(*arguments, **named)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing mcmoe_vllm.quantize.gptq puts the package of that name where the function was.
        if name in _EXPORTS and isinstance(value, ModuleType):
            value.__class__ = _Callable
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
