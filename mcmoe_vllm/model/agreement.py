"""Whether a checkpoint holds exactly the tensors of its model, as far as headers tell.

    skeleton + quantization_config -> what must be there -> what contradicts it

Whoever opens a model asks this first, so that nothing is worked on, shown or served that is not
whole: names, shapes and dtypes of every tensor, not only of experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mcmoe_kernels.formats import FORMATS
from mcmoe_vllm.checkpoint.files import Checkpoint, TensorInfo
from mcmoe_vllm.checkpoint.format import DENSE_WIDTH, EXPERT_SCALES, QuantizationConfig
from mcmoe_vllm.errors import UserError, some
from mcmoe_vllm.model.architectures import Architecture
from mcmoe_vllm.model.skeleton import Skeleton
from mcmoe_vllm.widths import code_bits, in_words

FLOATS = ("BF16", "F16", "F32")
# Of the quantized tensors: what a name ends with.
PACKED, SCALE, QWEIGHT, SCALES = ".weight_packed", ".weight_scale", ".qweight", ".scales"
# Tables that older libraries stored, and that every reader makes itself.
LEFT_UNREAD = (r"rotary_emb\.inv_freq$",)


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix [rows, columns]: width of its codes, and columns that share a scale."""

    rows: int
    columns: int
    width: int
    group_size: int


