"""Online pruning inside the engine: log-probabilities against the rule in plain torch."""

import pytest
import torch

from mcmoe_vllm.checkpoint import open_checkpoint
from mcmoe_vllm.evaluation import final_hidden, load_streamed
from mcmoe_vllm.pruning import Pruning, PruningTable

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def streamed(calibrated, prompts):
    """streamed(ratios) -> float32 log-probabilities of the prompts' tokens but the first."""
    loaded = load_streamed(open_checkpoint(calibrated))

    def get(ratios):
        rows = []
        for ids in prompts:
            tokens = torch.tensor([ids])
            hidden = final_hidden(loaded, tokens, Pruning(ratios))
            log_p = next(loaded.model.logits(hidden))[:-1].log_softmax(-1)
            rows.append(log_p.gather(1, tokens[0, 1:, None]).squeeze(1))
        return torch.stack(rows)

    return get


def table_of(folder):
    settings = open_checkpoint(folder).config["quantization_config"]
    return PruningTable.from_dict(settings["pruning"])


def assert_equal_numbers(result, reference):
    """float32 on both sides: what is left is the order of summation."""
    error = (torch.tensor(result["logprobs"]) - reference).abs()
    assert error.mean() <= 2e-3 and (error <= 0.05).float().mean() >= 0.99


def test_a_calibrated_checkpoint_is_pruned_by_default(calibrated, prompts, run_engine, streamed):
    result = run_engine(calibrated, prompts)
    assert "pruning in 4 layers" in result["log"]
    assert_equal_numbers(result, streamed(table_of(calibrated).layer_ratios()))
    unpruned = streamed({})
    assert (torch.tensor(result["logprobs"]) - unpruned).abs().mean() > 0.01


def test_pieces_of_a_prompt_are_pruned_alike(calibrated, prompts, run_engine, streamed):
    """Another share at the launch, and prompts that arrive in chunks beside others' decoding."""
    switch = {"mcmoe": {"pruning": 0.1}}
    chunks = {"max_num_batched_tokens": 48, "max_num_seqs": 3}
    result = run_engine(calibrated, prompts, additional_config=switch, **chunks)
    assert_equal_numbers(result, streamed(table_of(calibrated).layer_ratios(0.1)))
