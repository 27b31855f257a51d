"""What the kernels of several schedules share."""

import torch
import triton
import triton.language as tl

from mcmoe_kernels.gpu.choice import DecodeConfig, WarpConfig
from mcmoe_kernels.gpu.routing import wait_for_previous
from mcmoe_kernels.gpu.tiled import TiledLayer

COMBINE_WIDE = 32  # tokens from which `combine` takes 1024 columns a program


@triton.constexpr_function
def count_of(formats):
    return len(formats.formats)


@triton.constexpr_function
def format_at(formats, i):
    return formats.formats[i]


@triton.constexpr_function
def number_at(formats, i):
    return formats.formats[i].number


@triton.jit
def by_format(acc, entry, dot, tensors, CUT: tl.constexpr, FORMATS: tl.constexpr):
    """dot(*tensors, CUT, FORMAT) for the format that `entry` names, acc for none of FORMATS."""
    for i in tl.static_range(count_of(FORMATS)):
        if entry % 8 == number_at(FORMATS, i):
            acc = dot(*tensors, CUT, format_at(FORMATS, i))
    return acc


@triton.jit
def activate_block(acc, ACTIVATION: tl.constexpr):
    """As `mcmoe_kernels.activations.activate`, of sums [N, M], rows as tiled -> [N / rows, M]."""
    N: tl.constexpr = acc.shape[0]
    M: tl.constexpr = acc.shape[1]
    if ACTIVATION.gated:
        alternating = acc.reshape(N // 16, 2, 8, M).permute(0, 2, 3, 1)
        gate, up = alternating.reshape(N // 2, M, 2).split()
        return of_gate(gate, ACTIVATION) * of_up(up, ACTIVATION)
    else:
        return of_gate(acc, ACTIVATION)


@triton.jit
def activate_pair(first, second, ACTIVATION: tl.constexpr):
    """The same of two sums of one shape: one result of a gate and an up, else two."""
    if ACTIVATION.gated:
        return (of_gate(first, ACTIVATION) * of_up(second, ACTIVATION),)
    else:
        return of_gate(first, ACTIVATION), of_gate(second, ACTIVATION)


@triton.jit
def of_gate(gate, ACTIVATION: tl.constexpr):
    """The activation's first factor, all of it where there is no gate."""
    LIMIT: tl.constexpr = ACTIVATION.limit
    if LIMIT is None:
        return function_of(gate, ACTIVATION)
    elif ACTIVATION.limit_after:
        return at_most(function_of(gate, ACTIVATION), LIMIT)
    else:
        return function_of(at_most(gate, LIMIT), ACTIVATION)


@triton.jit
def of_up(up, ACTIVATION: tl.constexpr):
    """Its second factor."""
    LIMIT: tl.constexpr = ACTIVATION.limit
    if LIMIT is not None:
        up = -at_most(-at_most(up, LIMIT), LIMIT)
    if ACTIVATION.up_offset != 0:
        up += ACTIVATION.up_offset
    return up


@triton.jit
def function_of(x, ACTIVATION: tl.constexpr):
    FUNCTION: tl.constexpr = ACTIVATION.function
    if FUNCTION == "silu":
        if ACTIVATION.alpha == 1:
            return x / (1.0 + tl.exp(-x))
        else:
            return x / (1.0 + tl.exp(x * -ACTIVATION.alpha))
    elif FUNCTION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * inner)))
    else:
        tl.static_assert(FUNCTION == "relu2")
        x = tl.where(x < 0, 0.0, x)
        return x * x


@triton.jit
def at_most(x, LIMIT: tl.constexpr):
    """x, cut off at LIMIT; NaN stays NaN, which a minimum would hide."""
    return tl.where(x > LIMIT, LIMIT, x)


@triton.jit
def add_bias(acc, bias, slot, row, ROWS: tl.constexpr):
    """acc [N, M] + bias [slots, ROWS] of rows `row`, int [N], if there is one."""
    if bias is not None:
        acc += tl.load(bias + slot * ROWS + row).to(tl.float32)[:, None]
    return acc


