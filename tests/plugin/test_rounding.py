"""With the routing replayed, the experts' error stays below what rounding can explain.

Real hidden states and routing of the bundled model go through the operator's CPU path in
bfloat16; every element is compared in float64 with a bound derived below.
"""

import pytest
import torch

from mcmoe_kernels.cpu.experts import fused_experts_cpu, prepare, prepare_dense
from mcmoe_kernels.layer import ExpertLayer, ExpertMatrices
from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.compress.pipeline import quantize
from mcmoe_vllm.model.moe_model import open_model
from mcmoe_vllm.model.runner import run_layer
from mcmoe_vllm.model.text import load_tokenizer, strided_windows
from tests.conftest import EXAMPLE_MODEL

UNIT = 2.0**-8  # relative error of rounding to bfloat16, at most
ACTIVATION_SLOPE = 1.1  # the largest derivative of silu is 1.0998
SECOND_ORDER = 1.05  # products of two rounding errors, and the float32 sums


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, calibration_text):
    output = tmp_path_factory.mktemp("rounding") / "out"
    quantize(
        QuantizeOptions(
            model=str(EXAMPLE_MODEL),
            output=str(output),
            calibration=str(calibration_text),
            bits=2.5,
            candidate_bits=(1, 2, 3, 4),
            method="rtn",  # any codes do: what is bounded is the error of computing with them
            finetune_passes=0,
            pins=("layers.*.experts.0=4",),
            samples=8,
            sequence_length=128,
        )
    )
    return open_checkpoint(output)


@pytest.fixture(scope="module")
def routings(checkpoint, evaluation_text):
    """What the routers of all layers decide for 512 tokens, hidden states in bfloat16."""
    loaded = open_model(checkpoint, "cpu")
    tokens = strided_windows(str(evaluation_text), load_tokenizer(EXAMPLE_MODEL), 4, 128)
    (block,) = loaded.embed(tokens)
    recorded = []
    for index in range(loaded.num_layers):
        with loaded.open_layer(index) as layer:
            run = run_layer(layer, [block], layer.experts)
        (block,), routing = run.outputs, run.routing
        recorded.append((routing.hidden.bfloat16(), routing.weights, routing.ids))
    return recorded


def expert_layer(checkpoint, index):
    config = QuantizationConfig.from_dict(checkpoint.config["quantization_config"])
    prefix = f"model.layers.{index}.block_sparse_moe.experts"

    def matrices(group, *projections):
        packed, scale = [], []
        for expert in range(8):
            names = [f"{prefix}.{expert}.{p}.weight" for p in projections]
            packed.append(torch.cat([*checkpoint.read([f"{n}_packed" for n in names]).values()]))
            scale.append(torch.cat([*checkpoint.read([f"{n}_scale" for n in names]).values()]))
        return ExpertMatrices(config.bits(index, group), tuple(packed), tuple(scale))

    return ExpertLayer(256, 128, matrices("w13", "w1", "w3"), matrices("w2", "w2"))


def exact_and_bound(layer, x, weights, ids):
    """The output in float64, and the bound on each element's error.

    First order in u = 2^-8. h = W13 x has weights rounded to bfloat16 and is rounded itself:
        dh <= u (|W13| |x| + |h|)
    a = silu(g) v is rounded once: da <= 1.1 |v| dg + |silu(g)| dv + u |a|
    y = W2 a:                      dy <= |W2| da + u (|W2| |a| + |y|)
    out = sum of weight * y, whose weights may be rounded, and which is rounded once.
    """
    x, weights = x.double(), weights.double()
    out, bound = torch.zeros_like(x), torch.zeros_like(x)
    for expert in range(layer.num_experts):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        w13, w2 = layer.w13.dequantize(expert).double(), layer.w2.dequantize(expert).double()
        h = x[token] @ w13.t()
        dh = UNIT * (x[token].abs() @ w13.abs().t() + h.abs())
        (g, v), (dg, dv) = h.chunk(2, -1), dh.chunk(2, -1)
        silu = torch.nn.functional.silu(g)
        a = silu * v
        da = ACTIVATION_SLOPE * v.abs() * dg + silu.abs() * dv + UNIT * a.abs()
        y = a @ w2.t()
        dy = da @ w2.abs().t() + UNIT * (a.abs() @ w2.abs().t() + y.abs())
        weight = weights[token, slot].unsqueeze(1)
        out.index_add_(0, token, weight * y)
        bound.index_add_(0, token, weight * (dy + UNIT * y.abs()))
    return out, SECOND_ORDER * (bound + UNIT * out.abs())


@pytest.mark.parametrize("mode", ["dense", "int4", "packed"])
def test_error_is_rounding_alone(checkpoint, routings, mode):
    for index, (x, weights, ids) in enumerate(routings):
        layer = expert_layer(checkpoint, index)
        dense = prepare_dense(layer, torch.bfloat16) if mode == "dense" else None
        got = fused_experts_cpu(x, prepare(layer, mode, dense), weights, ids.int())
        exact, bound = exact_and_bound(layer, x, weights, ids)
        error = (got.double() - exact).abs()
        assert (error <= bound).all()
        # Rounding errors cancel where a worst case adds them: together they are about one unit.
        assert error.norm() < 2 * UNIT * exact.norm()
