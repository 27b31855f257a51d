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
    from vllm.model_executor import model_loader
    from vllm.model_executor.layers.quantization import register_quantization_config

    from mcmoe_vllm.plugin import metrics
    from mcmoe_vllm.plugin.config import McmoeConfig
    from mcmoe_vllm.plugin.loader import CheckedModelLoader, McmoeModelLoader
    from mcmoe_vllm.plugin.unsupported import refuse_saving

    register_quantization_config("mcmoe")(McmoeConfig)
    model_loader.register_model_loader("mcmoe")(McmoeModelLoader)
    # vLLM checks what was loaded for unquantized models alone. Its own way of replacing a loader
    # warns everyone who starts it, with whatever model.
    loaders = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    for load_format, loader in loaders.items():
        if loader is model_loader.DefaultModelLoader:
            loaders[load_format] = CheckedModelLoader
    refuse_saving(model_loader.TensorizerLoader, "save_tensorized_model")
    metrics.export()
    _registered = True
