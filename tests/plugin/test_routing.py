"""The routing of a CPU's layers: against transformers' routers, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin.routing import choose_experts, refuse_routing, route
from tests.families.families import EXPERTS, FAMILIES, HIDDEN, TOP_K, make_config

pytestmark = pytest.mark.vllm

SIGMOID = {"scoring": "sigmoid"}
# What vLLM's class of a family asks for, where that is not softmax scores that sum to 1; groups and
# the factor of weights are in the family's config.
FAMILY = {
    "mixtral": {},
    "granitemoe": {},
    "cohere2_moe": {},
    "ernie4_5_moe": {},
    "qwen3_next": {},
    "flex_olmo": {"renormalize": False},
    "deepseek_v2": {"renormalize": False},
    "deepseek_v3": SIGMOID,
    "glm4_moe": SIGMOID,
    "glm4_moe_lite": SIGMOID,
    "dots1": SIGMOID,
    "exaone_moe": SIGMOID,
    "solar_open": SIGMOID,
    "hy_v3": SIGMOID,
    "lfm2_moe": SIGMOID,
    "minimax_m2": SIGMOID,
    "laguna": SIGMOID,
    "mimo_v2_flash": SIGMOID,
    "afmoe": SIGMOID,
}
BIASED = set(FAMILY) - {
    "mixtral", "granitemoe", "cohere2_moe", "qwen3_next", "flex_olmo", "deepseek_v2",
}  # fmt: skip
# What a family of transformers' adds to the sum that it divides by, and vLLM does not.
ADDED = {"lfm2_moe": 1e-6}
FAST = ("mixtral", "ernie4_5_moe", "flex_olmo", "minimax_m2", "hy_v3")  # one of each kind
SCALES = ("routed_scaling_factor", "router_scaling_factor", "route_scale")


def transformers_block(family, **settings):
    """The module that holds router and experts, of the last layer of a family; its experts."""
    import transformers

    config = make_config(family, vocab_size=64, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[family].cls)(config).eval()
    paths = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "down_proj", None), torch.nn.Parameter)
    ]
    block = model.get_submodule(paths[-1].rpartition(".")[0])
    return config, block, model.get_submodule(paths[-1])


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *(pytest.param(n, {}, marks=() if n in FAST else pytest.mark.nightly) for n in FAMILY),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
        ("deepseek_v3", {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
    ],
)
def test_it_chooses_as_transformers(family, settings):
    config, block, experts = transformers_block(family, **settings)
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    outside = {name: t for name, t in tensors.items() if "experts." not in name}
    (gate,) = (t for t in outside.values() if t.shape == (EXPERTS, HIDDEN))
    biases = [t for n, t in outside.items() if "bias" in n and t.numel() == EXPERTS]
    assert len(biases) == (family in BIASED)
    with torch.no_grad():
        gate.normal_(0, 0.1)
        for bias in biases:
            bias.normal_(0, 0.3)
    given = {}
    experts.register_forward_pre_hook(
        lambda _, values: given.update(x=values[0], ids=values[1], weights=values[2])
    )
    with torch.no_grad():
        block(torch.randn(1, 64, HIDDEN, generator=torch.Generator().manual_seed(1)))
    x = given["x"].view(-1, HIDDEN)
    asked = {"scoring": "softmax", "renormalize": True, **FAMILY[family]}
    weights, ids = choose_experts(
        x @ gate.T,
        TOP_K,
        bias=biases[0].flatten() if biases else None,
        groups=getattr(config, "n_group", None) or 1,
        kept_groups=getattr(config, "topk_group", None) or 1,
        scale=next((v for n in SCALES if (v := getattr(config, n, None)) is not None), 1.0),
        **asked,
    )
    order, expected_order = ids.argsort(-1), given["ids"].argsort(-1)
    assert torch.equal(ids.gather(-1, order).long(), given["ids"].gather(-1, expected_order).long())
    expected = given["weights"].gather(-1, expected_order)
    added = ADDED.get(family, 0.0) / float(expected.min())
    torch.testing.assert_close(weights.gather(-1, order), expected, rtol=0, atol=1e-6 + added)
    if biases:  # or the bias would show nothing
        plain = choose_experts(x @ gate.T, TOP_K, **asked)[1]
        assert not torch.equal(ids.sort(-1).values, plain.sort(-1).values)


def test_square_roots_of_softplus():
    """DeepSeek-V4's scores."""
    logits = torch.randn(9, 8)
    weights, ids = choose_experts(logits, 3, "sqrtsoftplus", torch.zeros(8), scale=1.5)
    expected = logits.exp().log1p().sqrt().topk(3)
    assert torch.equal(ids.long(), expected.indices)
    torch.testing.assert_close(weights, 1.5 * expected.values / expected.values.sum(-1, True))


def layer(**settings):
    values = {
        "top_k": 2,
        "scoring_func": "softmax",
        "renormalize": True,
        "use_grouped_topk": False,
        "num_expert_group": None,
        "topk_group": None,
        "routed_scaling_factor": 1.0,
        "e_score_correction_bias": None,
        "custom_routing_function": None,
    }
    return SimpleNamespace(**{**values, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scoring_func": "sigmoid", "e_score_correction_bias": torch.linspace(-1, 1, 8)},
        {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 1, "renormalize": False},
        {"num_expert_group": 4, "topk_group": 1},  # named, and not used
    ],
)
def test_a_layer_is_read_as_vllm_reads_it(settings):
    """Against the router that vLLM's GPUs have for all of them."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import _grouped_topk

    asked, logits = layer(**settings), torch.randn(16, 8)
    refuse_routing(asked, SimpleNamespace(), "model.layers.0.mlp.experts")
    weights, ids = route(asked, torch.zeros(16, 4), logits)
    grouped = asked.use_grouped_topk
    expected = _grouped_topk(
        logits,
        2,
        asked.renormalize,
        asked.num_expert_group if grouped else 1,
        asked.topk_group if grouped else 1,
        asked.scoring_func,
        1.0,
        asked.e_score_correction_bias,
    )
    dense = [torch.zeros(16, 8).scatter(-1, i.long(), w) for w, i in ((weights, ids), expected)]
    torch.testing.assert_close(*dense)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32


def test_a_function_of_its_own_decides():
    def custom(hidden_states, gating_output, topk, renormalize):
        ids = gating_output.topk(topk, largest=False).indices
        return torch.full(ids.shape, 0.25, dtype=torch.bfloat16), ids

    logits = torch.randn(5, 8)
    weights, ids = route(layer(custom_routing_function=custom), torch.zeros(5, 4), logits)
    assert torch.equal(ids.long(), logits.topk(2, largest=False).indices)
    assert weights.dtype == torch.float32 and bool((weights == 0.25).all())


@pytest.mark.parametrize(
    ("settings", "moe", "what"),
    [
        ({"scoring_func": "tanh"}, {}, "scores are 'tanh', known are sigmoid, softmax, sqrts"),
        ({}, {"has_hash_routing": True}, "chosen by token ids"),
        ({"use_grouped_topk": True}, {}, r"no n_group or topk_group \(None, None\)"),
    ],
)
def test_unknown_routers_are_refused(settings, moe, what):
    with pytest.raises(UserError, match=f"model.layers.3.mlp.experts: .*{what}.*on a GPU"):
        refuse_routing(layer(**settings), SimpleNamespace(**moe), "model.layers.3.mlp.experts")
