"""The vLLM plugin: quantization method "mcmoe" and load format "mcmoe".

vLLM calls `register` through the entry point group `vllm.general_plugins` in every process that
it starts. Measured with vLLM 0.26 on H100 and H200 and with 0.32 on CPUs; 0.33 was tried on one
H200.
"""

__all__ = ["register"]

_registered = False


def register() -> None:
    """Make vLLM know mcmoe checkpoints. Idempotent; initialises no device."""
    global _registered
    if _registered:
        return
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    from mcmoe_vllm.plugin import metrics
    from mcmoe_vllm.plugin.config import McmoeConfig
    from mcmoe_vllm.plugin.loader import McmoeModelLoader

    register_quantization_config("mcmoe")(McmoeConfig)
    register_model_loader("mcmoe")(McmoeModelLoader)
    metrics.export()
    _registered = True
