"""The model card of a compressed checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcmoe_vllm.checkpoint.sizes import Sizes
from mcmoe_vllm.plan import Plan


def write_model_card(
    folder: Path, result: Mapping[str, Any], plan: Plan, sizes: Sizes, has_licence: bool
) -> None:
    """README.md of the checkpoint, with the metadata that the Hub reads."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=plan.model if "/" in plan.model and not plan.model.startswith("/") else None,
        base_model_relation="quantized",
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=["mcmoe", "vllm", "moe", "quantized"],
        license="other" if has_licence else None,
        license_link="LICENSE" if has_licence else None,
    )
    counts = Counter(b for row in plan.pairs() for w13, w2 in row for b in (w13, w13, w2))
    widths = "\n".join(f"| {b} | {counts[b]} |" for b in sorted(counts))
    calibration = result["calibration"]
    name = Path(plan.model).name
    starved = result["starved_experts"]
    starved_line = (
        "Experts that calibration hardly reached (fewer than 256 tokens): "
        + "; ".join(f"layer {layer}: {experts}" for layer, experts in starved.items())
        if starved
        else "Calibration reached every expert."
    )
    content = f"""---
{data.to_yaml()}
---

# {name}, {plan.average_bits():.2f} bits per expert weight

Compressed with [mcmoe-vllm](https://arxiv.org/abs/2410.06270) {result["mcmoe_version"]}: every
expert has a width of its own, chosen by an integer program over its measured importance.

```
pip install "mcmoe-vllm[vllm]"
vllm serve {name}-mcmoe
```

| | original | this checkpoint |
|---|---|---|
| bytes | {result["bytes"]["original"]:,} | {result["bytes"]["compressed"]:,} |
| bits per expert weight, scales and zeros counted | 16 | {sizes.expert_bits:.3f} |
| bits per weight of the whole model | 16 | {sizes.model_bits:.3f} |

| bits | expert matrices |
|---|---|
{widths}

![bits by layer and expert](allocation.png)

Attention (and shared experts): {plan.dense_bits} bits. Router gates, norms, embeddings and the
head: 16 bits. Calibration: {calibration["samples"]} windows of {calibration["sequence_length"]}
tokens of {Path(calibration["source"]).name}, seed {calibration["seed"]}. {starved_line}
plan.json and report.json hold every decision and error.
"""
    ModelCard(content).save(folder / "README.md")
