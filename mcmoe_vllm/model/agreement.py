"""Whether a checkpoint holds exactly the tensors of its model, as far as headers tell.

    skeleton + quantization_config -> what must be there -> what contradicts it

Whoever opens a model asks this first, so that nothing is worked on, shown or served that is not
whole: names, shapes and dtypes of every tensor, not only of experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from mcmoe_kernels.formats import FORMATS
from mcmoe_vllm.checkpoint.files import Checkpoint, TensorInfo
from mcmoe_vllm.checkpoint.format import (
    DENSE_WIDTH,
    EXPERT_SCALES,
    NEWEST_VERSION,
    QuantizationConfig,
)
from mcmoe_vllm.errors import UserError, some
from mcmoe_vllm.model.architectures import find_architecture
from mcmoe_vllm.model.layout import Layout, find_layout
from mcmoe_vllm.model.packed import with_original_names
from mcmoe_vllm.model.skeleton import TOP_K, make_skeleton
from mcmoe_vllm.widths import code_bits, in_words

FLOATS = ("BF16", "F16", "F32")
# Of the quantized tensors: what a name ends with.
PACKED, SCALE, QWEIGHT, SCALES = "weight_packed", "weight_scale", ".qweight", ".scales"
# Tables that older libraries stored and every reader makes itself; draft models, which are copied.
LEFT_UNREAD = (r"rotary_emb\.inv_freq$", r"^mtp\.")


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


def open_layout(
    checkpoint: Checkpoint,
    quantization: QuantizationConfig | None,
    dtype: torch.dtype = torch.float32,
) -> Layout:
    """Where a checkpoint keeps its model, all of it: nothing is opened that is not whole.

    dtype: of the skeleton's parameters. Raises UserError for unsupported architectures, unusable
    configs, and for any tensor that is not as config.json says.
    """
    skeleton = make_skeleton(checkpoint, find_architecture(checkpoint.config), dtype)
    original = checkpoint if quantization is None else with_original_names(checkpoint)
    layout = find_layout(original.tensors, skeleton)
    require_agreement(checkpoint, layout, quantization)
    require_one_head(checkpoint, layout)
    return layout


def promised_tensors(layout: Layout, quantization: QuantizationConfig | None) -> dict[str, Promise]:
    """Name on disk -> what must be there, of a 16-bit checkpoint or an mcmoe one."""
    skeleton = layout.skeleton
    tied = skeleton.head_parameters if skeleton.ties_head else []
    promised: dict[str, Promise] = {}
    for parameter, shape in skeleton.shapes.items():
        if parameter in tied or skeleton.is_experts(parameter):
            continue
        name, (layer, _) = layout.expected_name(parameter), skeleton.split(parameter)
        if layer is None:
            promised[name] = Promise(FLOATS, shape)
        else:
            dtypes = skeleton.integers.get(parameter, FLOATS)
            promised |= _promise_plain(name, shape, dtypes, quantization)
    for layer in skeleton.moe_layers:
        promised |= _promise_experts(layout, layer, quantization)
    return promised


def contradictions(
    tensors: Mapping[str, TensorInfo], layout: Layout, quantization: QuantizationConfig | None
) -> Iterator[str]:
    """Everything that is not as config.json says, a sentence each. tensors: of the headers."""
    wrong = list(_wrong_settings(layout, quantization))
    yield from wrong
    if wrong:
        return  # shapes that follow from settings that contradict each other say nothing
    promised = promised_tensors(layout, quantization)
    for name, promise in promised.items():
        found = tensors.get(name)
        if found is None:
            yield f"{name} is missing" + (f", config says {promise.note}" if promise.note else "")
        elif found.dtype not in promise.dtypes or found.shape != promise.shape:
            yield _describe_difference(name, found, promise)
    yield from _unexpected(tensors, layout, promised)


def require_agreement(
    checkpoint: Checkpoint, layout: Layout, quantization: QuantizationConfig | None
) -> None:
    """Raises UserError listing what contradicts config.json."""
    layers = layout.skeleton.moe_layers
    experts = (layout.is_routed_expert(name) for name in checkpoint.tensors)
    if quantization is None and not any(experts):
        # One sentence, not one for each expert.
        raise UserError(
            f"{checkpoint.path} has no tensors {layout.expert_prefix(layers[0], 0)}.*: its experts "
            "are missing or stored in a layout or under names that are not supported"
        )
    if layout.layers == "layers":
        raise UserError(
            f"{checkpoint.path} has names such as {next(iter(layout.stored.values()))}, without "
            "the prefix that engines ask for: it was saved from the model without its head. Save "
            f"{layout.name} as a whole"
        )
    wrong = list(contradictions(checkpoint.tensors, layout, quantization))
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


def require_one_head(checkpoint: Checkpoint, layout: Layout) -> None:
    """Raises UserError if a head is stored that config.json says is the embedding, and is another:
    engines believe the config."""
    names = [layout.stored.get(parameter) for parameter in layout.ends]
    if not (layout.skeleton.ties_head and all(names)):
        return
    head, embedding = checkpoint.read([name for name in names if name]).values()
    if head.shape != embedding.shape or not bool((head == embedding).all()):
        raise UserError(
            f"{checkpoint.path} holds a {names[0]} other than the embedding, and config.json has "
            "tie_word_embeddings true, by which it would not be used: set that to false"
        )


def _promise_plain(
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[str, ...],
    quantization: QuantizationConfig | None,
) -> dict[str, Promise]:
    """A parameter of a decoder layer that is no routed expert's: as it is, or an int4 linear."""
    prefix, _, kind = name.rpartition(".")
    parent = name.split(".")[-3:-2]
    int4 = (
        quantization is not None
        and quantization.dense_bits == DENSE_WIDTH
        and kind == "weight"
        and len(shape) == 2
        and bool(set(parent) & set(quantization.dense_modules))
    )
    if not int4 or quantization is None:
        return {name: Promise(dtypes, shape)}
    (rows, columns), group = shape, quantization.group_size["dense"]
    matrix = Matrix(rows, columns, DENSE_WIDTH, group)
    return {
        prefix + QWEIGHT: Promise(("I32",), (columns // 8, rows), "int4", matrix),
        prefix + SCALES: Promise(
            ("F16",), (columns // group, rows), f"int4, group size {group}", matrix
        ),
    }


def _promise_experts(
    layout: Layout, layer: int, quantization: QuantizationConfig | None
) -> dict[str, Promise]:
    """The matrices of a layer's routed experts, nothing for a dropped one; and biases of all."""
    skeleton = layout.skeleton
    fused = skeleton.expert_biases(layer)
    if quantization is None and layout.has_fused_experts(layer):
        fused = (*fused, *skeleton.expert_parameters(layer))
    promised = {layout.expected_name(p): Promise(FLOATS, skeleton.shapes[p]) for p in fused}
    if len(fused) > len(skeleton.expert_biases(layer)):
        return promised
    hidden, width, groups = skeleton.hidden_size, skeleton.expert_width, layout.groups
    rows = 2 * width // groups.count("w13")
    shapes = [(rows, hidden) if group == "w13" else (hidden, width) for group in groups]
    for expert in range(skeleton.num_experts):
        names = layout.expert_weights(layer, expert)
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
    prefix, matrix = name.removesuffix("weight"), Matrix(rows, columns, bits, size)
    dtype, per_group = EXPERT_SCALES[quantization.format_version]
    return {
        prefix + PACKED: Promise(
            ("U8",), (rows, columns * code_bits(bits) // 8), in_words(bits), matrix
        ),
        prefix + SCALE: Promise(
            (dtype,), (rows, per_group * columns // size), f"group size {size}", matrix
        ),
    }


def _wrong_settings(layout: Layout, quantization: QuantizationConfig | None) -> Iterator[str]:
    """What config.json says against itself, or against what engines compute."""
    skeleton = layout.skeleton
    (key, activation), allowed = skeleton.activation_setting, skeleton.architecture.activations
    if activation not in allowed:
        yield f"{key} is {activation!r}, vLLM's {layout.name} computes {' or '.join(allowed)}"
    if skeleton.architecture.tied and not skeleton.ties_head:
        yield f"tie_word_embeddings is false, vLLM's {layout.name} has no head but the embedding"
    if not 1 <= skeleton.top_k <= skeleton.num_experts:
        yield (
            f"{skeleton.setting(TOP_K)} is {skeleton.top_k}, the model has "
            f"{skeleton.num_experts} experts"
        )
    computed = skeleton.architecture.gating
    other = next((g for g in skeleton.gatings.values() if computed and g != computed), None)
    if other is not None:
        yield f"its experts combine gate and up with {other}, vLLM's {layout.name} with {computed}"
    if quantization is None:
        return
    if quantization.format_version < layout.format_version == NEWEST_VERSION:
        yield (
            f"format_version is {quantization.format_version}, which has no words for biases of "
            f"experts and for limits; version {NEWEST_VERSION} has"
        )
    if quantization.num_experts != skeleton.num_experts:
        yield (
            f"the model has {skeleton.num_experts} experts, quantization_config has widths of "
            f"{quantization.num_experts} experts"
        )
    layers = skeleton.moe_layers
    for layer in sorted(set(layers) ^ set(quantization.expert_bits)):
        has, lacks = "routed experts", "widths in expert_bits"
        if layer not in layers:
            has, lacks = lacks, has
        yield f"layer {layer} has {has} but no {lacks}"
    for group, what, size in (
        ("w13", "hidden size", skeleton.hidden_size),
        ("w2", "expert width", skeleton.expert_width),
    ):
        if size % quantization.group_size[group]:
            yield (
                f"the {what} is {size}, no multiple of the group size "
                f"{quantization.group_size[group]} of {group}"
            )
    if quantization.dense_bits == DENSE_WIDTH:
        yield from _wrong_modules(layout, quantization)


def _wrong_modules(layout: Layout, quantization: QuantizationConfig) -> Iterator[str]:
    group = quantization.group_size["dense"]
    for module in quantization.dense_modules:
        if module not in layout.dense:
            yield f"dense_modules names {module!r}, {layout.name} has {', '.join(layout.dense)}"
    for layer in range(layout.skeleton.num_layers):
        for name in layout.dense_weights(layer):
            columns = layout.skeleton.shapes[layout.parameter(name)][1]
            if columns % group:
                yield f"{name} has {columns} columns, no multiple of the group size {group}"


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
    tensors: Mapping[str, TensorInfo], layout: Layout, promised: Mapping[str, Promise]
) -> Iterator[str]:
    """Tensors that no part of the model asks for."""
    unread = [re.compile(p) for p in (*LEFT_UNREAD, *layout.skeleton.ignored(), *layout.drafts())]
    tied = {layout.stored.get(p) for p in layout.ends} if layout.skeleton.ties_head else set()
    for name in tensors:
        if name in promised or name in tied or any(p.search(name) for p in unread):
            continue
        yield f"{name} is not expected{_why_unexpected(layout, name, promised)}"


def _why_unexpected(layout: Layout, name: str, promised: Mapping[str, Promise]) -> str:
    prefix, _, kind = name.rpartition(".")
    if layout.is_routed_expert(name):
        return ": its expert has 0 bits, or the model has no such tensor of an expert"
    if kind == "weight" and prefix + QWEIGHT in promised:
        return f": config says int4 ({prefix}{QWEIGHT})"
    if f".{kind}" in (QWEIGHT, SCALES):
        return ": config says 16 bits, or names no such linear"
    return ""
