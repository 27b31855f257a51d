"""GPT-OSS: biases, limits, gate and up in pairs of rows, through the compressor and the engine."""

import pytest
import torch

from tests.conftest import EXAMPLE_MODEL
from tests.families.families import save_family
from tests.helpers.logprobs import RATIOS, TINY, assert_equal_numbers, difference

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.nightly]


@pytest.fixture(scope="module")
def family(once):
    return once("family-gpt_oss", lambda folder: save_family("gpt_oss", folder, EXAMPLE_MODEL))


@pytest.fixture(scope="module")
def folder(family, calibration_text, tmp_path_factory):
    """Every width, dropped experts among them."""
    from mcmoe_vllm.compress.options import QuantizeOptions
    from mcmoe_vllm.compress.pipeline import quantize

    output = tmp_path_factory.mktemp("compressed") / "gpt_oss"
    quantize(
        QuantizeOptions(
            model=str(family),
            output=str(output),
            calibration=str(calibration_text),
            group_size=64,
            samples=4,
            sequence_length=128,
            **TINY,
        )
    )
    return output


@pytest.fixture(scope="module")
def plain(folder, dequantized):
    return dequantized(folder)


def test_log_probabilities(
    folder, plain, with_ratios, prompts, transformers_logprobs, run_engine, tmp_path
):
    ratios = {**RATIOS, 2: 0.3}
    result = run_engine(with_ratios(folder, ratios), prompts[:2])
    assert_equal_numbers(result["logprobs"], transformers_logprobs(plain, prompts[:2], ratios))
    assert difference(result["logprobs"], transformers_logprobs(plain, prompts[:2])).mean() > 0.01
    # What the bound is worth: one expert with its gate in the place of its up, and one with its
    # biases so.
    for name in ("gate_up_proj", "gate_up_proj_bias"):
        other = exchange(plain, tmp_path / name, name)
        with pytest.raises(AssertionError):
            assert_equal_numbers(
                result["logprobs"], transformers_logprobs(other, prompts[:2], ratios)
            )


def exchange(plain, target, name):
    """The model with columns 2i and 2i + 1 of an expert's tensor exchanged."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(plain, target)
    tensors = load_file(target / "model.safetensors")
    tensor = tensors[f"model.layers.1.mlp.experts.{name}"]
    busiest = int(tensor.flatten(1).abs().sum(1).argmax())
    pairs = tensor[busiest].unflatten(-1, (-1, 2))
    tensor[busiest] = pairs.flip(-1).flatten(-2)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_two_ranks_with_experts_of_their_own(
    folder, plain, prompts, run_engine, transformers_logprobs
):
    """By hash, each with its own slice of the biases."""
    result = run_engine(
        folder,
        prompts[:1],
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        load_format="mcmoe",
        tensor_parallel_size=2,
        enable_expert_parallel=True,
    )
    assert_equal_numbers(result["logprobs"], transformers_logprobs(plain, prompts[:1]))


@pytest.mark.parametrize("options", [{"recipe": "paper"}, {"finetune_passes": 1, "bits": 2}])
def test_recipes_leave_a_model_that_agrees_with_the_16_bit_one(
    family, calibration_text, evaluation_text, tmp_path, options
):
    from mcmoe_vllm.compress.options import QuantizeOptions
    from mcmoe_vllm.compress.pipeline import quantize
    from mcmoe_vllm.evaluate.perplexity import evaluate

    output = tmp_path / "out"
    report = quantize(
        QuantizeOptions(
            model=str(family),
            output=str(output),
            calibration=str(calibration_text),
            group_size=64,
            samples=16,
            sequence_length=64,
            **{"bits": 3, **options},
        )
    )
    found = evaluate(
        str(output), str(evaluation_text), against=str(family), windows=4, sequence_length=64
    )
    assert found.kl < 0.3 and report is not None
    assert torch.isfinite(torch.tensor(found.perplexity))
