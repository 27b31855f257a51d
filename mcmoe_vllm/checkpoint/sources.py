"""Models as their makers quantized them, seen as if their weights had 16 bits.

    quant_method of config.json -> formats -> a view, whose tensors are dequantized as they are read

What config.json leaves open, such as which linears were not quantized, the tensors on disk decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from mcmoe_vllm.checkpoint.files import Checkpoint, TensorInfo
from mcmoe_vllm.checkpoint.format import QUANT_METHOD
from mcmoe_vllm.checkpoint.source_formats import SOURCES, Block, SourceFormat, dequantize
from mcmoe_vllm.checkpoint.view import Computed, View
from mcmoe_vllm.errors import UserError, some

Tensors = Mapping[str, TensorInfo]
# What a model computes in -> what its weights are read in.
DTYPES = {
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
    "float32": ("F32", torch.float32),
}


def with_16_bit_tensors(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself if it is a 16-bit or an mcmoe one; else a view of it with the names,
    shapes and config.json of the 16-bit model, in the dtype that config.json names.

    Raises UserError for quantization methods that cannot be read, for a method that the tensors
    contradict, and listing all codes and scales that do not belong together.
    """
    (method, settings), tensors = _method(checkpoint.config), checkpoint.tensors
    if why := _why_unreadable(method, tensors):
        raise UserError(f"{checkpoint.path} {why}")
    if method is None or method == QUANT_METHOD:
        return checkpoint
    matrices = _find_matrices(tensors, SOURCES[method])
    blocks = {format: format.block(settings) for format in matrices.values()}
    if wrong := list(_contradictions(tensors, matrices, blocks, SOURCES[method])):
        raise UserError(
            f"{checkpoint.path} is not quantized as its config.json says in {len(wrong)} "
            f"place{'s' * (len(wrong) != 1)}:{some(wrong)}\nDownload the checkpoint again, with "
            "the config.json that belongs to it"
        )
    return _view(checkpoint, matrices, blocks)


def _method(config: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """quant_method, None for a 16-bit model, and quantization_config; of the language model where
    that is a part of the whole."""
    found = (holder.get("quantization_config") for holder in _holders(config))
    settings = next((s for s in found if s is not None), None)
    if isinstance(settings, dict):
        return settings.get("quant_method") or "none", settings
    return settings, {}


def _holders(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Where settings of the language model may stand: in config.json, or in a part of it."""
    text = config.get("text_config")
    return config, text if isinstance(text, dict) else {}


def _describe_sources() -> str:
    formats = {method: dict.fromkeys(f.says for f in of) for method, of in SOURCES.items()}
    return ", ".join(f"{method} ({', '.join(says)})" for method, says in formats.items())


def _find_matrices(tensors: Tensors, formats: Iterable[SourceFormat]) -> dict[str, SourceFormat]:
    """Name of codes -> their format: of several that it may be, the one whose scales are there."""
    found = {}
    for name, info in tensors.items():
        fitting = [f for f in formats if name.endswith(f.codes) and info.dtype == f.codes_dtype]
        if fitting:
            whole = (f for f in fitting if f.beside(name, f.scale) in tensors)
            found[name] = next(whole, fitting[0])
    return found


def _whole(tensors: Tensors) -> Iterator[tuple[str, str, str]]:
    """Method, codes and scales of matrices that are stored in the way of any method."""
    for method, formats in SOURCES.items():
        for name, format in _find_matrices(tensors, formats).items():
            if (scale := format.beside(name, format.scale)) in tensors:
                yield method, name, scale


def _why_unreadable(method: Any, tensors: Tensors) -> str | None:
    """What is wrong with quant_method and the tensors as a whole."""
    found, codes, scale = next(_whole(tensors), (None, "", ""))
    if method is None and found is not None:
        return (
            f"holds quantized weights ({codes} with {scale}), and its config.json has no "
            "quantization_config: give the one that belongs to them, of the quant_method "
            f"{found!r}"
        )
    if method is None or method == QUANT_METHOD:
        return None
    if not isinstance(method, str) or method not in SOURCES:
        return (
            f"is quantized in a way that cannot be read (quant_method {method!r:.60}); readable "
            f"are {_describe_sources()}: give the model in one of these, or in 16 bits"
        )
    if _find_matrices(tensors, SOURCES[method]):
        return None
    other = f"; {codes} is stored as {found} has it" if found else ""
    return (
        f"has the quant_method {method!r} in config.json, but no tensor is stored so{other}. Give "
        "the config.json that belongs to the weights; that of 16-bit ones has no "
        "quantization_config"
    )


def _contradictions(
    tensors: Tensors,
    matrices: Mapping[str, SourceFormat],
    blocks: Mapping[SourceFormat, Block],
    formats: Iterable[SourceFormat],
) -> Iterator[str]:
    """Codes and scales that do not belong together, a sentence each."""
    scales = {name: f.beside(name, f.scale) for name, f in matrices.items()}
    for name, format in matrices.items():
        codes, scale = tensors[name], tensors.get(scales[name])
        weight = format.beside(name, format.weight)
        if weight != name and weight in tensors:
            yield f"{name} and {weight} are one weight, stored twice"
        if len(codes.shape) < 2 or len(format.shape(codes.shape)) < 2:
            yield f"{name} is {codes.dtype} {list(codes.shape)}, needs rows and columns"
        elif scale is None:
            yield f"{name} is {codes.dtype}, and {scales[name]} is missing"
        else:
            wanted = format.scale_shape(codes.shape, blocks[format])
            if scale.shape != wanted or scale.dtype not in format.scale_dtypes:
                yield (
                    f"{scales[name]} is {scale.dtype} {list(scale.shape)}, those of {name}, "
                    f"{list(codes.shape)}, are {' or '.join(format.scale_dtypes)} {list(wanted)}"
                )
    known = set(scales.values())
    for name, info in tensors.items():
        strays = (f for f in formats if name.endswith(f.scale) and info.dtype in f.scale_dtypes)
        if name not in known and any(strays):
            yield f"{name} holds scales, and there are no codes that it belongs to"


def _view(
    checkpoint: Checkpoint,
    matrices: Mapping[str, SourceFormat],
    blocks: Mapping[SourceFormat, Block],
) -> View:
    """Matrices dequantized, every other tensor as it is."""
    name16, dtype = _dtype(checkpoint.config)
    tensors, computed = dict(checkpoint.tensors), {}
    for name, format in matrices.items():
        codes, scale = tensors.pop(name), format.beside(name, format.scale)
        for suffix in (format.scale, *format.redundant):
            tensors.pop(format.beside(name, suffix), None)
        weight, shape = format.beside(name, format.weight), format.weight_shape(codes.shape)
        tensors[weight] = TensorInfo(codes.shard, name16, shape, math.prod(shape) * dtype.itemsize)
        compute = partial(dequantize, format=format, block=blocks[format], dtype=dtype)
        computed[weight] = Computed((name, scale), compute)
    config = _without_settings(checkpoint.config)
    return View(checkpoint.path, config, tensors, checkpoint, computed)


def _dtype(config: Mapping[str, Any]) -> tuple[str, torch.dtype]:
    """What the model computes in: safetensors' name and torch's."""
    names = ("dtype", "torch_dtype")
    named = [DTYPES.get(str(h.get(key))) for h in _holders(config) for key in names]
    return next((found for found in named if found), DTYPES["bfloat16"])


def _without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(text := found.get("text_config"), dict):
        found["text_config"] = _without_settings(text)
    return found
