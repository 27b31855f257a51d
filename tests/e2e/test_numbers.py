"""What the engine computes: log-probabilities against transformers on the dequantized weights."""

import pytest
import torch

from tests.logprobs import assert_equal_numbers, difference

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Of the two layers of tiny models: one is left alone, most of the other's experts are pruned.
RATIOS = {0: 0.0, 1: 0.7}
TINY = {"samples": 4, "method": "rtn", "candidate_bits": (0, 1, 2, 3, 4), "bits": 2.25}


@pytest.fixture(scope="module")
def example(compressed):
    return compressed("example")


@pytest.fixture(scope="module")
def reference(example, dequantized, prompts, transformers_logprobs):
    return transformers_logprobs(dequantized(example), prompts)


@pytest.fixture(scope="module")
def default_loader(example, prompts, run_engine):
    return run_engine(example, prompts)


def test_the_trained_model(default_loader, reference):
    assert_equal_numbers(default_loader["logprobs"], reference)
    assert difference(default_loader["logprobs"], reference).numel() >= 4000


def test_the_checked_loader_changes_nothing(example, prompts, run_engine, default_loader):
    checked = run_engine(example, prompts, load_format="mcmoe")
    assert checked["logprobs"] == default_loader["logprobs"]
    assert checked["tokens"] == default_loader["tokens"]


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "olmoe"])
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
def plain_bfloat16(example, dequantized, prompts, run_engine):
    return run_engine(dequantized(example), prompts, dtype="bfloat16")


@pytest.mark.parametrize("cache_gib", [0, 1])
def test_bfloat16_errs_as_much_as_plain_bfloat16(
    example, plain_bfloat16, prompts, run_engine, reference, cache_gib
):
    """Near ties of the router flip in bfloat16, with or without compression; the plain model of
    the same weights is the measure."""
    result = run_engine(
        example,
        prompts,
        dtype="bfloat16",
        additional_config={"cpu_weight_cache_gib": cache_gib},
    )
    assert ("int4" in result["log"].split("compute path = ")[1].splitlines()[0]) == (cache_gib == 0)
    granted = difference(plain_bfloat16["logprobs"], reference).mean()
    assert difference(result["logprobs"], reference).mean() <= 1.25 * granted


@pytest.fixture(scope="module")
def pruned_mixtral(compressed, with_ratios):
    return with_ratios(compressed("mixtral", group_size=32, **TINY), RATIOS)


@pytest.fixture(scope="module")
def one_rank(pruned_mixtral, prompts, run_engine):
    return run_engine(pruned_mixtral, prompts[:2])


def test_one_rank(one_rank, compressed, dequantized, prompts, transformers_logprobs):
    plain = dequantized(compressed("mixtral", group_size=32, **TINY))
    assert_equal_numbers(one_rank["logprobs"], transformers_logprobs(plain, prompts[:2], RATIOS))


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_two_ranks(pruned_mixtral, prompts, run_engine, one_rank, expert_parallel):
    """Both prune the same, or the sum of their parts would be another."""
    two = run_engine(
        pruned_mixtral,
        prompts[:2],
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        tensor_parallel_size=2,
        enable_expert_parallel=expert_parallel,
        load_format="mcmoe",
    )
    assert_equal_numbers(two["logprobs"], torch.tensor(one_rank["logprobs"]))
    assert two["log"].count("compute path = CPU") == 1
    skipped = "all hashes right, 0 skipped" not in two["log"]
    assert skipped == expert_parallel
