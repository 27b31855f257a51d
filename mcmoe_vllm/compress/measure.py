"""The significance of every layer, on the unquantized model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from mcmoe_vllm.compress.significance import LayerSignificance, measure_layer
from mcmoe_vllm.compress.workdirectory import WorkDirectory
from mcmoe_vllm.model.architectures import ROUTER
from mcmoe_vllm.model.divergence import mean_divergences
from mcmoe_vllm.model.loaded import LoadedModel
from mcmoe_vllm.model.states import add_rows, run_blocks, run_exact, to_main_memory
from mcmoe_vllm.model.streaming import Routing
from mcmoe_vllm.quantize.hessians import ROWS
from mcmoe_vllm.report.tables import describe_measurement

if TYPE_CHECKING:
    from mcmoe_vllm.compress.job import Job


PROBE_TOKENS = 16384  # that tell what widths change and what a change costs the model


def measure_layers(
    job: Job, work: WorkDirectory, candidates: Sequence[int], *, resumable: bool = True
) -> list[LayerSignificance]:
    """The significance of every layer, on the unquantized model."""
    options, model = job.options, job.model
    traits = options.traits
    blocks = [b.cpu() for b in model.embed(job.windows)]
    probing = traits.allocation == "sensitivity" and len(candidates) > 0
    probe = min(range(len(candidates)), key=lambda c: abs(candidates[c] - 2)) if probing else None
    per_block = blocks[0].shape[0] * blocks[0].shape[1]
    probe_blocks = min(len(blocks), -(-PROBE_TOKENS // per_block)) if probing else 0
    probe_tokens = sum(b.shape[0] * b.shape[1] for b in blocks[:probe_blocks])
    start, kept = work.load_hidden("measure") or (0, blocks)
    # Behind the blocks: for every layer so far the first of them as they are after a change of
    # its experts' output.
    blocks, probes = kept[: len(blocks)], kept[len(blocks) :]
    job.progress.start("measuring", model.num_layers, start)
    for index in range(start, model.num_layers):
        layer = model.load_layer(index)
        probes = run_exact(job, layer, index, probes).outputs if probes else []
        outputs, routing = run_blocks(model, layer, index, blocks)
        if routing is not None:
            scores = _softmax_scores(layer, routing) if traits.routing_score == "softmax" else None
            measured, experts_output, change = measure_layer(
                index,
                routing,
                lambda expert, i=index: job.read_expert(i, expert),  # type: ignore[misc]
                job.num_experts,
                candidates,
                options.group_size,
                model.activation(),
                traits,
                scores=scores,
                window=job.windows.shape[1],
                probe=probe,
                probe_tokens=probe_tokens if probing else None,
            )
            outputs = add_rows(outputs, experts_output)
            if probing:
                probes += to_main_memory(add_rows(outputs[:probe_blocks], change))
            saved = {**asdict(measured), "probe_change": float(change.double().square().sum())}
            work.save_layer("significance", index, saved)
            job.progress.layer_done(index, describe_measurement(measured))
        else:
            job.progress.layer_done(index, "dense layer, nothing to measure")
        blocks = to_main_memory(outputs)
        del outputs, routing
        model.release_layer(index)
        if resumable:
            work.save_hidden("measure", index + 1, [*blocks, *probes])
    found = [work.load_layer("significance", i) for i in job.moe_layers]
    changes = [layer.pop("probe_change") for layer in found]
    if probing:
        loaded = LoadedModel(model, job.architecture, None, job.num_experts)
        others = [probes[i : i + probe_blocks] for i in range(0, len(probes), probe_blocks)]
        divergences = mean_divergences(loaded, blocks[:probe_blocks], others)
        for layer_, kl, change_ in zip(found, divergences, changes, strict=True):
            layer_["sensitivity"] = kl / max(change_, 1e-30)
    return [LayerSignificance(**layer) for layer in found]


def _softmax_scores(layer: torch.nn.Module, routing: Routing) -> torch.Tensor:
    """The routed experts' shares of the softmax over all experts, float32 [T, k]."""
    router: Any = layer.get_submodule(ROUTER)
    weight = router.weight.float()
    parts = [
        hidden.to(weight)
        .matmul(weight.t())
        .softmax(-1)
        .gather(1, ids.to(weight.device))
        .to(ids.device)
        for hidden, ids in zip(
            routing.hidden.split(ROWS),
            routing.ids.split(ROWS),
            strict=True,
        )
    ]
    return torch.cat(parts)
