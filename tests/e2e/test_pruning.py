"""Online pruning inside the engine: log-probabilities against the rule in plain torch."""

from dataclasses import dataclass

import pytest
import torch

from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.model.moe_model import open_model
from mcmoe_vllm.model.runner import final_hidden
from mcmoe_vllm.pruning.table import Pruning, PruningTable
from tests.helpers.logprobs import assert_equal_numbers, difference

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@dataclass
class PruningFrom(Pruning):
    """Leaves the first tokens of each sequence alone."""

    length: int = 1
    first: int = 0

    def __call__(self, layer, topk_weights, topk_ids):
        weights, ids = super().__call__(layer, topk_weights, topk_ids)
        place = torch.arange(len(ids)).remainder(self.length).unsqueeze(1)
        return weights, torch.where(place < self.first, topk_ids, ids)


@pytest.fixture(scope="module")
def streamed(calibrated):
    """streamed(sequences of one length, ratios, first) -> float32 log-probabilities of all tokens
    but each sequence's first, pruned from token `first` on."""
    loaded = open_model(open_checkpoint(calibrated))

    def get(sequences, ratios, first=0):
        tokens = torch.tensor(sequences)
        pruning = PruningFrom(ratios, length=tokens.shape[1], first=first)
        logits = loaded.logits(final_hidden(loaded, tokens, pruning))
        log_p = torch.stack([row[:-1].log_softmax(-1) for row in logits])
        return log_p.gather(2, tokens[:, 1:, None]).squeeze(2)

    return get


@pytest.fixture(scope="module")
def table(calibrated):
    settings = open_checkpoint(calibrated).config["quantization_config"]
    return PruningTable.from_dict(settings["pruning"])


def sequences_of(prompts, result):
    return [prompt + tokens for prompt, tokens in zip(prompts, result["tokens"], strict=True)]


def test_a_calibrated_checkpoint_is_pruned_by_default(
    calibrated, table, prompts, run_engine, streamed
):
    result = run_engine(calibrated, prompts)
    assert "pruning in 4 layers" in result["log"]
    assert_equal_numbers(result["logprobs"], streamed(prompts, table.layer_ratios()))
    assert difference(result["logprobs"], streamed(prompts, {})).mean() > 0.01


@pytest.mark.nightly
def test_pieces_and_guesses_are_pruned_alike(calibrated, table, prompts, run_engine, streamed):
    """Another share at the launch; prompts that arrive in chunks beside others' decoding; output
    that is guessed from the prompt and checked several tokens at a time."""
    short = [prompt[:120] for prompt in prompts]
    result = run_engine(
        calibrated,
        short,
        additional_config={"mcmoe": {"pruning": 0.1}},
        max_num_batched_tokens=48,
        max_num_seqs=3,
        max_tokens=24,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 2,
        },
    )
    expected = streamed(sequences_of(short, result), table.layer_ratios(0.1))
    assert_equal_numbers(result["logprobs"], expected[:, :119])
    assert_equal_numbers(result["output_logprobs"], expected[:, 119:])


@pytest.mark.nightly
def test_decode_only_leaves_prompts_alone(calibrated, table, prompts, run_engine, streamed):
    """Prompts join while others decode: one step has tokens of both kinds."""
    short = [prompt[:60] for prompt in prompts]
    switch = {"mcmoe": {"pruning": "decode-only"}}
    result = run_engine(calibrated, short, additional_config=switch, max_tokens=40)
    assert "pruning in 4 layers (decode-only)" in result["log"]
    sequences = sequences_of(short, result)
    expected = streamed(sequences, table.layer_ratios(), first=60)
    assert_equal_numbers(result["logprobs"], expected[:, :59])
    assert_equal_numbers(result["output_logprobs"], expected[:, 59:])
    assert difference(result["output_logprobs"], streamed(sequences, {})[:, 59:]).mean() > 0.01


@pytest.mark.nightly
def test_neighbours_and_lack_of_memory_change_no_text(
    calibrated, table, prompts, run_engine, streamed
):
    """64 requests at once, more than their cache holds, then each by itself, its prompt cached."""
    tails = [prompt[at : at + 16] for prompt in prompts for at in range(64, 128, 16)][:64]
    asked = [prompts[0][:64] + tail for tail in tails]
    result = run_engine(
        calibrated,
        asked,
        max_tokens=32,
        then_alone=True,
        max_model_len=128,
        max_num_seqs=64,
        enable_prefix_caching=True,
        block_size=32,
        num_gpu_blocks_override=80,
        disable_log_stats=False,
    )
    metrics = result["metrics"]
    assert metrics["vllm:num_preemptions_total"] > 0
    assert metrics["vllm:prefix_cache_hits_total"] > 0
    same = sum(a == b for a, b in zip(result["tokens"], result["alone"], strict=True))
    assert same >= 62
    expected = streamed(sequences_of(asked, result), table.layer_ratios())
    assert_equal_numbers(result["output_logprobs"], expected[:, 79:])
