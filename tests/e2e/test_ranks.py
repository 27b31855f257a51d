"""Two ranks compute what one does: log-probabilities against one rank, one against transformers."""

import pytest
import torch

from tests.helpers.logprobs import RATIOS, TINY, assert_equal_numbers

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def unpruned(compressed):
    """Whole groups on both ranks: 128 columns of gate and up, 64 of down."""
    return compressed("mixtral", tensor_parallel=2, **TINY)


@pytest.fixture(scope="module")
def pruned(unpruned, with_ratios):
    return with_ratios(unpruned, RATIOS)


@pytest.fixture(scope="module")
def one_rank(pruned, prompts, run_engine):
    return run_engine(pruned, prompts[:2])


def test_one_rank(one_rank, unpruned, dequantized, prompts, transformers_logprobs):
    expected = transformers_logprobs(dequantized(unpruned), prompts[:2], RATIOS)
    assert_equal_numbers(one_rank["logprobs"], expected)


@pytest.mark.nightly
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_two_ranks(pruned, prompts, run_engine, one_rank, expert_parallel):
    """Both prune the same, or the sum of their parts would be another."""
    two = run_engine(
        pruned,
        prompts[:2],
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        tensor_parallel_size=2,
        enable_expert_parallel=expert_parallel,
        load_format="mcmoe",
    )
    assert_equal_numbers(two["logprobs"], torch.tensor(one_rank["logprobs"]))
    assert two["log"].count("compute path = CPU") == 1
    skipped = "of other ranks' experts are left to those" in two["log"]
    assert skipped == expert_parallel
