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


@pytest.mark.parametrize("target", [0.2, 2.0, float("inf"), float("nan")])
def test_shares_are_chosen_in_a_bounded_number_of_steps(target):
    """Also where some layers, or all, have nothing to drop."""
    top_1 = summarize_routing(torch.rand(100, 1))
    assert choose_shares([top_1, top_1], target) == [0, 0] and choose_shares([], target) == []
    mixed = choose_shares([top_1, layer_with(1.0)], target)
    assert mixed[0] == 0 and mixed[1] <= 0.5
    few = LayerRouting(torch.rand(1), torch.rand(1).double(), 10**13, 1.0)
    assert choose_shares([few], target)[0] <= 1e-13


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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 0}, "samples is 0, needs at least 1"),
        ({"samples": -1}, "samples is -1, needs at least 1"),
        ({"samples": 10**30}, "samples is 1000.*, needs at most 1048576"),
        ({"samples": 2.5}, "samples is 2.5, needs a whole number"),
        ({"seed": 2**64}, "seed is 18446744073709551616, needs at most"),
        ({"seed": -1}, "seed is -1, needs at least 0"),
        ({"target_drop": float("nan")}, r"target_drop is nan, allowed are shares up to 0\.5"),
        ({"target_drop": 0.0}, "target_drop is 0.0, allowed"),
        ({"rule": "mean"}, "rule is 'mean', allowed are"),
        ({"rule": "median", "target_drop": 0.2}, "rule median drops .* leave out one"),
        ({"sequence_length": 0}, "sequence_length is 0, allowed are 2 to 512"),
        ({"sequence_length": -5}, "sequence_length is -5, allowed"),
        ({"device": "vulkan"}, "device is 'vulkan', allowed"),
    ],
)
def test_numbers_are_checked_before_the_work(compressed_example, calibration_text, given, message):
    with pytest.raises(UserError, match=message):
        calibrate_checkpoint(compressed_example, calibration_text, **given)


def test_a_model_of_one_expert_a_token_is_refused_before_the_work(
    tiny_models, compressed_example, calibration_text, tmp_path
):
    from mcmoe_vllm.compress.options import QuantizeOptions
    from mcmoe_vllm.compress.pipeline import quantize

    for source, name in ((tiny_models("mixtral"), "model"), (compressed_example, "compressed")):
        shutil.copytree(source, tmp_path / name)
        edit_config(tmp_path / name, num_experts_per_tok=1)
    with pytest.raises(UserError, match="nothing for online pruning to drop"):
        calibrate_checkpoint(tmp_path / "compressed", "no text is read")
    options = QuantizeOptions(
        tmp_path / "model", tmp_path / "out", calibration=calibration_text, target_drop=0.1
    )
    with pytest.raises(UserError, match="leave out --target-drop"):
        quantize(options)
    assert {f.name for f in tmp_path.iterdir()} == {"model", "compressed"}


def test_a_broken_table_can_be_calibrated_again(compressed_example, calibration_text, tmp_path):
    folder = shutil.copytree(compressed_example, tmp_path / "broken")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**settings, "pruning": {"rule": "guess"}})
    with pytest.raises(UserError, match="Calibrate again with `mcmoe calibrate-pruning`"):
        evaluate(folder, calibration_text, windows=2, sequence_length=32)
    calibrate_checkpoint(folder, calibration_text, samples=2, sequence_length=32)
    assert evaluate(folder, calibration_text, windows=2, sequence_length=32).dropped_fraction > 0


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


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
