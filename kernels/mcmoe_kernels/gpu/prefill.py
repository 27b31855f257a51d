"""The experts for many tokens: 16-bit MMAs of weights that are dequantized in registers.

Bound by the matrix units, so the work on weights is kept small beside the products: a program
dequantizes a tile once for `block_m` pairs. Weights are operands in registers (the left side of
the product), activations stream through shared memory. Behind the routing, three launches:

    gate_up   block x rows of w13 -> the activation, x.dtype [pairs, I]
    down      block x rows of w2 -> x.dtype [pairs, H]
    combine   experts of a token, weighted, in a fixed order
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from mcmoe_kernels.formats.device.records import (
    first_record,
    load_meta,
    load_planes,
    plane_offsets,
    record_bytes_of,
    shared_at,
    tile_at,
)
from mcmoe_kernels.formats.device.words import concatenate, split_meta
from mcmoe_kernels.gpu.choice import PrefillConfig, WarpgroupConfig
from mcmoe_kernels.gpu.common import (
    activate_block,
    add_bias,
    by_format,
    combine_kernel,
    is_scaled,
)
from mcmoe_kernels.gpu.routing import pdl_options, route_pairs, wait_for_previous
from mcmoe_kernels.gpu.tiled import TiledLayer


@dataclass(frozen=True)
class Cut:
    """What a product is compiled for, but its formats. rows, columns: of the matrix. block_n,
    block_m: rows and pairs of a program. wide: offsets within x need 64 bits, and their
    registers."""

    rows: int
    columns: int
    group_size: int
    block_n: int
    block_m: int
    stages: int
    group_n: int
    wide: bool
    inline: bool

    def of(self, block_m: int) -> "Cut":
        """The same for other blocks."""
        return replace(self, block_m=block_m)


def cuts(
    config: PrefillConfig,
    rows13: int,
    hidden_size: int,
    intermediate_size: int,
    group_sizes: tuple[int, int],
    wide: bool,
    inline: bool = True,
) -> tuple[Cut, Cut]:
    """What the products of a configuration are compiled for: w13, w2. group_sizes: theirs."""
    rest = config.block_m, config.stages, config.group_n, wide, inline
    return (
        Cut(rows13, hidden_size, group_sizes[0], config.block_n13, *rest),
        Cut(hidden_size, intermediate_size, group_sizes[1], config.block_n2, *rest),
    )


@triton.constexpr_function
def with_block_m(cut, block_m):
    return cut.of(block_m)


@triton.jit
def multiply_tile(acc, record, offsets, x, x_offsets, valid, shared, columns_left,
                  TILE: tl.constexpr, CUT: tl.constexpr, FORMAT: tl.constexpr):  # fmt: skip
    """acc [N, M] += the weights of one tile of a step times x [128, M].

    Scaled weights are multiplied in halves, blocks HALF and HALF + 2 (x_offsets: of the columns of
    HALF 0), since those of a tile, all at once, would take as many registers as the results.
    """
    GROUP_SIZE: tl.constexpr = CUT.group_size
    WIDTH: tl.constexpr = FORMAT.width
    DTYPE: tl.constexpr = x.dtype.element_ty
    words = record.to(tl.pointer_type(tl.int16))
    planes = shared + load_planes(
        words, offsets, tile_at(TILE, WIDTH, GROUP_SIZE), WIDTH // 2, 2
    )  # fmt: skip
    metas = ()
    for block in tl.static_range(4):
        metas += (
            load_meta(
                record.to(tl.pointer_type(tl.int32)), acc.shape[0], TILE * 128 + block * 32,
                GROUP_SIZE, WIDTH,
            ),
        )  # fmt: skip
    if is_scaled(acc.shape[1], GROUP_SIZE):
        for half in tl.static_range(2):
            parts = ()
            for block in tl.static_range(half, 4, 2):
                parts += (
                    FORMAT.weights16(
                        planes, metas[block], TILE, block, WIDTH, True, DTYPE, CUT.inline
                    ),
                )  # fmt: skip
            inside = valid
            if CUT.columns % 128 != 0:
                columns = TILE * 128 + half * 32 + half_columns()
                inside = valid & (columns < columns_left)[:, None]
            tokens = tl.load((x + TILE * 128 + half * 32) + x_offsets, mask=inside, other=0.0)
            acc = tl.dot(concatenate(parts[0], parts[1]), tokens, acc)
        return acc
    else:
        parts = ()
        for block in tl.static_range(4):
            parts += (
                FORMAT.weights16(
                    planes, metas[block], TILE, block, WIDTH, False, DTYPE, CUT.inline
                ),
            )  # fmt: skip
        weights = concatenate(concatenate(parts[0], parts[1]), concatenate(parts[2], parts[3]))
        if CUT.columns % 128 != 0:
            valid = valid & (TILE * 128 + tl.arange(0, 128) < columns_left)[:, None]
        tokens = tl.load((x + TILE * 128) + x_offsets, mask=valid, other=0.0)
        scale, zero = split_meta(metas[0], TILE, FORMAT.zero_steps, tl.float32)
        return acc + tl.dot(weights, tokens) * scale[:, None]


@triton.jit
def half_columns():
    """The columns of a tile, int32 [64], of its blocks 0 and 2."""
    columns = tl.arange(0, 64)
    return columns + columns // 32 * 32


@triton.jit
def dot_weights(x, rows, records, entry, first_row, CUT: tl.constexpr, FORMAT: tl.constexpr):
    """BLOCK_N rows of W times the rows of x [*, COLUMNS] -> float32 [N, M]; row -1 gives zeros.
    records, entry, first_row: of W."""
    COLUMNS: tl.constexpr = CUT.columns
    GROUP_SIZE: tl.constexpr = CUT.group_size
    BLOCK_N: tl.constexpr = CUT.block_n
    BLOCK_M: tl.constexpr = CUT.block_m
    WIDTH: tl.constexpr = FORMAT.width
    STRIDE: tl.constexpr = CUT.rows // 64 * record_bytes_of(WIDTH, GROUP_SIZE)
    # Half a step at the end is done apart: its missing tile would be multiplied in vain.
    HALF: tl.constexpr = COLUMNS % 256 > 0 and COLUMNS % 256 <= 128
    STEPS: tl.constexpr = COLUMNS // 256 if HALF else (COLUMNS + 255) // 256
    record = first_record(records, entry, first_row, GROUP_SIZE, WIDTH)
    offsets = plane_offsets(BLOCK_N, GROUP_SIZE, WIDTH, 2)
    x_rows = tl.where(rows >= 0, rows, 0)
    if CUT.wide:
        x_rows = x_rows.to(tl.int64)
    columns = half_columns() if is_scaled(BLOCK_M, GROUP_SIZE) else tl.arange(0, 128)
    x_offsets = x_rows[None, :] * COLUMNS + columns[:, None]
    valid = (rows >= 0)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(0, STEPS, num_stages=CUT.stages):
        words = record.to(tl.pointer_type(tl.int16))
        shared = load_planes(words, offsets, shared_at(GROUP_SIZE), WIDTH % 2, 2)
        for tile in tl.static_range(2):
            acc = multiply_tile(
                acc, record, offsets, x, x_offsets, valid, shared, COLUMNS - step * 256, tile, CUT,
                FORMAT,
            )  # fmt: skip
        record += STRIDE
        x += 256
    if HALF:
        words = record.to(tl.pointer_type(tl.int16))
        shared = load_planes(words, offsets, shared_at(GROUP_SIZE), WIDTH % 2, 2)
        acc = multiply_tile(
            acc, record, offsets, x, x_offsets, valid, shared, COLUMNS - STEPS * 256, 0, CUT, FORMAT
        )  # fmt: skip
    return acc


@triton.jit
def store_rows(y, value, pairs, first_row, ROWS: tl.constexpr):
    """y[pair, first_row + n] = value[n, m] for the pairs that are there."""
    row = first_row + tl.arange(0, value.shape[0])
    at = pairs.to(tl.int64)[:, None] * ROWS + row[None, :]
    tl.store(y + at, value.trans(1, 0), mask=(pairs >= 0)[:, None] & (row >= 0)[None, :])


@triton.jit
def store_halves(y, value, pairs, first_row, ROWS: tl.constexpr):
    """`store_rows` in halves, whose addresses take fewer registers."""
    N: tl.constexpr = value.shape[0]
    first, second = value.reshape(2, N // 2, value.shape[1]).permute(1, 2, 0).split()
    store_rows(y, first, pairs, first_row, ROWS)
    store_rows(y, second, pairs, first_row + N // 2, ROWS)


@triton.jit
def gate_up_block(x, records, bias, block_pair, slot, entry, n_block, h, top_k,
                  CUT: tl.constexpr, FORMATS: tl.constexpr,
                  ACTIVATION: tl.constexpr):  # fmt: skip
    """BLOCK_N rows of w13 for the first BLOCK_M pairs of a block. block_pair: its first."""
    BLOCK_N: tl.constexpr = CUT.block_n
    BLOCK_M: tl.constexpr = CUT.block_m
    pairs = tl.load(block_pair + tl.arange(0, BLOCK_M))
    rows = tl.where(pairs >= 0, pairs // top_k, -1)
    nothing = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    tensors = (x, rows, records, entry, n_block * BLOCK_N)
    acc = by_format(nothing, entry, dot_weights, tensors, CUT, FORMATS)
    acc = add_bias(acc, bias, slot, n_block * BLOCK_N + tl.arange(0, BLOCK_N), CUT.rows)
    value = activate_block(acc, ACTIVATION).to(h.dtype.element_ty)
    if ACTIVATION.gated:
        store_rows(h, value, pairs, n_block * (BLOCK_N // 2), CUT.rows // 2)
    else:
        store_halves(h, value, pairs, n_block * BLOCK_N, CUT.rows)


@triton.jit
def down_block(h, records, block_pair, entry, n_block, y, CUT: tl.constexpr,
               FORMATS: tl.constexpr):  # fmt: skip
    """BLOCK_N rows of w2 for the first BLOCK_M pairs of a block. block_pair: its first."""
    BLOCK_N: tl.constexpr = CUT.block_n
    BLOCK_M: tl.constexpr = CUT.block_m
    HIDDEN: tl.constexpr = CUT.rows
    pairs = tl.load(block_pair + tl.arange(0, BLOCK_M))
    nothing = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    tensors = (h, pairs, records, entry, n_block * BLOCK_N)
    acc = by_format(nothing, entry, dot_weights, tensors, CUT, FORMATS)
    store_halves(y, acc.to(y.dtype.element_ty), pairs, n_block * BLOCK_N, HIDDEN)


@triton.jit(do_not_specialize=["top_k"])
def gate_up_prefill_kernel(x, records, bias, block_info, block_pair, h, top_k,
                           CUT: tl.constexpr, FORMATS: tl.constexpr, ACTIVATION: tl.constexpr,
                           FEW_M: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    block, n_block = tl.program_id(1), tl.program_id(2) * CUT.group_n + tl.program_id(0)
    if n_block >= CUT.rows // CUT.block_n:
        return
    wait_for_previous(PDL)
    slot = tl.load(block_info + block * 4)
    entry = tl.load(block_info + block * 4 + 1)
    if slot < 0:
        return
    block_pair += block * CUT.block_m
    few = False
    if CUT.block_m > FEW_M:
        few = tl.load(block_pair + FEW_M) < 0
    if few:
        gate_up_block(
            x, records, bias, block_pair, slot, entry, n_block, h, top_k,
            with_block_m(CUT, FEW_M), FORMATS, ACTIVATION,
        )  # fmt: skip
    else:
        gate_up_block(
            x, records, bias, block_pair, slot, entry, n_block, h, top_k, CUT, FORMATS, ACTIVATION
        )  # fmt: skip


@triton.jit
def down_prefill_kernel(h, records, block_info, block_pair, y, CUT: tl.constexpr,
                        FORMATS: tl.constexpr, FEW_M: tl.constexpr,
                        PDL: tl.constexpr):  # fmt: skip
    block, n_block = tl.program_id(1), tl.program_id(2) * CUT.group_n + tl.program_id(0)
    if n_block >= CUT.rows // CUT.block_n:
        return
    slot = tl.load(block_info + block * 4)
    entry = tl.load(block_info + block * 4 + 2)
    wait_for_previous(PDL)
    if slot < 0:
        return
    block_pair += block * CUT.block_m
    few = False
    if CUT.block_m > FEW_M:
        few = tl.load(block_pair + FEW_M) < 0
    if few:
        down_block(h, records, block_pair, entry, n_block, y, with_block_m(CUT, FEW_M), FORMATS)
    else:
        down_block(h, records, block_pair, entry, n_block, y, CUT, FORMATS)


def prefill_grid(n_blocks: int, blocks: int, group_n: int) -> tuple[int, int, int]:
    """Programs in the order in which they start: group_n row blocks for every block of pairs in
    turn, then the next ones, so that weights and x are both met again in the L2 cache."""
    return (min(group_n, n_blocks), blocks, triton.cdiv(n_blocks, group_n))


def fused_experts_prefill(
    x: torch.Tensor,
    layer: TiledLayer,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    config: PrefillConfig,
    inline: bool = True,
    pdl: bool = False,
) -> torch.Tensor:
    """x [T, H] bfloat16 or float16, topk_weights float32 [T, k], topk_ids int [T, k] -> [T, H].

    All contiguous, on one device. inline, pdl: as in `fused_experts_decode`.
    """
    cut13, cut2 = cuts(config, *sizes_of(x, layer, topk_ids), inline)
    few = {"FEW_M": config.few_m or config.block_m}
    kernels = (gate_up_prefill_kernel, cut13, few), (down_prefill_kernel, cut2, few)
    return launch_prefill(x, layer, topk_weights, topk_ids, config, pdl, *kernels)


def sizes_of(
    x: torch.Tensor, layer: TiledLayer, topk_ids: torch.Tensor
) -> tuple[int, int, int, tuple[int, int], bool]:
    """What `cuts` is given of a layer and a batch."""
    wide = max(x.numel(), topk_ids.numel() * layer.intermediate_size) >= 1 << 31
    return *layer.sizes, wide


def launch_prefill(
    x: torch.Tensor,
    layer: TiledLayer,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    config: PrefillConfig | WarpgroupConfig,
    pdl: bool,
    gate_up: tuple[Any, Any, dict[str, int]],
    down: tuple[Any, Any, dict[str, int]],
) -> torch.Tensor:
    """Routing, two products and the sum. gate_up, down: a kernel, its `Cut` and constants of its
    own."""
    tokens, hidden = x.shape
    top_k, inter, pairs = topk_ids.shape[1], layer.intermediate_size, topk_ids.numel()
    w13, w2 = layer.w13, layer.w2
    block_info, block_pair = route_pairs(topk_ids, layer, config.block_m, pdl)
    blocks = block_info.shape[0]
    h, y, out = x.new_empty(pairs, inter), x.new_empty(pairs, hidden), torch.empty_like(x)
    common = {**pdl_options(pdl), "num_warps": config.warps}
    if config.registers:
        common["maxnreg"] = config.registers
    kernel, cut, own = gate_up
    kernel[prefill_grid(w13.rows // config.block_n13, blocks, config.group_n)](
        x, w13.records, w13.bias, block_info, block_pair, h, top_k,
        CUT=cut, FORMATS=w13.formats, ACTIVATION=layer.activation, **own, **common,
    )  # fmt: skip
    kernel, cut, own = down
    kernel[prefill_grid(hidden // config.block_n2, blocks, config.group_n)](
        h, w2.records, block_info, block_pair, y, CUT=cut, FORMATS=w2.formats, **own, **common
    )
    combine_kernel[(tokens, triton.cdiv(hidden, 2048))](
        y, w2.bias, topk_weights, topk_ids, layer.lookup, out, pairs,
        TOP_K=top_k, HIDDEN=hidden, SPLITS=1, BLOCK=2048, num_warps=4, **pdl_options(pdl),
    )  # fmt: skip
    return out
