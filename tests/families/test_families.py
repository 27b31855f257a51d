"""Any family is read: layer by layer as transformers runs it whole, and compressed with what its
layers make of their experts."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.compress.pipeline import quantize
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.evaluate.perplexity import evaluate
from mcmoe_vllm.inspection import inspect_checkpoint
from mcmoe_vllm.model.architectures import REFUSED
from mcmoe_vllm.model.moe_model import open_model
from mcmoe_vllm.model.runner import final_hidden
from tests.conftest import EXAMPLE_MODEL
from tests.families.families import FAMILIES, save_family

# A layer of each kind: experts added, scaled, normalised behind; fused on disk, also in pairs of
# rows; latent attention.
FAST = ("deepseek_v3", "gemma4", "gpt_oss", "granitemoe", "lfm2_moe", "qwen3_next")
EACH = [pytest.param(name, marks=[] if name in FAST else pytest.mark.nightly) for name in FAMILIES]


@pytest.fixture(scope="module")
def family(once):
    """family(name): its folder."""
    import transformers

    def get(name: str) -> Path:
        if FAMILIES[name].model_type not in transformers.CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} does not know it")
        return once(f"family-{name}", lambda folder: save_family(name, folder, EXAMPLE_MODEL))

    return get


@pytest.mark.parametrize("name", EACH)
def test_streamed_logits_equal_transformers(family, name):
    import transformers

    path = family(name)
    tokens = torch.arange(48).mul(37).remainder(500).add(3).view(2, 24)
    model = open_model(open_checkpoint(path), "cpu")
    logits = torch.stack(list(model.logits(final_hidden(model, tokens))))
    cls = getattr(transformers, FAMILIES[name].cls)
    whole = cls.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(tokens, use_cache=False).logits
    # Same weights, same operations, float32: sums in another order are all that differs.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "gemma4" else pytest.mark.nightly) for n in FAMILIES]
)
def test_it_is_compressed_and_pruned(family, name, tmp_path, calibration_text, evaluation_text):
    output = tmp_path / "out"
    quantize(
        QuantizeOptions(
            model=str(family(name)),
            output=str(output),
            calibration=str(calibration_text),
            bits=4,
            samples=4,
            sequence_length=64,
            group_size=64,
            dense_bits=16,  # the experts' part alone shows
            target_drop=0.1,
            finetune_passes=0,
        )
    )
    assert inspect_checkpoint(output, check=True).checked
    found = evaluate(
        str(output),
        str(evaluation_text),
        against=str(family(name)),
        windows=4,
        sequence_length=64,
        pruning="off",
    )
    coarse = evaluate(str(output), str(evaluation_text), windows=4, sequence_length=64, pruning=0.1)
    assert found.kl < 0.1 and coarse.dropped_fraction == pytest.approx(0.1, abs=0.08)


def test_exchanged_matrices_would_show(family, tmp_path):
    """What the bound of the first test is worth: a layer's gates in the places of its ups."""
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(family("deepseek_v3"), tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    for expert in range(8):
        gate, up = (f"model.layers.1.mlp.experts.{expert}.{n}_proj.weight" for n in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.arange(48).mul(37).remainder(500).add(3).view(2, 24)
    logits = []
    for folder in (path, family("deepseek_v3")):
        model = open_model(open_checkpoint(folder), "cpu")
        logits.append(torch.stack(list(model.logits(final_hidden(model, tokens)))))
    assert (logits[0] - logits[1]).abs().max() > 1e-4 * logits[1].abs().max()


@pytest.mark.parametrize("half", ["gate_up_proj", "down_proj"])
def test_a_missing_half_of_fused_experts_is_named(family, half, tmp_path):
    """Not read as experts that have tensors each, of which all would be missing."""
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(family("gemma4"), tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    name = f"model.layers.1.experts.{half}"
    del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"in 1 place:\n  - {name} is missing"):
        open_model(open_checkpoint(path), "cpu")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_supported_is_refused_with_the_reason(name, tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
    with pytest.raises(UserError, match="is not supported yet") as error:
        open_model(open_checkpoint(tmp_path))
    assert REFUSED[name] in str(error.value)
