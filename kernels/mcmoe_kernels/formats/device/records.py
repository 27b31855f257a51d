"""Where things lie in a record, for kernels (`formats.records`)."""

import triton
import triton.language as tl


@triton.constexpr_function
def shared_at(group_size):
    """`records.meta_bytes`: where the plane of both tiles begins."""
    return 128 // group_size * 256


@triton.constexpr_function
def tile_at(tile, bits, group_size):
    """Where a tile's own planes begin."""
    return shared_at(group_size) + 2048 * (bits % 2) + tile * 2048 * (bits // 2)


@triton.constexpr_function
def record_bytes_of(bits, group_size):
    """`records.frame_bytes`."""
    return tile_at(2, bits, group_size)


@triton.jit
def first_record(records, entry, first_row, GROUP_SIZE: tl.constexpr, BITS: tl.constexpr):
    """Pointer to the record of row first_row, a multiple of 64, in the slot's first step."""
    return (
        records
        + (entry // 8).to(tl.int64) * 256
        + first_row // 64 * record_bytes_of(BITS, GROUP_SIZE)
    )


@triton.jit
def plane_offsets(BLOCK_N: tl.constexpr, GROUP_SIZE: tl.constexpr, BITS: tl.constexpr,
                  UNIT: tl.constexpr):  # fmt: skip
    """Where the bytes of BLOCK_N rows lie from the first record on: int32 [N, 32 / UNIT]."""
    n = tl.arange(0, BLOCK_N)
    rows = n // 64 * (record_bytes_of(BITS, GROUP_SIZE) // UNIT) + n % 64 * (32 // UNIT)
    return rows[:, None] + tl.arange(0, 32 // UNIT)[None, :]


@triton.jit
def load_planes(record, offsets, START: tl.constexpr, COUNT: tl.constexpr, UNIT: tl.constexpr):
    """COUNT planes, START bytes behind the record. UNIT: bytes of an element."""
    planes = ()
    for plane in tl.static_range(COUNT):
        planes += (tl.load((record + (START + 2048 * plane) // UNIT) + offsets),)
    return planes


@triton.jit
def load_meta(record, BLOCK_N: tl.constexpr, AT: tl.constexpr, GROUP_SIZE: tl.constexpr,
              BITS: tl.constexpr):  # fmt: skip
    """Meta int32 [N] of the group that holds the step's column AT. record: int32 pointer."""
    n = tl.arange(0, BLOCK_N)
    offsets = n // 64 * (record_bytes_of(BITS, GROUP_SIZE) // 4) + n % 64
    return tl.load(record + AT % 128 // GROUP_SIZE * 64 + offsets)  # the same for both tiles