@dataclass(frozen=True)
class Promise:
    """A tensor that must be there. note: what follows from which setting; matrix: what codes or
    scales belong to."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    note: str = ""
    matrix: Matrix | None = None


def promised_tensors(
    skeleton: Skeleton, quantization: QuantizationConfig | None
) -> dict[str, Promise]:
    """Name on disk -> what must be there, of a 16-bit checkpoint or an mcmoe one."""
    names, shapes = skeleton.architecture, skeleton.shapes()
    promised: dict[str, Promise] = {}
    for parameter, shape in shapes.items():
        if parameter == f"{names.head}.weight" and skeleton.ties_head:
            continue
        layer, inside = names.split_parameter(parameter)
        if layer is None:
            promised[parameter] = Promise(FLOATS, shape)
        elif not inside.startswith(f"{names.module}.{names.experts}."):
            name = names.stored_name(layer, inside)
            promised |= _promise_plain(name, inside, shape, quantization)
    for layer in skeleton.moe_layers:
        promised |= _promise_experts(skeleton, layer, quantization)
    return promised


def contradictions(
    tensors: Mapping[str, TensorInfo], skeleton: Skeleton, quantization: QuantizationConfig | None
) -> Iterator[str]:
    """Everything that is not as config.json says, a sentence each. tensors: of the headers."""
    wrong = list(_wrong_settings(skeleton, quantization))
    yield from wrong
    if wrong:
        return  # shapes that follow from settings that contradict each other say nothing
    promised = promised_tensors(skeleton, quantization)
    for name, promise in promised.items():
        found = tensors.get(name)
        if found is None:
            yield f"{name} is missing" + (f", config says {promise.note}" if promise.note else "")
        elif found.dtype not in promise.dtypes or found.shape != promise.shape:
            yield _describe_difference(name, found, promise)
    yield from _unexpected(tensors, skeleton, promised)


def require_agreement(
    checkpoint: Checkpoint, skeleton: Skeleton, quantization: QuantizationConfig | None
) -> None:
    """Raises UserError listing what contradicts config.json."""
    names, layers = skeleton.architecture, skeleton.moe_layers
    first = [name for layer in layers for name in names.expert_weights(layer, 0)]
    if quantization is None and first and not any(name in checkpoint for name in first):
        # One sentence, not one for each expert.
        raise UserError(
            f"{checkpoint.path} has no tensors {names.expert_prefix(layers[0], 0)}.*: its experts "
            "are missing or stored in a layout or under names that are not supported"
        )
    wrong = list(contradictions(checkpoint.tensors, skeleton, quantization))
    if wrong:
        remedy = (
            "Give the original 16-bit model whole, with the config.json that belongs to it"
            if quantization is None
            else "Download the checkpoint again, or compress the model anew"
        )
        raise UserError(
            f"{checkpoint.path} contradicts its config.json in {len(wrong)} "
            f"place{'s' * (len(wrong) != 1)}:{some(wrong)}\n{remedy}"
        )


def require_one_head(checkpoint: Checkpoint, skeleton: Skeleton) -> None:
    """Raises UserError if a head is stored that config.json says is the embedding, and is another:
    engines believe the config."""
    names = [f"{skeleton.architecture.head}.weight", f"{skeleton.architecture.embedding}.weight"]
    if not (skeleton.ties_head and all(name in checkpoint for name in names)):
        return
    head, embedding = checkpoint.read(names).values()
    if head.shape != embedding.shape or not bool((head == embedding).all()):
        raise UserError(
            f"{checkpoint.path} holds a {names[0]} other than the embedding, and config.json has "
            "tie_word_embeddings true, by which it would not be used: set that to false"
        )


def _promise_plain(
    name: str, inside: str, shape: tuple[int, ...], quantization: QuantizationConfig | None
) -> dict[str, Promise]:
    """A parameter of a decoder layer that is no routed expert's: as it is, or an int4 linear."""
    prefix, _, kind = name.rpartition(".")
    parent = inside.split(".")[-3:-2]
    int4 = (
        quantization is not None
        and quantization.dense_bits == DENSE_WIDTH
        and kind == "weight"
        and len(shape) == 2
        and bool(set(parent) & set(quantization.dense_modules))
    )
    if not int4 or quantization is None:
        return {name: Promise(FLOATS, shape)}
    (rows, columns), group = shape, quantization.group_size["dense"]
    matrix = Matrix(rows, columns, DENSE_WIDTH, group)
    return {
        prefix + QWEIGHT: Promise(("I32",), (columns // 8, rows), "int4", matrix),
        prefix + SCALES: Promise(
            ("F16",), (columns // group, rows), f"int4, group size {group}", matrix
        ),
    }


def _promise_experts(
    skeleton: Skeleton, layer: int, quantization: QuantizationConfig | None
) -> dict[str, Promise]:
    """The matrices of a layer's routed experts; nothing for a dropped one."""
    hidden, width = skeleton.hidden_size, skeleton.expert_width
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    groups = ("w13", "w13", "w2")
    promised: dict[str, Promise] = {}
    for expert in range(skeleton.num_experts):
        names = skeleton.architecture.expert_weights(layer, expert)
        for name, shape, group in zip(names, shapes, groups, strict=True):
            if quantization is None:
                promised[name] = Promise(FLOATS, shape)
            elif bits := quantization.bits(layer, group)[expert]:
                promised |= _promise_matrix(name, shape, bits, group, quantization)
    return promised


def _promise_matrix(
    name: str, shape: tuple[int, int], bits: int, group: str, quantization: QuantizationConfig
) -> dict[str, Promise]:
    (rows, columns), size = shape, quantization.group_size[group]
    prefix, matrix = name.removesuffix(".weight"), Matrix(rows, columns, bits, size)
    dtype, per_group = EXPERT_SCALES[quantization.format_version]
    return {
        prefix + PACKED: Promise(
            ("U8",), (rows, columns * code_bits(bits) // 8), in_words(bits), matrix
        ),
        prefix + SCALE: Promise(
            (dtype,), (rows, per_group * columns // size), f"group size {size}", matrix
        ),
    }


def _wrong_settings(skeleton: Skeleton, quantization: QuantizationConfig | None) -> Iterator[str]:
    """What config.json says against itself, or against what engines compute."""
    names, layers = skeleton.architecture, skeleton.moe_layers
    activation = getattr(skeleton.config, names.activation)
    if activation not in names.activations:
        yield (
            f"{names.activation} is {activation!r}, vLLM's {names.name} computes "
            f"{' or '.join(names.activations)}"
        )
    if not 1 <= skeleton.top_k <= skeleton.num_experts:
        yield f"{names.top_k} is {skeleton.top_k}, the model has {skeleton.num_experts} experts"
    if not layers:
        yield "no layer has routed experts"
    if quantization is None:
        return
    if quantization.num_experts != skeleton.num_experts:
        yield (
            f"{names.num_experts} is {skeleton.num_experts}, quantization_config has widths of "
            f"{quantization.num_experts} experts"
        )
    for layer in sorted(set(layers) ^ set(quantization.expert_bits)):
        has, lacks = "routed experts", "widths in expert_bits"
        if layer not in layers:
            has, lacks = lacks, has
        yield f"layer {layer} has {has} but no {lacks}"
    for group, key, size in (
        ("w13", "hidden_size", skeleton.hidden_size),
        ("w2", names.expert_width, skeleton.expert_width),
    ):
        if size % quantization.group_size[group]:
            yield (
                f"{key} is {size}, no multiple of the group size "
                f"{quantization.group_size[group]} of {group}"
            )
    if quantization.dense_bits == DENSE_WIDTH:
        yield from _wrong_modules(skeleton, quantization)


def _wrong_modules(skeleton: Skeleton, quantization: QuantizationConfig) -> Iterator[str]:
    names, group = skeleton.architecture, quantization.group_size["dense"]
    for module in quantization.dense_modules:
        if module not in names.dense:
            yield f"dense_modules names {module!r}, {names.name} has {', '.join(names.dense)}"
    for parameter, shape in skeleton.shapes().items():
        _, inside = names.split_parameter(parameter)
        parent = inside.split(".")[-3:-2]
        is_linear = len(shape) == 2 and set(parent) & set(quantization.dense_modules)
        if is_linear and shape[1] % group:
            yield f"{parameter} has {shape[1]} columns, no multiple of the group size {group}"


def _describe_difference(name: str, found: TensorInfo, promise: Promise) -> str:
    guess = ""
    matrix = promise.matrix
    if name.endswith(PACKED) and matrix is not None and len(found.shape) == 2:
        held = found.shape[1] * 8 / matrix.columns
        known = found.shape[0] == matrix.rows and held in FORMATS
        guess = f" ({in_words(int(held))})" if known else ""
    any_float = promise.dtypes == FLOATS and found.dtype in FLOATS
    dtype = "" if any_float else " or ".join(promise.dtypes) + " "
    note = f" ({promise.note})" if promise.note else ""
    return (
        f"{name} is {found.dtype} {list(found.shape)}{guess}, config says {dtype}"
        f"{list(promise.shape)}{note}"
    )


def _unexpected(
    tensors: Mapping[str, TensorInfo], skeleton: Skeleton, promised: Mapping[str, Promise]
) -> Iterator[str]:
    """Tensors that no part of the model asks for."""
    unread = [re.compile(pattern) for pattern in (*LEFT_UNREAD, *skeleton.ignored())]
    names = skeleton.architecture
    for name in tensors:
        if name in promised or any(pattern.search(name) for pattern in unread):
            continue
        if name == f"{names.head}.weight" and skeleton.ties_head:
            continue  # `require_one_head`
        yield f"{name} is not expected{_why_unexpected(names, name, promised)}"


def _why_unexpected(names: Architecture, name: str, promised: Mapping[str, Promise]) -> str:
    prefix, _, kind = name.rpartition(".")
    if names.is_routed_expert(name):
        return ": its expert has 0 bits, or the model has no such tensor of an expert"
    if kind == "weight" and prefix + QWEIGHT in promised:
        return f": config says int4 ({prefix}{QWEIGHT})"
    if f".{kind}" in (QWEIGHT, SCALES):
        return ": config says 16 bits, or names no such linear"
    return ""
