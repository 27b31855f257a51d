"""A stand-in for vLLM's RoutedExperts: the experts' method is tested without an engine."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")


class FakeRoutedExperts(torch.nn.Module):
    """Has what the method asks of the layer. held: global experts of this rank, in order."""

    def __init__(self, num_experts: int, held: list[int] | None, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.top_k, self.scoring_func, self.renormalize = 2, "softmax", True
        self.use_grouped_topk = self.apply_router_weight_on_input = False
        self.num_expert_group = self.topk_group = self.e_score_correction_bias = None
        self.custom_routing_function = None
        self.routed_scaling_factor = 1.0
        self.held = held
        self.expert_map = None
        if held is not None:
            self.expert_map = torch.full((num_experts,), -1, dtype=torch.int32)
            self.expert_map[held] = torch.arange(len(held), dtype=torch.int32)

    def _map_global_expert_id_to_local_expert_id(self, expert: int) -> int:
        return expert if self.expert_map is None else int(self.expert_map[expert])


@pytest.fixture
def vllm_config() -> Iterator[object]:
    """The current VllmConfig, as it is while vLLM loads a model."""
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


@pytest.fixture
def forward(vllm_config: object) -> Callable[[object], AbstractContextManager[None]]:
    """forward(metadata): the context of a forward pass, as vLLM sets it."""
    from vllm.forward_context import set_forward_context

    return lambda metadata: set_forward_context(metadata, vllm_config)


@pytest.fixture
def moe_config() -> Callable[..., SimpleNamespace]:
    def make(num_experts: int, tp_size: int = 1, tp_rank: int = 0, **settings: object):
        parallel = SimpleNamespace(
            tp_size=tp_size,
            tp_rank=tp_rank,
            ep_rank=0,
            use_all2all_kernels=False,
            all2all_backend="allgather_reducescatter",
            enable_eplb=False,
        )
        values = {"has_bias": False, **settings}
        return SimpleNamespace(
            num_experts=num_experts, experts_per_token=2, moe_parallel_config=parallel, **values
        )

    return make


@pytest.fixture
def fake_layer() -> Callable[..., FakeRoutedExperts]:
    def make(num_experts: int, held: list[int] | None = None, activation: str = "silu"):
        return FakeRoutedExperts(num_experts, held, activation)

    return make