@triton.jit
def add_weighted_bias(total, bias, routed, column, inside, COLUMNS: tl.constexpr):
    """total + weight * bias [slots, COLUMNS] of columns `column`, if there is one. routed: whether
    a pair is computed, its weight and its slot."""
    if bias is not None:
        computed, weight, slot = routed
        here = inside & (column * 0 + computed.to(tl.int32) > 0)
        value = tl.load(bias + slot * COLUMNS + column, mask=here, other=0.0).to(tl.float32)
        total += tl.where(computed, weight, 0.0) * value
    return total


@triton.constexpr_function
def is_scaled(block_m, group_size):
    """Whether each weight is scaled, rather than each result.

    Few pairs: a scale for each result costs less. Many: registers are short, and results take more
    of them before they are scaled.
    """
    return block_m > 32 or group_size < 128


@triton.constexpr_function
def steps_of(columns, shares):
    """The steps of 256 columns of each of the programs, or warps, that share a row."""
    return -(-columns // (256 * shares))


@triton.constexpr_function
def is_ragged(columns, splits, parts, ahead):
    """Whether a warp may have fewer steps than others, or its last one fewer columns, where `parts`
    warps in each of `splits` programs share a row and take `ahead` steps at a time."""
    per_split = steps_of(columns, splits)
    per_part = steps_of(256 * per_split, parts)
    whole = per_part % ahead == 0 and per_split == parts * per_part
    return not whole or columns % (256 * per_split) != 0


@triton.jit
def load_if(at, inside, MASKED: tl.constexpr):
    """Zeros where not inside. No mask where the shape needs none: it would cost instructions."""
    return tl.load(at, mask=inside, other=0) if MASKED else tl.load(at)


@triton.jit(do_not_specialize=["pairs_total"])
def combine_kernel(parts, bias, topk_weights, ids, lookup, out, pairs_total,
                   TOP_K: tl.constexpr, HIDDEN: tl.constexpr, SPLITS: tl.constexpr,
                   BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[t] = sum over j of topk_weights[t, j] * sum over splits of parts[split, t * k + j], plus
    the experts' biases."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    routed = ()
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        expert = tl.load(ids + pair)
        slot = tl.load(lookup + tl.maximum(expert, 0) * 4)
        weight = tl.load(topk_weights + pair).to(tl.float32)
        routed += ((tl.where(expert >= 0, slot, -1), weight),)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        slot, weight = routed[j]
        total = add_weighted_bias(total, bias, (slot >= 0, weight, slot), column, inside, HIDDEN)
    wait_for_previous(PDL)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        slot, weight = routed[j]
        computed = slot + tl.zeros_like(column) >= 0
        at = pair.to(tl.int64) * HIDDEN + column
        value = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLITS):
            value += tl.load(
                parts + at + split * pairs_total.to(tl.int64) * HIDDEN,
                mask=inside & computed, other=0.0,
            )  # fmt: skip
        total += tl.where(computed, weight, 0.0) * value
    tl.store(
        out + token.to(tl.int64) * HIDDEN + column, total.to(out.dtype.element_ty), mask=inside
    )


def hidden_block(layer: TiledLayer, config: DecodeConfig | WarpConfig) -> int:
    """How many columns of h, what w2 multiplies, share a scale: no more than a program makes."""
    return min(layer.w2.group_size, config.block_n13 // layer.activation.rows)


def launch_options(config: DecodeConfig | WarpConfig) -> tuple[dict[str, int], dict[str, int]]:
    """The options of both products' launches: warps, and limits of registers."""
    options13, options2 = {"num_warps": config.warps13}, {"num_warps": config.warps2}
    if config.registers13:
        options13["maxnreg"] = config.registers13
    if config.registers2:
        options2["maxnreg"] = config.registers2
    return options13, options2


def digit_buffers(
    like: torch.Tensor, rows: int, columns: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the digits of rows and for their meta (`digits`), on the device of `like`. Buffers
    of their own: pieces of one would differ in alignment, which is compiled in."""
    digits = like.new_empty((rows, 2, columns), dtype=torch.int8)
    return digits, like.new_empty((rows, columns // block, 2), dtype=torch.float32)


def dtype_of(x: torch.Tensor) -> tl.dtype:
    return getattr(tl, str(x.dtype).removeprefix("torch."))
