"""`mcmoe eval --engine vllm` gives the perplexity that the layer-by-layer run gives."""

import pytest

from mcmoe_vllm.evaluate.perplexity import evaluate

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.nightly
def test_both_engines_agree(compressed_example, evaluation_text):
    arguments = {"windows": 6}  # full windows: the model's maximum of 512 tokens
    model = str(compressed_example)
    streamed = evaluate(model, str(evaluation_text), **arguments)
    served = evaluate(model, str(evaluation_text), engine="vllm", **arguments)
    assert (served.windows, served.sequence_length) == (6, 512)
    # bfloat16 against float32 over 3066 tokens: a few flipped routings, no bias.
    assert served.loss == pytest.approx(streamed.loss, abs=0.01)
    assert served.kl is None
