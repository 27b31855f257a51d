"""Finetuning on a tiny model: what it may change, where it must win, and when it stands back."""

import pytest
import torch

from mcmoe_kernels.formats.packing import unpack_scale
from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.compress.finetune import HELD_OUT, finetune_model, shorten
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.compress.pipeline import quantize
from mcmoe_vllm.compress.student import Student
from mcmoe_vllm.model.divergence import mean_divergences
from mcmoe_vllm.model.moe_model import open_model
from mcmoe_vllm.model.runner import final_hidden

PASSES, RATE = 2, 1e-2


@pytest.fixture(scope="module")
def quantized(tiny_models, tmp_path_factory, calibration_text):
    """A 16-bit model, its 2-bit checkpoint, windows, and the 16-bit model's states of them."""
    source, output = tiny_models("mixtral"), tmp_path_factory.mktemp("quantized") / "out"
    quantize(
        QuantizeOptions(
            str(source), str(output), bits=2, calibration=str(calibration_text), samples=8,
            sequence_length=128, recipe="paper",
        )
    )  # fmt: skip
    windows = torch.randint(0, 8192, (24, 64), generator=torch.Generator().manual_seed(0))
    base = open_model(open_checkpoint(source), "cpu")
    return open_checkpoint(output), windows, final_hidden(base, windows)


def finetune(quantized, rate=RATE, teacher=None):
    checkpoint, windows, states = quantized
    loaded = open_model(checkpoint, "cpu")
    return finetune_model(loaded, windows, teacher or states, passes=PASSES, rate=rate, seed=0)


def test_finetuning_brings_held_out_windows_closer_to_the_16_bit_model(quantized):
    found = finetune(quantized)
    assert found.after < 0.97 * found.before
    checkpoint = quantized[0]
    stored = checkpoint.read(list(found.tensors))
    for name, tensor in found.tensors.items():
        assert tensor.shape == stored[name].shape
        if name.endswith("weight_scale"):
            (scale, zero), before = (unpack_scale(t, 2) for t in (tensor, stored[name]))
            assert torch.equal(zero, before[1])  # zeros stay, whatever the width makes of them
            assert torch.equal(scale, scale.bfloat16().float()) and (scale > 0).all()
        if name.endswith(".scales"):
            assert stored[name].dtype == torch.float16
            assert not torch.equal(tensor.to(torch.float16), stored[name])
            assert torch.equal(tensor, tensor.bfloat16().float())
    kinds = {name.split(".")[-2] for name in found.tensors}
    linears = {"q_proj", "k_proj", "v_proj", "o_proj"}
    others = {"w1", "w2", "w3", "gate", "input_layernorm", "post_attention_layernorm"}
    assert kinds == others | linears


def test_its_divergence_is_that_of_the_evaluation(quantized):
    checkpoint, windows, states = quantized
    loaded = open_model(checkpoint, "cpu")
    held = [i for i in range(len(windows)) if i % HELD_OUT == HELD_OUT - 1]
    hidden = torch.cat(final_hidden(loaded, windows))[held]
    teacher = torch.cat(states)[held]
    expected = mean_divergences(loaded, [teacher], [[hidden]])[0]
    assert finetune(quantized, rate=1e-9).before == pytest.approx(expected, rel=1e-4)


def test_gradients_through_recomputed_layers_are_those_of_the_whole_model(quantized):
    """One step of descent changes the loss as the recomputed gradient promises."""
    # Few tokens, short steps: none may move one of them to another expert, where the loss jumps.
    quantized = first_windows(quantized, 8)
    checkpoint, windows, states = quantized
    losses = []
    for rate in (1e-6, 3e-6):
        seen = []
        loaded = open_model(checkpoint, "cpu", torch.float64)
        finetune_model(
            loaded, windows, states, passes=PASSES, rate=rate, seed=0,
            report=lambda step, steps, loss, seen=seen: seen.append(loss),
        )  # fmt: skip
        losses.append(sum(seen[len(seen) // 2 :]))
    # Adam's first steps follow the gradient's sign: three times the rate falls three times as far.
    still = sum_of_second_pass(quantized)
    assert (still - losses[1]) / (still - losses[0]) == pytest.approx(3, rel=0.2)


def first_windows(quantized, count):
    checkpoint, windows, states = quantized
    return checkpoint, windows[:count], list(torch.cat(states)[:count].split(1))


def sum_of_second_pass(quantized):
    checkpoint, windows, states = quantized
    seen = []
    finetune_model(
        open_model(checkpoint, "cpu", torch.float64), windows, states, passes=PASSES,
        rate=0.0, seed=0, report=lambda step, steps, loss: seen.append(loss),
    )  # fmt: skip
    return sum(seen[len(seen) // 2 :])


def test_nothing_changes_where_there_is_nothing_to_gain(quantized):
    checkpoint, windows, _ = quantized
    own = final_hidden(open_model(checkpoint, "cpu"), windows)
    found = finetune(quantized, teacher=own)
    assert found.tensors == {} and found.after == found.before


def test_steps_that_lead_astray_are_taken_back(quantized):
    found = finetune(quantized, rate=3.0)
    assert found.tensors == {} and found.after == found.before


@pytest.mark.parametrize(
    "best, kept, tried", [(1.0, 1.0, 2), (0.3, 0.25, 4), (0.01, 0.0, 4), (-1.0, 0.0, 4)]
)
def test_steps_that_are_too_long_are_shortened(best, kept, tried):
    """A parabola over the share of the way, with its least value at `best`."""
    moves, seen = [torch.tensor([2.0]), torch.tensor([[4.0, -4.0]])], []

    def measure():
        share = float(moves[0]) / 2
        seen.append(share)
        return (share - best) ** 2

    after = shorten(moves, best**2, measure)
    assert after == pytest.approx((kept - best) ** 2) and len(seen) == tried
    assert moves[0].tolist() == [2 * kept] and moves[1].tolist() == [[4 * kept, -4 * kept]]


def test_gradients_of_the_first_layer_are_those_of_small_steps(quantized):
    """Through every layer behind it: a gradient that skips them points elsewhere."""
    checkpoint, windows, states = first_windows(quantized, 2)
    student = Student(open_model(checkpoint, "cpu", torch.float64))
    teacher = [state for block in states for state in block]
    student.divergence(windows, teacher, True)
    move = student.moves[0]  # of a norm in layer 0
    direction, slope = move.grad / move.grad.norm(), float(move.grad.norm())
    ends = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            move += step * direction
        ends.append(student.divergence(windows, teacher, False))
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=0.02)
