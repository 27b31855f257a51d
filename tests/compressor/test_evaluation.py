"""The evaluation protocol against transformers on the dequantized weights, and its statistics."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcmoe_vllm.errors import UserError
from mcmoe_vllm.evaluate import perplexity
from mcmoe_vllm.evaluate.perplexity import Evaluation, evaluate, print_evaluation
from mcmoe_vllm.evaluate.tasks import TaskScore, print_scores
from mcmoe_vllm.model.text import load_tokenizer, strided_windows
from mcmoe_vllm.pruning.table import PruningTable


def test_loss_and_error_follow_their_definition(tiny_models, evaluation_text):
    from transformers import AutoModelForCausalLM

    path = tiny_models("mixtral")
    result = evaluate(str(path), str(evaluation_text), windows=5, sequence_length=48)
    windows = strided_windows(str(evaluation_text), load_tokenizer(path), 5, 48)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(windows).logits
    losses = torch.stack(
        [
            torch.nn.functional.cross_entropy(row[:-1], window[1:])
            for row, window in zip(logits, windows, strict=True)
        ]
    ).double()
    assert result.loss == pytest.approx(float(losses.mean()), abs=1e-4)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.stderr == pytest.approx(float(losses.std() / math.sqrt(5)), rel=1e-2)
    assert result.base is None and result.kl is None


def test_refusals(tiny_models, evaluation_text, tmp_path):
    path = str(tiny_models("mixtral"))
    with pytest.raises(UserError, match="allowed are 2 to 256"):
        evaluate(path, str(evaluation_text), sequence_length=512)
    with pytest.raises(UserError, match="at least 2"):
        evaluate(path, str(evaluation_text), windows=1)
    with pytest.raises(UserError, match="allowed are"):
        evaluate(path, str(evaluation_text), engine="llama.cpp")
    with pytest.raises(UserError, match="device is 'gpu'"):
        evaluate(path, str(evaluation_text), windows=2, device="gpu")
    with pytest.raises(UserError, match="prunes no prompt"):
        evaluate(path, str(evaluation_text), pruning="decode-only")
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    with pytest.raises(UserError, match="too short"):
        evaluate(path, str(short))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sequence_length": 0}, "sequence_length is 0, allowed are 2 to 256"),
        ({"windows": 2**70}, "windows is .*, needs at most"),
        ({"windows": 2.0}, "windows is 2.0, needs a whole number"),
        ({"engine": "vllm", "device": "cpu"}, "vLLM chooses its device itself"),
        ({"device": "xpu"}, "device is 'xpu', allowed"),
        ({"pruning": float("nan")}, "not calibrated"),
    ],
)
def test_arguments_that_cannot_be_are_refused(tiny_models, evaluation_text, given, message):
    with pytest.raises(UserError, match=message):
        evaluate(tiny_models("mixtral"), evaluation_text, **given)


@pytest.mark.parametrize("value", [["mcmoe"], "mcmoe", 0, {}, {"quant_method": 7}])
def test_a_quantization_config_of_no_use_is_refused(tiny_models, evaluation_text, tmp_path, value):
    folder = shutil.copytree(tiny_models("mixtral"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    with pytest.raises(UserError, match="quantization_config|quant_method"):
        evaluate(folder, evaluation_text, windows=2, sequence_length=32)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([1.0, float("nan"), 2.0], "the loss is not finite in 1 of 3 windows"),
        ([float("inf")] * 3, "the loss is not finite in 3 of 3"),
        ([1000.0] * 3, "its perplexity is beyond any number"),
    ],
)
def test_losses_that_are_no_figures_are_errors(
    tiny_models, evaluation_text, monkeypatch, losses, message
):
    found = torch.tensor(losses, dtype=torch.float64)
    monkeypatch.setattr(perplexity, "score_with_vllm", lambda *given: found)
    with pytest.raises(UserError, match=message):
        evaluate(tiny_models("mixtral"), evaluation_text, engine="vllm", windows=3)


def test_weights_that_overflow_are_an_error(tiny_models, evaluation_text, tmp_path):
    """Finite themselves, so that only the loss tells."""
    folder = shutil.copytree(tiny_models("mixtral"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.gate.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not finite in 2 of 2 windows"):
        evaluate(folder, evaluation_text, windows=2, sequence_length=32)


def test_scales_that_hold_nan_are_refused(compressed_example, evaluation_text, tmp_path):
    folder = shutil.copytree(compressed_example, tmp_path / "model")
    name = "model.layers.1.self_attn.o_proj.scales"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"NaN or infinite weights in 1 tensor: {name}"):
        evaluate(folder, evaluation_text, windows=2, sequence_length=32)


def test_names_are_shown_as_they_are(capsys):
    figures = {"loss": 1.0, "perplexity": 2.7, "stderr": 0.1, "base_perplexity": 2.0}
    for name in ("m[v2]", "x[/bold]", "[red]r[/red]", "a:cat:b", "[link=x]"):
        print_evaluation(Evaluation(name, "vllm", "t", 2, 32, **figures, base=f"b{name}"))
        print_scores(name, [TaskScore(name, f"acc {name}", True, 3, 0.5, None)], f"b{name}")
        shown = capsys.readouterr().out
        assert shown.count(name) >= 5 and shown.count(f"b{name}") >= 2


def test_models_of_different_vocabularies_are_not_compared(tiny_models, evaluation_text, tmp_path):
    from tests.conftest import make_tiny_model

    other = make_tiny_model(tmp_path / "other", "mixtral", layers=1, vocab_size=9000)
    with pytest.raises(UserError, match="vocabulary of 8192"):
        evaluate(str(tiny_models("mixtral")), str(evaluation_text), against=str(other), windows=2)


def test_what_vllm_drops_is_not_known(tiny_models, evaluation_text, monkeypatch):
    table = PruningTable("median", 0.2, (0, 1), {0.2: (0.3, 0.3)})
    losses = torch.tensor([1.0, 2.0], dtype=torch.float64)
    monkeypatch.setattr(perplexity, "score_with_vllm", lambda *given: losses)
    given = {"windows": 2, "sequence_length": 32, "engine": "vllm"}
    path, text = str(tiny_models("mixtral")), str(evaluation_text)
    assert evaluate(path, text, **given).dropped_fraction == 0.0
    monkeypatch.setattr(perplexity, "read_table", lambda config: table)
    pruned = evaluate(path, text, **given)
    assert pruned.dropped_fraction is None and pruned.loss == 1.5
    assert evaluate(path, text, **given, pruning="off").dropped_fraction == 0.0
