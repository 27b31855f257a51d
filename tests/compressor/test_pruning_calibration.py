"""Calibration: thresholds that drop the share they promise, where it costs least."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from mcmoe_kernels.pruning import beside_largest, drop_mask
from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.evaluate.perplexity import evaluate
from mcmoe_vllm.model.divergence import mean_divergences
from mcmoe_vllm.model.moe_model import open_model
from mcmoe_vllm.model.runner import final_hidden
from mcmoe_vllm.model.text import load_tokenizer, strided_windows
from mcmoe_vllm.pruning.calibration import (
    PROBE_DROP,
    LayerRouting,
    calibrate_checkpoint,
    choose_shares,
    measure_routing,
    summarize_routing,
)
from mcmoe_vllm.pruning.table import Pruning, PruningTable
from tests.conftest import EXAMPLE_MODEL


def beside_all(weights):
    """Another measure than the served one."""
    return weights, weights.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("measure", [beside_largest, beside_all])
@pytest.mark.parametrize("top_k", [2, 4])
def test_a_ratio_drops_the_share_it_is_for(top_k, measure):
    torch.manual_seed(0)
    weights, ids = torch.rand(5000, 8).topk(top_k)
    weights /= weights.sum(1, keepdim=True)
    layer = summarize_routing(weights, measure)
    assert layer.activations == 5000 * top_k and len(layer.ratios) == 5000 * (top_k - 1)
    for share in (0.0, 0.1, 0.3):
        dropped = drop_mask(weights, ids, layer.ratio_for(share), measure).float().mean()
        assert float(dropped) == pytest.approx(share, abs=1e-3)
    assert layer.ratio_for(1.0) <= 1.0


def layer_with(kl: float) -> LayerRouting:
    torch.manual_seed(1)
    return replace(summarize_routing(torch.rand(4000, 2).softmax(1)), kl=kl)


def test_shares_are_bought_where_they_cost_least():
    layers = [layer_with(kl) for kl in (1.0, 0.01, 1.0, 0.1)]
    shares = choose_shares(layers, 0.2)
    assert sum(shares) == pytest.approx(0.8)
    assert shares[1] > shares[3] > max(shares[0], shares[2])
    cost = sum(layer.cost(share) for layer, share in zip(layers, shares, strict=True))
    assert cost < sum(layer.cost(0.2) for layer in layers)
    assert choose_shares(layers, 0.9) == pytest.approx([0.5] * 4)  # all that may be dropped


@pytest.fixture(scope="module")
def measured(compressed_example, evaluation_text):
    loaded = open_model(open_checkpoint(compressed_example))
    tokenizer = load_tokenizer(compressed_example)
    tokens = strided_windows(str(evaluation_text), tokenizer, 12, 128)
    return loaded, tokens, measure_routing(loaded, tokens, probe=True)


def test_probes_are_the_divergence_of_pruning_that_layer_alone(measured):
    loaded, tokens, layers = measured
    base = final_hidden(loaded, tokens)
    for index in (0, max(layers)):
        pruned = final_hidden(loaded, tokens, Pruning({index: layers[index].ratio_for(PROBE_DROP)}))
        (expected,) = mean_divergences(loaded, base, [pruned])
        assert layers[index].kl == pytest.approx(expected, rel=1e-3) and expected > 0


def test_a_calibrated_checkpoint_drops_its_share(
    compressed_example, calibration_text, evaluation_text, tmp_path
):
    folder = tmp_path / "calibrated"
    shutil.copytree(compressed_example, folder)
    table = calibrate_checkpoint(
        str(folder), str(calibration_text), target_drop=0.2, samples=16, sequence_length=128
    )
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]["pruning"]
    assert PruningTable.from_dict(stored) == table

    def score(pruning):
        return evaluate(
            str(folder), str(evaluation_text), windows=16, sequence_length=128, pruning=pruning
        )

    unpruned, default, less = score("off"), score(None), score(0.1)
    assert unpruned.dropped_fraction == 0.0
    assert default.dropped_fraction == pytest.approx(0.2, abs=0.03)  # another text
    assert less.dropped_fraction == pytest.approx(0.1, abs=0.03)
    assert unpruned.loss != less.loss != default.loss


def test_the_papers_rule_is_the_median(compressed_example, calibration_text, tmp_path):
    folder = tmp_path / "median"
    shutil.copytree(compressed_example, folder)
    table = calibrate_checkpoint(
        str(folder), str(calibration_text), rule="median", samples=8, sequence_length=128
    )
    assert table.renormalize and table.target_drop == pytest.approx(0.25, abs=0.01)


def test_refusals(tiny_models, calibration_text):
    with pytest.raises(UserError, match="not compressed"):
        calibrate_checkpoint(str(tiny_models("mixtral")), str(calibration_text))
    with pytest.raises(UserError, match=r"up to 0\.5"):
        calibrate_checkpoint("anything", str(calibration_text), target_drop=0.7)


def test_quantize_calibrates_and_inspect_shows_it(calibration_text, tmp_path, capsys):
    from mcmoe_vllm import cli

    output = tmp_path / "example"
    arguments = ["quantize", str(EXAMPLE_MODEL), "-o", str(output), "--method", "rtn"]
    arguments += ["--calibration", str(calibration_text), "--samples", "4"]
    arguments += ["--finetune-passes", "0"]
    assert cli.main([*arguments, "--sequence-length", "128", "--target-drop", "0.1"]) == 0
    table = PruningTable.from_dict(
        json.loads((output / "config.json").read_text())["quantization_config"]["pruning"]
    )
    assert table.target_drop == 0.1 and table.rule == "sensitivity"
    capsys.readouterr()
    assert cli.main(["inspect", str(output), "--check"]) == 0
    shown = capsys.readouterr().out
    assert "online pruning: 10.0% of expert activations" in shown
    assert f"{table.layer_ratios()[0]:.3f}" in shown
    assert cli.main([*arguments[:2], "-o", str(tmp_path / "x"), "--target-drop", "0.9"]) == 2
