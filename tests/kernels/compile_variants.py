"""Compile kernels for GPUs that are not here and print what ptxas says of them, as JSON lines.

`python compile_variants.py DEVICE CAPABILITY[,CAPABILITY] [KIND | MODEL ...] [--all]`: of a table
(`choice`) one configuration of each KIND, else of each kind and the quantizer's kernels or, with
--all, every one; of a MODEL whose experts compute something else, what it takes of the table. A
process of its own: kernels that the interpreter has taken over cannot be compiled.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Code is compared by its text, which is not to name lines of files.
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from mcmoe_kernels.activations import Activation
from mcmoe_kernels.formats.format import find
from mcmoe_kernels.gpu import block, prefill, routing, single, warp, warpgroup
from mcmoe_kernels.gpu.choice import (
    KERNELS,
    LayerShape,
    PrefillConfig,
    SingleConfig,
    WarpConfig,
    WarpgroupConfig,
    configs_for,
    read_table,
)
from mcmoe_kernels.gpu.common import combine_kernel, launch_options
from mcmoe_kernels.gpu.tiled import kernel_formats
from mcmoe_kernels.quantize import columns_triton

FORMATS = kernel_formats((find(1), find(2), find(3)))
TYPES = {
    "digits": "*i8", "h_digits": "*i8", "records": "*i8", "x_meta": "*fp32", "h_meta": "*fp32",
    "block_info": "*i32", "block_pair": "*i32", "parts": "*fp32", "pairs_total": "i32",
    "x": "*bf16", "h": "*bf16", "y": "*bf16", "bias": "*bf16", "blocks": "i32", "ids": "*i32",
    "lookup": "*i32", "scratch": "*i32", "pairs": "i32", "out": "*bf16",
    "topk_weights": "*fp32", "top_k": "i32", "ratio": "fp32", "kept_ids": "*i32",
    "counts": "*i64", "ended": "*i32",
    **dict.fromkeys(("w", "importance", "shrinks", "max_codes", "zero_steps", "scale", "zero",
                     "scales", "zeros", "codes", "errors", "inverse", "moved", "slope", "deq",
                     "moves", "hessian"), "*fp32"),
    **dict.fromkeys(("rows", "columns", "start", "count", "at_error", "error_columns",
                     "batch_stride", "column_stride", "shrink_count"), "i32"),
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """What kernels are compiled for, but a configuration. group_sizes: of w13 and w2."""

    shape: LayerShape
    activation: Activation = Activation("silu")
    biases: bool = False
    group_sizes: tuple[int, int] = (128, 128)

    @property
    def sizes(self):
        """As `TiledLayer.sizes`."""
        shape = self.shape
        rows13 = shape.rows * shape.intermediate_size
        return rows13, shape.hidden_size, shape.intermediate_size, self.group_sizes


MODELS = {
    "gpt-oss-20b": Layer(
        LayerShape(32, 4, 2880, 2880, group_size=64),
        Activation("silu", limit=7.0, alpha=1.702, up_offset=1.0),
        biases=True,
        group_sizes=(64, 64),
    ),
    "step-3.5": Layer(
        LayerShape(288, 8, 4096, 1280), Activation("silu", limit=7.0, limit_after=True)
    ),
    "nemotron-3-nano": Layer(
        LayerShape(128, 6, 2688, 1856, rows=1, group_size=64),
        Activation("relu2", gated=False),
        group_sizes=(128, 64),
    ),
}


def variants(layer: Layer, config, capability: int):
    """(name, kernel, constants, options) of each launch of a configuration."""
    shape, sizes, pdl = layer.shape, layer.sizes, capability >= 90
    hidden = shape.hidden_size
    bias = {} if layer.biases else {"bias": None}
    common = {"FORMATS": FORMATS, "PDL": pdl}
    first = {**common, **bias, "ACTIVATION": layer.activation}
    if isinstance(config, PrefillConfig | WarpgroupConfig):
        options = {"num_warps": config.warps}
        if config.registers:
            options["maxnreg"] = config.registers
        if isinstance(config, PrefillConfig):
            gate_up, down = prefill.gate_up_prefill_kernel, prefill.down_prefill_kernel
            cut13, cut2 = prefill.cuts(config, *sizes, wide=False)
            own = {"FEW_M": config.few_m or config.block_m}
        else:
            gate_up, down = warpgroup.gate_up_warpgroup_kernel, warpgroup.down_warpgroup_kernel
            cut13, cut2 = warpgroup.cuts(config, *sizes, wide=False)
            own = {}
        yield name_of(gate_up), gate_up, {**first, **own, "CUT": cut13}, options
        yield name_of(down), down, {**common, **own, "CUT": cut2}, options
        return
    options13, options2 = launch_options(config)
    if isinstance(config, SingleConfig):
        cut13, cut2 = single.cuts(config, *sizes, tl.bfloat16, pdl)
        token = {"TOP_K": shape.top_k, "PRUNED_TOP_K": shape.top_k}
        first |= {"ENDED": hidden // config.block_n2, "EXPERTS": shape.num_experts, "counts": None}
        gate_up, down = single.GPU_KERNELS
        yield name_of(gate_up), gate_up, {**first, **token, "CUT": cut13}, options13
        yield name_of(down), down, {**common, **bias, **token, "CUT": cut2}, options2
        return
    h_block = min(layer.group_sizes[1], config.block_n13 // shape.rows)
    if isinstance(config, WarpConfig):
        gate_up, down = warp.GPU_KERNELS
        cut13, cut2 = warp.cuts(config, *sizes, h_block, pdl)
    else:
        gate_up, down = block.gate_up_kernel, block.down_kernel
        cut13, cut2 = block.cuts(config, *sizes, h_block)
    first |= {"DTYPE": tl.bfloat16, "H_BLOCK": h_block, "CUT": cut13}
    yield name_of(gate_up), gate_up, first, options13
    yield name_of(down), down, {**common, "CUT": cut2}, options2
    x_block = layer.group_sizes[0]
    for pairs in (1, routing.FEW_PAIRS + 1):
        few = routing.few_options(pairs)
        yield "prepare", block.prepare_kernel, {
            "COLUMNS": hidden, "X_BLOCK": x_block, "X_BLOCKS": 1024 // x_block,
            "PRUNED_TOP_K": shape.top_k, "BLOCK_M": config.block_m,
            "SLOTS": triton.next_power_of_2(shape.num_experts),
            "EXPERTS": shape.num_experts, "FEW": few.pop("FEW"), "INLINE": True, "PDL": pdl,
        }, few  # fmt: skip
    yield "combine", combine_kernel, {
        **bias, "TOP_K": shape.top_k, "HIDDEN": hidden, "SPLITS": config.splits, "BLOCK": 256,
        "PDL": pdl,
    }, {"num_warps": 2}  # fmt: skip


def name_of(kernel) -> str:
    return kernel.__name__.removesuffix("_kernel")


def quantizer_variants():
    """The same of the quantizer's kernels, which depend on no table."""
    fit = {
        "GROUP_SIZE": 128, "POWER": 2.0, "WEIGHTED": True, "SYMMETRIC": False,
        "WEIGHTED_BINARY": True,
    }  # fmt: skip
    paper = fit | {"POWER": 2.4, "WEIGHTED": False, "WEIGHTED_BINARY": False}
    by_column = {"COUNT": columns_triton.COLUMNS}, {"num_warps": 1, "num_stages": 1}
    for name, more, options in (
        ("fit_group", fit, {"num_warps": 4}),
        ("fit_group", paper, {"num_warps": 4}),
        ("compensate", *by_column),
        ("descend", *by_column),
    ):
        kernel = getattr(columns_triton, f"{name}_kernel")
        yield name, kernel, {"BLOCK_N": columns_triton.ROWS, **more}, options


