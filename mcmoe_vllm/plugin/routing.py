"""Which experts a token goes to and with what weights, in plain torch: what mcmoe's layers on a CPU
choose by.

vLLM's router for CPUs fails where sigmoid scores are not grouped (MiniMax-M2, Laguna, Step) and
forgets the bias of softmax scores that are not (ERNIE-4.5), though its routers for GPUs do neither.
Here a layer's attributes mean what they mean there, whatever the family.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import softplus

from mcmoe_vllm.errors import UserError

SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: softplus(logits).sqrt(),
}


def choose_experts(
    logits: torch.Tensor,
    top_k: int,
    scoring: str,
    bias: torch.Tensor | None = None,
    groups: int = 1,
    kept_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 [T, k] and ids int32 [T, k] of the k experts with the highest scores.

    logits: [T, E], of any floating-point dtype. scoring: a key of SCORES. bias: [E], added to
    scores for the choice, and to no weight. groups: of as many experts each, of which only those of
    the best kept_groups are chosen from; a group counts as much as its best expert, or with a bias
    as its best two. renormalize: weights of a token sum to 1. scale: of all weights at the end.
    """
    scores = SCORES[scoring](logits.float())
    ranked = scores if bias is None else scores + bias
    if kept_groups < groups:
        ranked = _without_other_groups(ranked, groups, kept_groups, 1 if bias is None else 2)
    ids = ranked.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, ids.int()


def route(layer: Any, x: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the router of a layer chooses: weights float32 [T, k] and ids int32 [T, k].

    layer: vLLM's RoutedExperts, one that `refuse_routing` lets pass. x: its input [T, H]. logits:
    [T, E], or what the layer's own routing function takes for them.
    """
    own = layer.custom_routing_function
    if own is not None:
        weights, ids = own(
            hidden_states=x, gating_output=logits, topk=layer.top_k, renormalize=layer.renormalize
        )
        return weights.float().contiguous(), ids.int().contiguous()
    grouped = layer.use_grouped_topk
    return choose_experts(
        logits,
        layer.top_k,
        layer.scoring_func,
        layer.e_score_correction_bias,
        layer.num_expert_group if grouped else 1,
        layer.topk_group if grouped else 1,
        layer.renormalize,
        layer.routed_scaling_factor,
    )


def refuse_routing(layer: Any, moe: Any, prefix: str) -> None:
    """Raise UserError for a router that `route` does not know.

    layer: vLLM's RoutedExperts. moe: its FusedMoEConfig.
    """
    if layer.custom_routing_function is not None:
        return
    reasons = []
    if layer.scoring_func not in SCORES:
        reasons.append(f"scores are {layer.scoring_func!r}, known are {', '.join(sorted(SCORES))}")
    if getattr(moe, "has_hash_routing", False):
        reasons.append("experts are chosen by token ids")
    if layer.use_grouped_topk and not (layer.num_expert_group and layer.topk_group):
        reasons.append(
            f"config.json has no n_group or topk_group ({layer.num_expert_group}, "
            f"{layer.topk_group}), which vLLM's class of this family needs: 1 stands for no groups"
        )
    if reasons:
        raise UserError(
            f"{prefix}: mcmoe does not know this model's router on a CPU: {'; '.join(reasons)}. "
            "Serve the folder on a GPU, where vLLM routes."
        )


def _without_other_groups(
    scores: torch.Tensor, groups: int, kept: int, counted: int
) -> torch.Tensor:
    """Scores [T, E] with minus infinity for those outside the best groups, each of which counts as
    much as its `counted` best experts."""
    by_group = scores.unflatten(-1, (groups, -1))
    best = by_group.topk(counted, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
    kept_groups = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter(-1, best, True)
    return by_group.masked_fill(~kept_groups.unsqueeze(-1), float("-inf")).flatten(-2)
