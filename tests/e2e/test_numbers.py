"""What the engine computes: log-probabilities against transformers on the dequantized weights."""

import pytest
import torch

from tests.helpers.logprobs import RATIOS, TINY, assert_equal_numbers, difference

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.sampled(0)
@pytest.mark.parametrize("model_type", ["olmoe", "qwen2_moe", "qwen3_moe"])
def test_other_architectures(
    compressed, with_ratios, dequantized, prompts, transformers_logprobs, run_engine, model_type
):
    """Tiny and random, with dropped and pruned experts, shared experts and int4 attention."""
    folder = compressed(model_type, **TINY)
    result = run_engine(with_ratios(folder, RATIOS), prompts[:2])
    plain = dequantized(folder)
    assert_equal_numbers(result["logprobs"], transformers_logprobs(plain, prompts[:2], RATIOS))
    assert difference(result["logprobs"], transformers_logprobs(plain, prompts[:2])).mean() > 0.01


@pytest.fixture(scope="module")
def reference(compressed_example, dequantized, prompts, transformers_logprobs):
    return transformers_logprobs(dequantized(compressed_example), prompts)


def test_the_trained_model(compressed_example, prompts, run_engine, reference):
    result = run_engine(compressed_example, prompts)
    assert_equal_numbers(result["logprobs"], reference)
    assert difference(result["logprobs"], reference).numel() >= 4000


@pytest.fixture(scope="module")
def granted(compressed_example, dequantized, prompts, transformers_logprobs, reference):
    """The error of the plain model in bfloat16, of the same weights."""
    plain = dequantized(compressed_example)
    rounded = transformers_logprobs(plain, prompts, dtype=torch.bfloat16)
    return difference(rounded, reference).mean()


@pytest.mark.nightly
@pytest.mark.parametrize("cache_gib", [0, 1])
def test_bfloat16_errs_as_much_as_plain_bfloat16(
    compressed_example, granted, prompts, run_engine, reference, cache_gib
):
    """Near ties of the router flip in bfloat16, with or without compression."""
    result = run_engine(
        compressed_example,
        prompts,
        dtype="bfloat16",
        additional_config={"cpu_weight_cache_gib": cache_gib},
    )
    assert ("int4" in result["log"].split("compute path = ")[1].splitlines()[0]) == (cache_gib == 0)
    assert difference(result["logprobs"], reference).mean() <= 1.25 * granted
