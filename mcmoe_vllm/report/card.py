"""The model card of a compressed checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcmoe_vllm.checkpoint.sizes import Sizes
from mcmoe_vllm.plan import Plan
from mcmoe_vllm.widths import count_matrices, describe_group_sizes, in_words

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

PAPER = (
    "The idea of a width for every expert is that of "
    "[MC-MoE](https://arxiv.org/abs/2410.06270) (Huang et al., ICLR 2025)."
)

# It would make up random experts, with no more than a warning.
ONLY_VLLM = (
    "The `from_pretrained` of transformers cannot load this folder: its experts are read by vLLM "
    "with mcmoe-vllm, and by `mcmoe eval`, alone."
)

# How widths were chosen, by the trait "allocation" of a recipe.
METHODS = {
    "sensitivity": "gate and up of every expert share a width, down has one of its own. A knapsack "
    "over the measured KL divergence to the 16-bit model chose them",
    "pmq": "every expert has a width of its own. An integer program chose it by how often and how "
    "heavily the expert is used, and by what each width changes in the output",
}
GIVEN = "every expert has the width that the plan gave it"


def write_model_card(
    folder: Path,
    name: str,
    result: Mapping[str, Any],
    plan: Plan,
    sizes: Sizes,
    licence: str | None,
) -> None:
    """README.md in `folder`, with the metadata that the Hub reads.

    name: of the folder that people will serve; result: what report.json holds; licence: the name
    of the licence file that was copied into the folder.
    """
    from huggingface_hub import ModelCard

    pairs = [pair for row in plan.pairs() for pair in row]
    rows = "\n".join(f"| {in_words(w)} | {n:,} |" for w, n in count_matrices(pairs).items())
    content = f"""---
{_metadata(plan.model, licence)}
---

# {Path(plan.model).name}, {plan.average_bits():.2f} bits per expert weight

Compressed with mcmoe-vllm {result["mcmoe_version"]}, recipe {describe_recipe(result, plan)}.

With mcmoe-vllm installed beside vLLM, in the folder that holds `{name}` (or give its path):

```
vllm serve {name} --quantization mcmoe
```

{ONLY_VLLM}

| | original | this checkpoint |
|---|---|---|
| bytes | {result["bytes"]["original"]:,} | {result["bytes"]["compressed"]:,} |
| bits per expert weight, scales and zeros counted | 16 | {sizes.expert_bits:.3f} |
| bits per weight of the whole model | 16 | {sizes.model_bits:.3f} |

| width | matrices (gate, up, down) |
|---|---|
{rows}

![Width of each expert's matrices, by layer](allocation.png)

{_conditions(result, plan)} plan.json and report.json hold every decision and error.

{PAPER}
"""
    ModelCard(content).save(folder / "README.md")


def describe_recipe(result: Mapping[str, Any], plan: Plan) -> str:
    """`best: a knapsack ...`: the recipe's name, and how it chose the widths."""
    recipe = result["recipe"]
    widths = {width for row in plan.pairs() for pair in row for width in pair}
    if recipe.get("solver") is None:
        how = GIVEN
    elif len(widths) == 1:
        how = f"every matrix has {in_words(widths.pop())}"
    else:
        how = METHODS[recipe["allocation"]]
    return f"`{recipe['recipe']}`: {how}"


def _metadata(model: str, licence: str | None) -> str:
    from huggingface_hub import ModelCardData

    on_hub = HUB_NAME.fullmatch(model) is not None and not Path(model).exists()
    data = ModelCardData(
        base_model=model if on_hub else None,
        base_model_relation="quantized",
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=["mcmoe", "vllm", "moe", "quantized"],
        license="other" if licence else None,
        license_link=licence,
    )
    return str(data.to_yaml())


def _conditions(result: Mapping[str, Any], plan: Plan) -> str:
    """What has which width besides, and what the checkpoint was calibrated on."""
    calibration, starved = result["calibration"], result["starved_experts"]
    reached = "Calibration reached every expert."
    if starved:
        listed = (f"layer {i}: {', '.join(map(str, experts))}" for i, experts in starved.items())
        reached = f"Experts that calibration hardly reached: {'; '.join(listed)}."
    return (
        f"Columns that share a scale: {describe_group_sizes(plan.group_size)}. "
        f"Attention (and shared experts): {in_words(plan.dense_bits)}. Router gates, norms, "
        f"embeddings and the head: 16 bits. Calibration: {calibration['samples']} windows of "
        f"{calibration['sequence_length']} tokens of {Path(calibration['source']).name}, seed "
        f"{calibration['seed']}. {reached}"
    )