def build(name, kernel, constants, options, capability):
    """Compile one kernel; what ptxas -v says of registers and spills, and its shared memory."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else TYPES[n] for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
    }
    values = {(names.index(n),): v for n, v in constants.items() if n in names}
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    source = language(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    suffix = "a" if capability == 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        ptxas = [get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}{suffix}"]
        command = [*ptxas, ptx, "-o", ptx.with_suffix("")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    return {
        "kernel": name,
        "capability": capability,
        "config": {
            k: str(v) if isinstance(v, Activation) else v
            for k, v in flat(constants).items()
            if isinstance(v, int | str | Activation)
        },
        "registers": int(re.findall(r"Used (\d+) registers", report)[0]),
        "spilled_bytes": sum(spills),
        "shared_bytes": compiled.metadata.shared,
        "ptx": hashlib.sha256(compiled.asm["ptx"].encode()).hexdigest()[:16],
    }


def flat(constants):
    """Constants, those of the cut among them."""
    cut = constants.get("CUT")
    return constants | (vars(cut) if cut else {})


def build_all(capability, layer=None, config=None):
    found = variants(layer, config, capability) if config else quantizer_variants()
    return [build(*v, capability) for v in found]


def jobs_of(device: str, named: list[str], everything: bool):
    """What `build_all` is given behind a capability."""
    table = read_table(device)
    if everything:
        layers = [(Layer(shape), configs) for shape, configs in table.items()]
        return [(layer, c) for layer, configs in layers for c in dict.fromkeys(configs.values())]
    models = [MODELS[name] for name in named if name in MODELS]
    if models:
        found = [(m, configs_for(device, m.shape).values()) for m in models]
        return [(model, config) for model, configs in found for config in dict.fromkeys(configs)]
    shape, configs = next(iter(table.items()))
    kinds = [KERNELS[name] for name in named] or dict.fromkeys(type(c) for c in configs.values())
    jobs = [(Layer(shape), next(c for c in configs.values() if type(c) is k)) for k in kinds]
    return jobs if named else [*jobs, ()]


def main() -> None:
    device, capabilities = sys.argv[1], [int(c) for c in sys.argv[2].split(",")]
    named = [a for a in sys.argv[3:] if a != "--all"]
    jobs = jobs_of(device, named, "--all" in sys.argv)
    with ProcessPoolExecutor(2) as pool:
        futures = [pool.submit(build_all, cap, *job) for cap in capabilities for job in jobs]
        for future in futures:
            for row in future.result():
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
