"""The experts for few tokens: 8-bit MMAs of weight codes with two-digit activations.

Bound by the bytes of the weights, so everything serves their stream: codes go from shared memory
to registers and into the MMA as they are (one shift and one mask for four of them), scales and
zeros are applied to a group's sum, and one launch runs experts of all widths. Four launches:

    prepare   digits of x, and the table of blocks (`digits`, `routing`)
    gate_up   block x rows of w13: the activation, rounded to x.dtype, as digits again
    down      block x rows of w2 x parts of K: partial sums, float32
    combine   parts and experts of a token, weighted, in a fixed order
"""

from dataclasses import dataclass
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
from mcmoe_kernels.gpu.choice import DecodeConfig, WarpConfig
from mcmoe_kernels.gpu.common import (
    COMBINE_WIDE,
    activate_block,
    add_bias,
    by_format,
    combine_kernel,
    digit_buffers,
    dtype_of,
    hidden_block,
    launch_options,
)
from mcmoe_kernels.gpu.digits import absolute_bits, split_rows, to_fixed
from mcmoe_kernels.gpu.routing import (
    few_options,
    load_entry,
    load_pairs,
    max_blocks,
    pdl_options,
    prefetch_lookup,
    route,
    wait_for_previous,
)
from mcmoe_kernels.gpu.tiled import TiledLayer


