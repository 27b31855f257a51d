"""Layer after layer, quantized and written."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from mcmoe_vllm.checkpoint.format import DENSE_WIDTH
from mcmoe_vllm.checkpoint.writing import shard_name, write_shard
from mcmoe_vllm.compress.experts import quantize_experts, routed_output, store_experts
from mcmoe_vllm.compress.linears import dense_groups, quantize_dense, quantize_router
from mcmoe_vllm.compress.workdirectory import WorkDirectory
from mcmoe_vllm.model.memory import peak_rss_bytes
from mcmoe_vllm.model.states import add_rows, run_blocks, run_exact, to_main_memory
from mcmoe_vllm.plan import Plan
from mcmoe_vllm.report.tables import describe_layer

if TYPE_CHECKING:
    from mcmoe_vllm.compress.job import Job


def quantize_layers(job: Job, work: WorkDirectory, chosen: Plan) -> list[dict[str, Any]]:
    """Quantize and write layer after layer, each calibrated on what the quantized layers before
    it put out."""
    model, traits = job.model, job.options.traits
    shards = model.num_layers + 1
    outside = [n for n in job.checkpoint.tensors if not n.startswith("model.layers.")]
    first = work.checkpoint / shard_name(1, shards)
    if not first.exists():
        write_shard(first, job.checkpoint.read_weights(outside))
    blocks = [b.cpu() for b in model.embed(job.windows)]
    exact_targets = traits.exact_targets and traits.sequential
    follows_exact = not traits.sequential or exact_targets or traits.tuning_passes > 0
    start, kept = work.load_hidden("quantize") or (0, blocks)
    # Behind the blocks, where they differ: what the 16-bit model gives the layer.
    blocks, exact = kept[: len(blocks)], kept[len(blocks) :] or kept
    job.progress.start("quantizing", model.num_layers, start)
    for index in range(start, model.num_layers):
        began = time.perf_counter()
        layer = model.load_layer(index)
        tensors = job.checkpoint.read_weights(model.parameter_names(index))
        lost: dict[str, Any] = {}
        groups = dense_groups(job, layer) if chosen.dense_bits == DENSE_WIDTH else []
        observed = [group[0] for group in groups] if exact_targets else None
        given = run_exact(job, layer, index, exact, observed) if follows_exact else None
        exact, wanted = given.outputs if given else [], given if exact_targets else None
        if chosen.dense_bits == DENSE_WIDTH:
            lost["dense"] = quantize_dense(job, layer, index, blocks, tensors, groups, wanted)
        if traits.router_bits != 16 and index in job.moe_layers:
            lost["router"] = quantize_router(job, layer, index, blocks, tensors)
        routed = wanted.routed if wanted else None
        del given, wanted  # what the linears are given is as large as the states themselves
        outputs, routing = run_blocks(model, layer, index, blocks)
        if routing is not None:
            bits = chosen.pairs()[job.moe_layers.index(index)]
            lost["experts"], experts = quantize_experts(job, index, routing, bits, routed)
            store_experts(job, index, experts, bits, tensors)
            outputs = add_rows(outputs, routed_output(job, routing, experts))
        blocks = to_main_memory(outputs) if traits.sequential else exact
        del outputs, routing, routed
        model.release_layer(index)
        write_shard(work.checkpoint / shard_name(index + 2, shards), tensors)
        del tensors
        summary = {"layer": index, "seconds": round(time.perf_counter() - began, 3), **lost}
        summary["peak_rss_bytes"] = peak_rss_bytes()
        work.save_layer("layers", index, summary)
        both = [*blocks, *exact] if traits.sequential else blocks
        work.save_hidden("quantize", index + 1, both)
        job.progress.layer_done(index, describe_layer(summary))
    return [work.load_layer("layers", i) for i in range(model.num_layers)]
