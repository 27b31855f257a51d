"""Run state of one worker: counted layers, the line they end with, and what is pruned."""

import pytest
import torch

pytest.importorskip("vllm")

from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.plugin import launch as plugin_launch
from mcmoe_vllm.plugin import metrics
from mcmoe_vllm.plugin.launch import Launch, true_bits
from mcmoe_vllm.plugin.pruning import LayerPruning
from mcmoe_vllm.pruning.table import PruningTable

pytestmark = pytest.mark.vllm

TABLE = PruningTable("sensitivity", 0.2, (0, 3), {0.2: (0.5, 0.375)})


def quantization_config(pruning=None):
    return QuantizationConfig(
        group_size={"w13": 64, "w2": 32, "dense": 128},
        expert_bits=dict.fromkeys((0, 3), ("2340", "3210")),
        pruning=pruning,
    )


@pytest.fixture
def make(vllm_config, monkeypatch):
    """make(switch, data_parallel_size): a launch of a checkpoint with a pruning table, whose counts
    are published nowhere."""
    monkeypatch.delenv(metrics.FOLDER, raising=False)
    monkeypatch.delenv(metrics.PROMETHEUS_FOLDER, raising=False)

    def get(switch=None, data_parallel_size=1):
        vllm_config.additional_config = {} if switch is None else {"mcmoe": {"pruning": switch}}
        vllm_config.parallel_config.data_parallel_size = data_parallel_size
        return Launch(quantization_config(TABLE), vllm_config)

    return get


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(plugin_launch.logger, "info", lambda text, *args: said.append(text % args))
    return said


def test_the_last_layer_says_one_line(make, lines):
    launch = make("off")
    for prefix in ("a", "b", "a"):  # vLLM asked for a's method twice
        launch.expect(prefix)
    launch.ready("a", "CPU, int4", announce=True)
    launch.ready("a", "CPU, int4", announce=True)
    assert not lines
    launch.ready("b", "CPU, int4", announce=True)
    launch.ready("b", "CPU, int4", announce=True)
    (line,) = lines
    assert line == (
        f"mcmoe 0.1.0: 2 MoE layers, {true_bits(launch.config):.2f} true bits/weight (experts), "
        "compute path = CPU, int4"
    )


def test_one_rank_speaks_for_all(make, lines):
    launch = make()
    launch.expect("a")
    launch.ready("a", "CPU, int4", announce=False)
    assert not lines


@pytest.mark.parametrize(
    ("switch", "said"),
    [("on", ", pruning in 2 layers"), ("decode-only", ", pruning in 2 layers (decode-only)")],
)
def test_the_line_says_what_is_pruned(make, lines, switch, said):
    launch = make(switch)
    launch.expect("a")
    launch.ready("a", "CPU, int4", announce=True)
    assert lines[0].endswith(f"compute path = CPU, int4{said}")


def test_true_bits_count_scales_and_dropped_experts():
    # three of four experts have weights; 16 bits of scale and zero per group of 64 and of 32
    w13, w2 = (2 + 3 + 4) / 4 + 0.75 / 4, (3 + 2 + 1) / 4 + 0.75 / 2
    assert true_bits(quantization_config()) == pytest.approx((2 * w13 + w2) / 3)


def test_the_widths_of_a_layer_are_read_once(monkeypatch):
    """Else the line alone would take seconds where there are many experts."""
    calls = []
    bits = QuantizationConfig.bits
    monkeypatch.setattr(QuantizationConfig, "bits", lambda *args: calls.append(args) or bits(*args))
    true_bits(quantization_config())
    assert len(calls) == 4  # of two layers the two groups


def test_what_a_launch_asks_for_is_what_a_layer_does(make):
    def of_layer_3(switch, counting=False):
        return make(switch).pruning(3, torch.device("cpu"), counting)

    assert of_layer_3("off") is None
    assert of_layer_3(None) == of_layer_3("on") == LayerPruning(0.375)
    assert of_layer_3(0.1) == LayerPruning(0.1875)
    assert of_layer_3("decode-only") == LayerPruning(0.375, decode_only=True)
    assert of_layer_3("on", counting=True).counts.place == 1
    assert of_layer_3("off", counting=True) is None


def test_layers_share_their_counts(make):
    launch = make("on")
    first, second = (launch.pruning(i, torch.device("cpu"), counting=True) for i in (0, 3))
    assert first.counts.counts is second.counts.counts


def test_where_phases_cannot_be_told_is_listed(make):
    with pytest.raises(UserError, match="CUDA graphs.*; with data parallelism.*a share"):
        make("decode-only", 2).pruning(3, torch.device("cuda"), counting=False)
    pruning = make("on", 2).pruning(3, torch.device("cuda"), counting=False)
    assert pruning == LayerPruning(0.375)
