"""Which kernel and which cut for a layer and a number of tokens: measured tables, nearest match.

`configs/<device>.json` holds what `benchmarks/kernels/tune.py` measured on that device:

    {"device": ..., "triton": ..., "shapes": [{"num_experts": E, "top_k": k, "hidden_size": H,
     "intermediate_size": I, "tokens": {"1": {"kernel": "decode", ...}, "8": ...}}]}

A device without a file takes that of another of its compute capability, else `default.json`,
whose programs fit the shared memory of every GPU from compute capability 8.0 on. A shape that is
not listed takes the nearest listed one: the fewest factors of two between the sizes.
"""

import functools
import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton

from mcmoe_kernels.formats.records import TILE_ROWS

logger = logging.getLogger("mcmoe_kernels")

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = "default"
# Files whose measurements serve every device of a compute capability.
BY_CAPABILITY = {(9, 0): "NVIDIA_H100_80GB_HBM3"}
BLOCKS_N = (256, 128, 64)
WARPGROUP_COLUMNS = 64  # `warpgroup` has no masks within as many columns


@dataclass(frozen=True)
class DecodeConfig:
    """`block`. block_m: pairs of a block. block_n13, block_n2: rows of a program.
    splits: programs that share the columns of a row of w2. registers13, registers2: as
    `PrefillConfig.registers`."""

    block_m: int = 4
    block_n13: int = 128
    block_n2: int = 128
    warps13: int = 2
    warps2: int = 2
    stages13: int = 4
    stages2: int = 4
    splits: int = 1
    registers13: int = 0
    registers2: int = 0


