"""The experts for many tokens: 16-bit MMAs of weights that are dequantized in registers.

Bound by the matrix units, so the work on weights is kept small beside the products: a program
dequantizes a tile once for `block_m` pairs. Weights are operands in registers (the left side of
the product), activations stream through shared memory. Behind the routing, three launches:

    gate_up   block x rows of w13 -> act(gate) * up, x.dtype [pairs, I]
    down      block x rows of w2 -> x.dtype [pairs, H]
    combine   experts of a token, weighted, in a fixed order
"""

from typing import Any

import torch
import triton
import triton.language as tl

from mcmoe_kernels.formats.records import (
    first_record,
    load_meta,
    load_shared,
    load_tile,
    plane_offsets,
    record_bytes_of,
)
from mcmoe_kernels.formats.scalar16 import half_weights, tile_weights
from mcmoe_kernels.formats.words import split_meta
from mcmoe_kernels.gpu.choice import PrefillConfig, WarpgroupConfig
from mcmoe_kernels.gpu.common import activate, combine_kernel, is_scaled
from mcmoe_kernels.gpu.routing import pdl_options, route_pairs, wait_for_previous
from mcmoe_kernels.gpu.tiled import TiledLayer


@triton.jit
def multiply_tile(acc, record, offsets, x, x_offsets, valid, shared, columns_left,
                  TILE: tl.constexpr, COLUMNS: tl.constexpr, GROUP_SIZE: tl.constexpr,
                  BITS: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    """acc [N, M] += the weights of one tile of a step times x [128, M].

    Scaled weights are multiplied in halves (x_offsets: of the columns of `half_weights`, HALF 0),
    since those of a tile, all at once, would take as many registers as the results.
    """
    w0, w1 = load_tile(record.to(tl.pointer_type(tl.int16)), offsets, TILE, GROUP_SIZE, BITS, 2)
    w0 = shared if BITS == 1 else w0
    metas = ()
    for block in tl.static_range(4):
        metas += (
            load_meta(
                record.to(tl.pointer_type(tl.int32)), acc.shape[0], TILE * 128 + block * 32,
                GROUP_SIZE, BITS,
            ),
        )  # fmt: skip
    DTYPE: tl.constexpr = x.dtype.element_ty
    if is_scaled(acc.shape[1], GROUP_SIZE):
        for half in tl.static_range(2):
            weights = half_weights(w0, w1, shared, metas, TILE, half, BITS, DTYPE, INLINE)
            inside = valid
            if COLUMNS % 128 != 0:
                columns = TILE * 128 + half * 32 + half_columns()
                inside = valid & (columns < columns_left)[:, None]
            tokens = tl.load((x + TILE * 128 + half * 32) + x_offsets, mask=inside, other=0.0)
            acc = tl.dot(weights, tokens, acc)
        return acc
    else:
        weights = tile_weights(w0, w1, shared, metas, TILE, BITS, DTYPE, INLINE)
        if COLUMNS % 128 != 0:
            valid = valid & (TILE * 128 + tl.arange(0, 128) < columns_left)[:, None]
        tokens = tl.load((x + TILE * 128) + x_offsets, mask=valid, other=0.0)
        scale, zero = split_meta(metas[0], TILE, BITS, tl.float32)
        return acc + tl.dot(weights, tokens) * scale[:, None]


@triton.jit
def half_columns():
    """The columns of a tile, int32 [64], that HALF 0 of `half_weights` belongs to."""
    columns = tl.arange(0, 64)
    return columns + columns // 32 * 32


@triton.jit
def dot_weights(x, rows, record, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr, GROUP_SIZE: tl.constexpr, BITS: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
                WIDE: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    """BLOCK_N rows of W times the rows of x [*, COLUMNS] -> float32 [N, M]; row -1 gives zeros.

    WIDE: offsets within x need 64 bits, and their registers.
    """
    STRIDE: tl.constexpr = ROWS // 64 * record_bytes_of(BITS, GROUP_SIZE)
    # Half a step at the end is done apart: its missing tile would be multiplied in vain.
    HALF: tl.constexpr = COLUMNS % 256 > 0 and COLUMNS % 256 <= 128
    STEPS: tl.constexpr = COLUMNS // 256 if HALF else (COLUMNS + 255) // 256
    offsets = plane_offsets(BLOCK_N, GROUP_SIZE, BITS, 2)
    x_rows = tl.where(rows >= 0, rows, 0)
    if WIDE:
        x_rows = x_rows.to(tl.int64)
    columns = half_columns() if is_scaled(BLOCK_M, GROUP_SIZE) else tl.arange(0, 128)
    x_offsets = x_rows[None, :] * COLUMNS + columns[:, None]
    valid = (rows >= 0)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        words = record.to(tl.pointer_type(tl.int16))
        shared = load_shared(words, offsets, GROUP_SIZE, BITS, 2)
        for tile in tl.static_range(2):
            acc = multiply_tile(
                acc, record, offsets, x, x_offsets, valid, shared, COLUMNS - step * 256, tile,
                COLUMNS, GROUP_SIZE, BITS, INLINE,
            )  # fmt: skip
        record += STRIDE
        x += 256
    if HALF:
        words = record.to(tl.pointer_type(tl.int16))
        shared = load_shared(words, offsets, GROUP_SIZE, BITS, 2)
        acc = multiply_tile(
            acc, record, offsets, x, x_offsets, valid, shared, COLUMNS - STEPS * 256, 0, COLUMNS,
            GROUP_SIZE, BITS, INLINE,
        )  # fmt: skip
    return acc


@triton.jit
def weights_any_width(x, rows, records, entry, first_row,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP_SIZE: tl.constexpr,
                      WIDTHS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                      STAGES: tl.constexpr, WIDE: tl.constexpr,
                      INLINE: tl.constexpr):  # fmt: skip
    """`dot_weights` by the width of the slot; only the widths in WIDTHS are compiled."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for bits in tl.static_range(1, 5):
        if (WIDTHS >> bits) % 2 == 1:  # noqa: SIM102 (this is known when compiling)
            if entry % 8 == bits:
                start = first_record(records, entry, first_row, GROUP_SIZE, bits)
                acc = dot_weights(
                    x, rows, start, ROWS, COLUMNS, GROUP_SIZE, bits, BLOCK_N, BLOCK_M, STAGES,
                    WIDE, INLINE,
                )  # fmt: skip
    return acc


@triton.jit
def store_rows(y, value, pairs, first_row, ROWS: tl.constexpr):
    """y[pair, first_row + n] = value[n, m] for the pairs that are there."""
    row = first_row + tl.arange(0, value.shape[0])
    at = pairs.to(tl.int64)[:, None] * ROWS + row[None, :]
    tl.store(y + at, value.trans(1, 0), mask=(pairs >= 0)[:, None] & (row >= 0)[None, :])


@triton.jit
def gate_up_block(x, records, block_pair, entry, n_block, h, top_k,
                  HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, GROUP_SIZE: tl.constexpr,
                  WIDTHS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_M: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
                  INLINE: tl.constexpr):  # fmt: skip
    """BLOCK_N rows of w13 for the first BLOCK_M pairs of a block. block_pair: its first."""
    pairs = tl.load(block_pair + tl.arange(0, BLOCK_M))
    rows = tl.where(pairs >= 0, pairs // top_k, -1)
    acc = weights_any_width(
        x, rows, records, entry, n_block * BLOCK_N,
        2 * INTERMEDIATE, HIDDEN, GROUP_SIZE, WIDTHS, BLOCK_N, BLOCK_M, STAGES, WIDE, INLINE,
    )  # fmt: skip
    alternating = acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1)
    gate, up = alternating.reshape(BLOCK_N // 2, BLOCK_M, 2).split()
    value = (activate(gate, ACTIVATION) * up).to(h.dtype.element_ty)
    store_rows(h, value, pairs, n_block * (BLOCK_N // 2), INTERMEDIATE)


@triton.jit
def down_block(h, records, block_pair, entry, n_block, y,
               HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, GROUP_SIZE: tl.constexpr,
               WIDTHS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
               STAGES: tl.constexpr, WIDE: tl.constexpr, INLINE: tl.constexpr):  # fmt: skip
    """BLOCK_N rows of w2 for the first BLOCK_M pairs of a block. block_pair: its first."""
    pairs = tl.load(block_pair + tl.arange(0, BLOCK_M))
    acc = weights_any_width(
        h, pairs, records, entry, n_block * BLOCK_N,
        HIDDEN, INTERMEDIATE, GROUP_SIZE, WIDTHS, BLOCK_N, BLOCK_M, STAGES, WIDE, INLINE,
    )  # fmt: skip
    # In halves, whose addresses take fewer registers.
    halves = acc.to(y.dtype.element_ty).reshape(2, BLOCK_N // 2, BLOCK_M).permute(1, 2, 0)
    first, second = halves.split()
    store_rows(y, first, pairs, n_block * BLOCK_N, HIDDEN)
    store_rows(y, second, pairs, n_block * BLOCK_N + BLOCK_N // 2, HIDDEN)


@triton.jit(do_not_specialize=["top_k"])
def gate_up_prefill_kernel(x, records, block_info, block_pair, h, top_k,
                           HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
                           GROUP_SIZE: tl.constexpr, WIDTHS: tl.constexpr,
                           ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
                           BLOCK_M: tl.constexpr, FEW_M: tl.constexpr, GROUP_N: tl.constexpr,
                           STAGES: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
                           INLINE: tl.constexpr):  # fmt: skip
    block, n_block = tl.program_id(1), tl.program_id(2) * GROUP_N + tl.program_id(0)
    if n_block >= 2 * INTERMEDIATE // BLOCK_N:
        return
    wait_for_previous(PDL)
    slot = tl.load(block_info + block * 4)
    entry = tl.load(block_info + block * 4 + 1)
    if slot < 0:
        return
    block_pair += block * BLOCK_M
    few = False
    if FEW_M < BLOCK_M:
        few = tl.load(block_pair + FEW_M) < 0
    if few:
        gate_up_block(
            x, records, block_pair, entry, n_block, h, top_k, HIDDEN, INTERMEDIATE,
            GROUP_SIZE, WIDTHS, ACTIVATION, BLOCK_N, FEW_M, STAGES, WIDE, INLINE,
        )  # fmt: skip
    else:
        gate_up_block(
            x, records, block_pair, entry, n_block, h, top_k, HIDDEN, INTERMEDIATE,
            GROUP_SIZE, WIDTHS, ACTIVATION, BLOCK_N, BLOCK_M, STAGES, WIDE, INLINE,
        )  # fmt: skip


@triton.jit
def down_prefill_kernel(h, records, block_info, block_pair, y,
                        HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
                        GROUP_SIZE: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_M: tl.constexpr, FEW_M: tl.constexpr, GROUP_N: tl.constexpr,
                        STAGES: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
                        INLINE: tl.constexpr):  # fmt: skip
    block, n_block = tl.program_id(1), tl.program_id(2) * GROUP_N + tl.program_id(0)
    if n_block >= HIDDEN // BLOCK_N:
        return
    slot = tl.load(block_info + block * 4)
    entry = tl.load(block_info + block * 4 + 2)
    wait_for_previous(PDL)
    if slot < 0:
        return
    block_pair += block * BLOCK_M
    few = False
    if FEW_M < BLOCK_M:
        few = tl.load(block_pair + FEW_M) < 0
    if few:
        down_block(
            h, records, block_pair, entry, n_block, y, HIDDEN, INTERMEDIATE, GROUP_SIZE,
            WIDTHS, BLOCK_N, FEW_M, STAGES, WIDE, INLINE,
        )  # fmt: skip
    else:
        down_block(
            h, records, block_pair, entry, n_block, y, HIDDEN, INTERMEDIATE, GROUP_SIZE,
            WIDTHS, BLOCK_N, BLOCK_M, STAGES, WIDE, INLINE,
        )  # fmt: skip


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
    own = {"FEW_M": config.few_m or config.block_m, "INLINE": inline}
    kernels = (gate_up_prefill_kernel, own), (down_prefill_kernel, own)
    return launch_prefill(x, layer, topk_weights, topk_ids, config, pdl, *kernels)


def launch_prefill(
    x: torch.Tensor,
    layer: TiledLayer,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    config: PrefillConfig | WarpgroupConfig,
    pdl: bool,
    gate_up: tuple[Any, dict[str, Any]],
    down: tuple[Any, dict[str, Any]],
) -> torch.Tensor:
    """Routing, two products and the sum. gate_up, down: a kernel and constants of its own."""
    tokens, hidden = x.shape
    top_k, inter, pairs = topk_ids.shape[1], layer.intermediate_size, topk_ids.numel()
    w13, w2 = layer.w13, layer.w2
    block_info, block_pair = route_pairs(topk_ids, layer, config.block_m, pdl)
    blocks = block_info.shape[0]
    h, y, out = x.new_empty(pairs, inter), x.new_empty(pairs, hidden), torch.empty_like(x)
    common = {
        **pdl_options(pdl),
        "HIDDEN": hidden,
        "INTERMEDIATE": inter,
        "BLOCK_M": config.block_m,
        "GROUP_N": config.group_n,
        "STAGES": config.stages,
        "WIDE": max(tokens * hidden, pairs * inter) >= 1 << 31,
        "num_warps": config.warps,
    }
    if config.registers:
        common["maxnreg"] = config.registers
    kernel, own = gate_up
    kernel[prefill_grid(2 * inter // config.block_n13, blocks, config.group_n)](
        x, w13.records, block_info, block_pair, h, top_k,
        GROUP_SIZE=w13.group_size, WIDTHS=w13.widths, ACTIVATION=layer.activation,
        BLOCK_N=config.block_n13, **own, **common,
    )  # fmt: skip
    kernel, own = down
    kernel[prefill_grid(hidden // config.block_n2, blocks, config.group_n)](
        h, w2.records, block_info, block_pair, y,
        GROUP_SIZE=w2.group_size, WIDTHS=w2.widths, BLOCK_N=config.block_n2, **own, **common,
    )  # fmt: skip
    combine_kernel[(tokens, triton.cdiv(hidden, 2048))](
        y, topk_weights, topk_ids, layer.lookup, out, pairs,
        TOP_K=top_k, HIDDEN=hidden, SPLITS=1, BLOCK=2048, num_warps=4, **pdl_options(pdl),
    )  # fmt: skip
    return out