@triton.jit
def multiply_part(acc, codes, scale, zero, x, x_meta, x_offsets, meta_offsets, valid, step,
                  AT: tl.constexpr, COLUMNS: tl.constexpr, X_BLOCK: tl.constexpr):  # fmt: skip
    """acc [N, M] += scale * (codes [N, K] @ X [K, M] - zero * sum X) * scale of X.

    The K = X_BLOCK columns begin AT columns behind the step's first.
    """
    M: tl.constexpr = acc.shape[1]
    # No mask where the shape needs none: it would cost instructions.
    here = COLUMNS % 256 == 0 or step * 256 + AT < COLUMNS
    at = step * 256 + AT
    digits = tl.load((x + at) + x_offsets, mask=valid[None, :] & here, other=0)
    meta = tl.load((x_meta + at // X_BLOCK * 2) + meta_offsets, mask=valid & here, other=0.0)
    x_scale, x_sum = meta.reshape(M, 2).split()
    high, low = tl.dot(codes, digits, out_dtype=tl.int32).reshape(acc.shape[0], M, 2).split()
    product = (high * 256 + low).to(tl.float32) - zero[:, None] * x_sum[None, :]
    return acc + (product * x_scale[None, :]) * scale[:, None]


@dataclass(frozen=True)
class Cut:
    """What a product is compiled for, but its formats. rows, columns: of the matrix. x_block:
    columns of X that share a scale. block_n, block_m: rows and pairs of a program. splits: programs
    that share the columns of a row."""

    rows: int
    columns: int
    group_size: int
    x_block: int
    block_n: int
    block_m: int
    stages: int
    splits: int
    inline: bool


def cuts(
    config: DecodeConfig,
    rows13: int,
    hidden_size: int,
    intermediate_size: int,
    group_sizes: tuple[int, int],
    h_block: int,
    inline: bool = True,
) -> tuple[Cut, Cut]:
    """What the products of a configuration are compiled for: w13, w2. group_sizes: theirs."""
    n13, n2, m = config.block_n13, config.block_n2, config.block_m
    stages13, stages2, splits = config.stages13, config.stages2, config.splits
    g13, g2 = group_sizes
    return (
        Cut(rows13, hidden_size, g13, g13, n13, m, stages13, 1, inline),
        Cut(hidden_size, intermediate_size, g2, h_block, n2, m, stages2, splits, inline),
    )


@triton.jit
def each_alone(planes):
    """Planes as `codes8` takes them: each of one element."""
    parts = ()
    for i in tl.static_range(len(planes)):
        parts += ((planes[i],),)
    return parts


@triton.jit
def dot_digits(x, x_meta, rows, records, entry, first_row, first_step, last_step,
               CUT: tl.constexpr, FORMAT: tl.constexpr):  # fmt: skip
    """BLOCK_N rows of W times BLOCK_M rows of X over some steps of K -> float32 [N, M].

    rows: int [2 * M], twice each row of X, -1 for none. records, entry, first_row: of W.
    """
    # Pointers that move are scalars and tensors of offsets stand still: that takes the fewest
    # registers, and registers decide how many programs share a multiprocessor.
    COLUMNS: tl.constexpr = CUT.columns
    GROUP_SIZE: tl.constexpr = CUT.group_size
    X_BLOCK: tl.constexpr = CUT.x_block
    BLOCK_N: tl.constexpr = CUT.block_n
    BLOCK_M: tl.constexpr = CUT.block_m
    WIDTH: tl.constexpr = FORMAT.width
    tl.static_assert(X_BLOCK <= GROUP_SIZE)
    STRIDE: tl.constexpr = CUT.rows // 64 * record_bytes_of(WIDTH, GROUP_SIZE)
    record = first_record(records, entry, first_row, GROUP_SIZE, WIDTH)
    valid = rows >= 0
    x_rows = tl.where(valid, rows * 2 + tl.arange(0, 2 * BLOCK_M) % 2, 0)
    x_offsets = x_rows[None, :] * COLUMNS + tl.arange(0, X_BLOCK)[:, None]
    meta_offsets = x_rows // 2 * (2 * (COLUMNS // X_BLOCK)) + x_rows % 2
    offsets = plane_offsets(BLOCK_N, GROUP_SIZE, WIDTH, 1)
    record += first_step.to(tl.int64) * STRIDE
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(first_step, last_step, num_stages=CUT.stages):
        shared = load_planes(record, offsets, shared_at(GROUP_SIZE), WIDTH % 2, 1)
        for tile in tl.static_range(2):
            own = load_planes(record, offsets, tile_at(tile, WIDTH, GROUP_SIZE), WIDTH // 2, 1)
            blocks = FORMAT.codes8(each_alone(shared + own), tile, WIDTH, CUT.inline)
            b0, b1, b2, b3 = blocks[0][0], blocks[1][0], blocks[2][0], blocks[3][0]
            for part in tl.static_range(128 // X_BLOCK):
                if X_BLOCK == 128:
                    codes = concatenate(concatenate(b0, b1), concatenate(b2, b3))
                elif X_BLOCK == 64:
                    codes = concatenate(b0, b1) if part == 0 else concatenate(b2, b3)
                else:
                    codes = b0 if part == 0 else (b1 if part == 1 else (b2 if part == 2 else b3))
                meta = load_meta(
                    record.to(tl.pointer_type(tl.int32)), BLOCK_N, tile * 128 + part * X_BLOCK,
                    GROUP_SIZE, WIDTH,
                )  # fmt: skip
                scale, zero = split_meta(meta, tile, FORMAT.zero_steps, tl.float32)
                acc = multiply_part(
                    acc, codes, scale, zero, x, x_meta, x_offsets, meta_offsets, valid, step,
                    tile * 128 + part * X_BLOCK, COLUMNS, X_BLOCK,
                )  # fmt: skip
        record += STRIDE
    return acc


@triton.jit(do_not_specialize=["ratio", "pairs", "blocks"])
def prepare_kernel(x, digits, x_meta, ids, lookup, topk_weights, ratio, kept_ids, counts,
                   scratch, block_info, block_pair, pairs, blocks,
                   COLUMNS: tl.constexpr, X_BLOCK: tl.constexpr, X_BLOCKS: tl.constexpr,
                   PRUNED_TOP_K: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
                   FEW: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
                   INLINE: tl.constexpr):  # fmt: skip
    """Program 0 prunes and routes; the others take pieces of x."""
    PARTS: tl.constexpr = (COLUMNS // X_BLOCK + X_BLOCKS - 1) // X_BLOCKS
    program = tl.program_id(0) - 1
    if program < 0:
        prefetch_lookup(lookup, EXPERTS, INLINE)
    wait_for_previous(PDL)
    if program < 0:
        route(
            ids, lookup, topk_weights, ratio, kept_ids, counts, scratch, block_info, block_pair,
            pairs, blocks, PRUNED_TOP_K, SLOTS, FEW, BLOCK_M, 256,
        )  # fmt: skip
        return
    split_rows(
        x, digits, x_meta, program // PARTS, program % PARTS * X_BLOCKS, COLUMNS, X_BLOCK, X_BLOCKS
    )


@triton.jit(do_not_specialize=["top_k"])
def gate_up_kernel(digits, x_meta, records, bias, block_info, block_pair, h_digits, h_meta, top_k,
                   CUT: tl.constexpr, FORMATS: tl.constexpr, ACTIVATION: tl.constexpr,
                   DTYPE: tl.constexpr, H_BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    INTERMEDIATE: tl.constexpr = CUT.rows // ACTIVATION.rows
    BLOCK_N: tl.constexpr = CUT.block_n
    BLOCK_M: tl.constexpr = CUT.block_m
    first_row = tl.program_id(0) * BLOCK_N
    block = tl.program_id(1)
    wait_for_previous(PDL)
    entry = load_entry(block_info, block, 1)
    if entry == 0:
        return
    pairs = load_pairs(block_pair, block, BLOCK_M)
    rows = tl.where(pairs >= 0, pairs // top_k, -1)
    nothing = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    STEPS: tl.constexpr = (CUT.columns + 255) // 256
    tensors = (
        digits, x_meta, rows, records, entry, first_row, tl.zeros((), tl.int32), STEPS
    )  # fmt: skip
    acc = by_format(nothing, entry, dot_digits, tensors, CUT, FORMATS)
    pair = tl.max(pairs.reshape(BLOCK_M, 2), 1)
    if bias is not None:
        slot = tl.load(block_info + block * 4)
        acc = add_bias(acc, bias, slot, first_row + tl.arange(0, BLOCK_N), CUT.rows)
    h = activate_block(acc, ACTIVATION).to(DTYPE).to(tl.float32)
    H_BLOCKS: tl.constexpr = BLOCK_N // ACTIVATION.rows // H_BLOCK
    h = h.reshape(H_BLOCKS, H_BLOCK, BLOCK_M)
    fixed, scale = to_fixed(h, tl.max(absolute_bits(h), 1)[:, None, :])
    high = (fixed + 128) >> 8
    h_block = tl.arange(0, H_BLOCKS)
    column = tl.arange(0, H_BLOCK)
    position = column // 32 * 32 + 2 * (column % 16) + column % 32 // 16
    position = first_row // ACTIVATION.rows + h_block[:, None] * H_BLOCK + position[None, :]
    at = h_digits + pair.to(tl.int64)[None, None, :] * (2 * INTERMEDIATE) + position[:, :, None]
    mask = (pair >= 0)[None, None, :] & (position >= 0)[:, :, None]
    tl.store(at, high.to(tl.int8), mask=mask)
    tl.store(at + INTERMEDIATE, (fixed - 256 * high).to(tl.int8), mask=mask)
    h_block += tl.program_id(0) * H_BLOCKS
    at = h_meta + (pair.to(tl.int64)[None, :] * (INTERMEDIATE // H_BLOCK) + h_block[:, None]) * 2
    mask = (pair >= 0)[None, :] & (h_block >= 0)[:, None]
    tl.store(at, tl.sum(scale, 1), mask=mask)
    tl.store(at + 1, tl.sum(fixed, 1).to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["pairs_total"])
def down_kernel(h_digits, h_meta, records, block_info, block_pair, parts, pairs_total,
                CUT: tl.constexpr, FORMATS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    SPLITS: tl.constexpr = CUT.splits
    BLOCK_N: tl.constexpr = CUT.block_n
    BLOCK_M: tl.constexpr = CUT.block_m
    STEPS: tl.constexpr = (CUT.columns + 255) // 256
    PER_SPLIT: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    split = tl.program_id(0) % SPLITS
    first_row = tl.program_id(0) // SPLITS * BLOCK_N
    first_step = split * PER_SPLIT
    block = tl.program_id(1)
    entry = load_entry(block_info, block, 2)
    pairs = load_pairs(block_pair, block, BLOCK_M)
    wait_for_previous(PDL)
    row = first_row + tl.arange(0, BLOCK_N)
    if entry != 0:
        nothing = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        tensors = (
            h_digits, h_meta, pairs, records, entry, first_row,
            first_step, tl.minimum(first_step + PER_SPLIT, STEPS),
        )  # fmt: skip
        acc = by_format(nothing, entry, dot_digits, tensors, CUT, FORMATS)
        pair = tl.max(pairs.reshape(BLOCK_M, 2), 1)
        at = (split * pairs_total + pair).to(tl.int64) * CUT.rows
        tl.store(
            parts + at[None, :] + row[:, None], acc,
            mask=(pair >= 0)[None, :] & (row >= 0)[:, None],
        )  # fmt: skip


def fused_experts_decode(
    x: torch.Tensor,
    layer: TiledLayer,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    config: DecodeConfig,
    prune_ratio: float = 0.0,
    counts: torch.Tensor | None = None,
    inline: bool = True,
    pdl: bool = False,
) -> torch.Tensor:
    """x [T, H] bfloat16 or float16, topk_weights float32 [T, k], topk_ids int [T, k] -> [T, H].

    All contiguous, on one device. prune_ratio: experts whose weight is below so much of their
    token's largest are skipped. counts: int64 [2], see `experts`. inline: use inline PTX. pdl:
    let each launch begin before the previous ends.
    """
    cut13, cut2 = cuts(config, *layer.sizes, hidden_block(layer, config), inline)
    return launch_decode(
        x, layer, topk_weights, topk_ids, config, prune_ratio, counts, inline, pdl,
        (gate_up_kernel, cut13), (down_kernel, cut2),
    )  # fmt: skip


def launch_decode(
    x: torch.Tensor,
    layer: TiledLayer,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    config: DecodeConfig | WarpConfig,
    prune_ratio: float,
    counts: torch.Tensor | None,
    inline: bool,
    pdl: bool,
    gate_up: tuple[Any, Any],
    down: tuple[Any, Any],
) -> torch.Tensor:
    """The four launches. gate_up, down: a kernel and its `Cut`."""
    tokens, hidden = x.shape
    top_k, inter, pairs = topk_ids.shape[1], layer.intermediate_size, topk_ids.numel()
    w13, w2, block_m = layer.w13, layer.w2, config.block_m
    x_block, h_block = w13.group_size, hidden_block(layer, config)
    blocks = max_blocks(pairs, layer.num_slots, block_m)
    slots = triton.next_power_of_2(layer.num_slots)
    x_digits, x_meta = digit_buffers(x, tokens, hidden, x_block)
    h_digits, h_meta = digit_buffers(x, pairs, inter, h_block)
    scratch = x.new_empty(2 * slots + pairs, dtype=torch.int32)
    block_info = x.new_empty((blocks, 4), dtype=torch.int32)
    block_pair = x.new_empty((blocks, block_m), dtype=torch.int32)
    parts = x.new_empty((config.splits, pairs, hidden), dtype=torch.float32)
    out = torch.empty_like(x)
    common = pdl_options(pdl)
    x_blocks = 1024 // x_block
    pruned = prune_ratio > 0 or counts is not None
    kept_ids = torch.empty_like(topk_ids) if pruned else topk_ids
    prepare_kernel[(1 + tokens * triton.cdiv(hidden // x_block, x_blocks),)](
        x, x_digits, x_meta, topk_ids, layer.lookup, topk_weights, prune_ratio, kept_ids, counts,
        scratch, block_info, block_pair, pairs, blocks,
        COLUMNS=hidden, X_BLOCK=x_block, X_BLOCKS=x_blocks, PRUNED_TOP_K=top_k if pruned else 0,
        EXPERTS=len(layer.lookup), SLOTS=slots, BLOCK_M=block_m, INLINE=inline,
        **few_options(pairs), **common,
    )  # fmt: skip
    options13, options2 = launch_options(config)
    kernel, cut = gate_up
    kernel[(w13.rows // config.block_n13, blocks)](
        x_digits, x_meta, w13.records, w13.bias, block_info, block_pair, h_digits, h_meta, top_k,
        CUT=cut, FORMATS=w13.formats, ACTIVATION=layer.activation, DTYPE=dtype_of(x),
        H_BLOCK=h_block, **options13, **common,
    )  # fmt: skip
    kernel, cut = down
    kernel[(hidden // config.block_n2 * config.splits, blocks)](
        h_digits, h_meta, w2.records, block_info, block_pair, parts, pairs,
        CUT=cut, FORMATS=w2.formats, **options2, **common,
    )  # fmt: skip
    width = 256 if tokens < COMBINE_WIDE else 1024
    combine_kernel[(tokens, triton.cdiv(hidden, width))](
        parts, w2.bias, topk_weights, kept_ids, layer.lookup, out, pairs,
        TOP_K=top_k, HIDDEN=hidden, SPLITS=config.splits, BLOCK=width,
        num_warps=max(2, width // 256), **common,
    )  # fmt: skip
    return out