@dataclass(frozen=True)
class WarpConfig:
    """`warp`. parts13, parts2: warps of a program that share the columns of a row; a warp
    has 16, 32 or 64 rows. stages13, stages2: steps of 256 columns that are loaded ahead. block_m:
    4. Others as in `DecodeConfig`."""

    block_m: int = 4
    block_n13: int = 128
    block_n2: int = 128
    warps13: int = 4
    warps2: int = 4
    stages13: int = 2
    stages2: int = 2
    splits: int = 1
    registers13: int = 0
    registers2: int = 0
    parts13: int = 1
    parts2: int = 1

    @property
    def tiles13(self) -> int:
        """Times 16: the rows of a warp."""
        return -(-self.block_n13 * self.parts13 // (16 * self.warps13))

    @property
    def tiles2(self) -> int:
        return -(-self.block_n2 * self.parts2 // (16 * self.warps2))


@dataclass(frozen=True)
class SingleConfig(WarpConfig):
    """`single`, one token. block_n13, block_n2: multiples of 16, not powers of two alone;
    warps for whom no rows are left rest."""


@dataclass(frozen=True)
class PrefillConfig:
    """`prefill`. block_m: pairs of a block. block_n13, block_n2: rows of a program.
    group_n: row blocks that follow each other for every block of pairs, so that both stay in the
    L2 cache. registers: the most a thread may take, 0 for no limit; fewer let more programs share
    a multiprocessor. few_m: a block of so many pairs or fewer is multiplied as one of that size, 0
    for none."""

    block_m: int = 64
    block_n13: int = 128
    block_n2: int = 128
    warps: int = 4
    stages: int = 2
    group_n: int = 16
    registers: int = 0
    few_m: int = 0


@dataclass(frozen=True)
class WarpgroupConfig:
    """`warpgroup`, compute capability 9.0. part13, part2: columns of a product, 32 or
    64. stages: even, at least 4. Others as in `PrefillConfig`."""

    block_m: int = 128
    block_n13: int = 256
    block_n2: int = 256
    warps: int = 8
    stages: int = 4
    part13: int = 64
    part2: int = 64
    group_n: int = 16
    registers: int = 0


Config = DecodeConfig | WarpConfig | SingleConfig | PrefillConfig | WarpgroupConfig
KERNELS: dict[str, type[Config]] = {
    "decode": DecodeConfig,
    "warp": WarpConfig,
    "single": SingleConfig,
    "prefill": PrefillConfig,
    "warpgroup": WarpgroupConfig,
}


SIZES = ("num_experts", "top_k", "hidden_size", "intermediate_size")


@dataclass(frozen=True)
class LayerShape:
    """rows: of w13 for each column of w2 (`Activation.rows`). group_size: the smaller one of w13's
    and w2's."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    rows: int = 2
    group_size: int = 128

    def distance(self, other: "LayerShape") -> float:
        """Factors of two between two shapes, summed over the sizes."""
        return sum(abs(math.log2(getattr(self, name) / getattr(other, name))) for name in SIZES)


Table = dict[LayerShape, dict[int, Config]]


@functools.lru_cache
def read_table(name: str) -> Table:
    """The table of a device. Raises ValueError naming the file and what is wrong in it."""
    path = CONFIGS / f"{name}.json"
    try:
        found = json.loads(path.read_text())
        table = {
            LayerShape(
                *(s[name] for name in SIZES), group_size=s.get("group_size", LayerShape.group_size)
            ): {int(tokens): parse_config(entry) for tokens, entry in s["tokens"].items()}
            for s in found["shapes"]
        }
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is no table of kernel configurations: {e!r}") from e
    measured_with = found.get("triton", compiler())
    if measured_with == compiler():
        return table
    logger.info(
        "kernel configurations in %s were measured with Triton %s: with %s, those for few tokens "
        "run without their limits on registers", path, measured_with, compiler(),
    )  # fmt: skip
    return {
        shape: {tokens: without_limits(config) for tokens, config in configs.items()}
        for shape, configs in table.items()
    }


def compiler() -> str:
    """Triton's version but for its last number."""
    return ".".join(triton.__version__.split(".")[:2])


def without_limits(config: Config) -> Config:
    """Limits for few tokens are as low as nothing spills; below them, another compiler's code
    spilled up to 1756 bytes a thread. Those of `PrefillConfig` say how many programs are to share a
    multiprocessor, and stay."""
    if isinstance(config, DecodeConfig | WarpConfig):
        return replace(config, registers13=0, registers2=0)
    return config


def parse_config(entry: dict[str, Any]) -> Config:
    return KERNELS[entry["kernel"]](**{k: v for k, v in entry.items() if k != "kernel"})


def dump_config(config: Config) -> dict[str, Any]:
    name = next(name for name, kind in KERNELS.items() if type(config) is kind)
    return {"kernel": name, **config.__dict__}


@functools.lru_cache  # asked for every layer of every step, and answered from the disk
def table_name(device: torch.device) -> str:
    """The file for a device: its own, that of its compute capability, or the default."""
    if device.type != "cuda":
        return DEFAULT
    name = torch.cuda.get_device_name(device).replace(" ", "_").replace("/", "_")
    if (CONFIGS / f"{name}.json").exists():
        return name
    return BY_CAPABILITY.get(torch.cuda.get_device_capability(device), DEFAULT)


@functools.lru_cache
def configs_for(name: str, shape: LayerShape) -> dict[int, Config]:
    """Tokens -> configuration, of the nearest shape in a table; logged once if it is another."""
    table = read_table(name)
    nearest = min(table, key=shape.distance)
    if nearest != shape:
        logger.info(
            "no kernel configurations for %s in %s, using those of %s", shape, name, nearest
        )
    configs = table[nearest]
    if shape.group_size < nearest.group_size:
        configs = {tokens: for_smaller_groups(config) for tokens, config in configs.items()}
    return {tokens: fit(config, shape) for tokens, config in configs.items()}


def for_smaller_groups(config: Config) -> Config:
    """More scales take more registers than were measured. Nothing spills with half the steps ahead
    and other limits: ptxas, given none, spills rather than give `prefill` more than 128."""
    if isinstance(config, PrefillConfig):
        return replace(config, registers=255)
    if isinstance(config, WarpConfig) and not isinstance(config, SingleConfig):
        stages13, stages2 = (max(1, s // 2) for s in (config.stages13, config.stages2))
        config = replace(config, stages13=stages13, stages2=stages2)
    return without_limits(config)


def choose_config(
    device: torch.device, shape: LayerShape, tokens: int, codes8: bool = True
) -> Config:
    """The configuration for a batch: that of the nearest listed number of tokens, by factor.

    codes8: whether all formats of the layer have it (`is_usable`)."""
    configs = configs_for(table_name(device), shape)
    fitting = (
        n
        for n, c in configs.items()
        if is_usable(c, codes8) and (tokens <= 1 or not isinstance(c, SingleConfig))
    )
    return configs[min(fitting, key=lambda listed: abs(math.log2(listed / max(1, tokens))))]


def is_usable(config: Config, codes8: bool) -> bool:
    """Whether a configuration's kernel finds what it multiplies: 16-bit weights every format has,
    8-bit codes (`codes8`) not."""
    return codes8 or isinstance(config, PrefillConfig | WarpgroupConfig)


def fit(config: Config, shape: LayerShape) -> Config:
    """Cut the row blocks down to sizes that divide the rows; the plain kernel where K asks it."""
    rows13, rows2 = shape.rows * shape.intermediate_size, shape.hidden_size
    if isinstance(config, SingleConfig):
        block_n13 = largest_share(rows13, config.block_n13, config.warps13 // config.parts13)
        block_n2 = largest_share(rows2, config.block_n2, config.warps2 // config.parts2)
        return replace(config, block_n13=block_n13, block_n2=block_n2)
    block_n13 = largest_block(rows13, config.block_n13)
    block_n2 = largest_block(rows2, config.block_n2)
    if isinstance(config, WarpgroupConfig):
        if shape.intermediate_size % WARPGROUP_COLUMNS:
            block_m = min(config.block_m, PrefillConfig.block_m)
            return fit(PrefillConfig(block_m=block_m, group_n=config.group_n), shape)
        config = replace(config, warps=min(config.warps, min(block_n13, block_n2) // 16))
    if isinstance(config, WarpConfig):  # a warp has 16 rows or more
        warps13 = min(config.warps13, block_n13 // 16 * config.parts13)
        warps2 = min(config.warps2, block_n2 // 16 * config.parts2)
        config = replace(config, warps13=warps13, warps2=warps2)
    return replace(config, block_n13=block_n13, block_n2=block_n2)


def largest_block(rows: int, at_most: int) -> int:
    """The largest block of rows up to `at_most` that divides `rows`, a multiple of 64."""
    fitting = [b for b in BLOCKS_N if b <= at_most and rows % b == 0]
    assert fitting, f"{rows} rows are no multiple of {TILE_ROWS}"
    return fitting[0]


def largest_share(rows: int, at_most: int, warps: int) -> int:
    """The largest number of rows up to `at_most` that divides `rows`, a multiple of 64, and gives
    each of the first warps 16, 32 or 64 of them, and the others none."""

    def fits(share: int) -> bool:
        of_warp = -(-share // (16 * warps)) * 16
        return rows % share == 0 and share % of_warp == 0 and of_warp in (16, 32, 64)

    return max(share for share in range(16, at_most + 1, 16) if fits(share))
