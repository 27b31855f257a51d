"""`mcmoe eval --engine vllm` gives the perplexity that the layer-by-layer run gives."""

import pytest

from mcmoe_vllm.evaluation import evaluate

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_both_engines_agree(compressed, evaluation_text):
    arguments = {"windows": 12, "sequence_length": 128}
    model = str(compressed("example"))
    streamed = evaluate(model, str(evaluation_text), **arguments)
    served = evaluate(model, str(evaluation_text), engine="vllm", **arguments)
    assert (served.windows, served.sequence_length) == (12, 128)
    # bfloat16 against float32 over 1524 tokens: a few flipped routings, no bias.
    assert served.loss == pytest.approx(streamed.loss, abs=0.01)
    assert served.kl is None
