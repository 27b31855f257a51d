"""The evaluation protocol against transformers on the dequantized weights, and its statistics."""

import math

import pytest
import torch

from mcmoe_vllm.errors import UserError
from mcmoe_vllm.evaluate import perplexity
from mcmoe_vllm.evaluate.perplexity import evaluate
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
