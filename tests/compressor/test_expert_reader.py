"""Experts come from their checkpoint once a phase, whoever asks how often."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from mcmoe_kernels.formats import packing
from mcmoe_vllm.checkpoint import manifest
from mcmoe_vllm.checkpoint.files import open_checkpoint, read_config
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.compress.pipeline import quantize
from mcmoe_vllm.model import expert_reader
from mcmoe_vllm.model.agreement import open_layout
from mcmoe_vllm.model.expert_reader import ExpertsOnDevice, LayerExperts, StoredExperts
from mcmoe_vllm.model.experts import Expert, gated, run_expert
from mcmoe_vllm.model.packed import PackedExperts
from tests.helpers.checkpoints import make_checkpoint


class Counting:
    """Expert 1 was dropped."""

    def __init__(self):
        self.reads = Counter()

    def read(self, layer, expert):
        self.reads[layer, expert] += 1
        return None if expert == 1 else Expert(torch.ones(4, 2), torch.full((2, 2), float(expert)))


def test_an_open_layer_reads_each_expert_once():
    reader = Counting()
    layer = LayerExperts(reader, 3)
    for _ in range(2):
        assert [layer(e) is None for e in range(3)] == [False, True, False]
    assert layer.on(torch.device("cpu"), torch.float64)(2).w2.dtype == torch.float64
    assert reader.reads == {(3, 0): 1, (3, 1): 1, (3, 2): 1}
    layer.release()
    assert float(layer(2).w2[0, 0]) == 2 and reader.reads[3, 2] == 2


def test_what_there_is_no_room_for_is_read_again(monkeypatch):
    monkeypatch.setattr(expert_reader, "KEPT_BYTES", 40)  # of 48 that an expert takes
    reader = Counting()
    layer = LayerExperts(reader, 0)
    assert layer(0) is not None and layer(0) is not None and layer(1) is layer(1) is None
    assert reader.reads == {(0, 0): 2, (0, 1): 1}


def test_gate_lies_above_up_as_the_checkpoint_has_them(tiny_models):
    checkpoint = open_checkpoint(tiny_models("mixtral"))
    reader = StoredExperts(checkpoint, open_layout(checkpoint, None))
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    stored = checkpoint.read([f"{prefix}.{m}.weight" for m in ("w1", "w3", "w2")])
    gate, up, down = stored.values()
    expert = reader.read(1, 2)
    assert torch.equal(expert.w13, torch.cat([gate, up])) and torch.equal(expert.w2, down)
    there = ExpertsOnDevice(reader, torch.device("cpu"), torch.float32).read(1, 2)
    assert there.w13.dtype == torch.float32 and torch.equal(there.w2, down.float())


def test_rows_in_pairs_and_biases_give_what_transformers_computes(tiny_models):
    """Of a family that keeps both, all experts in one tensor, transposed."""
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(tiny_models("gpt_oss"))
    layout = open_layout(checkpoint, None)
    found = StoredExperts(checkpoint, layout).read(1, 2)
    assert found.w13.dtype == found.w13_bias.dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    experts = model.model.layers[1].mlp.experts
    x = 4 * torch.randn(7, 128, generator=torch.Generator().manual_seed(0))  # beyond the limit
    ids = torch.full((7, 1), 2)
    with torch.no_grad():
        expected = experts(x, ids, torch.ones(7, 1))
    got = run_expert(x, found.to(x.device, x.dtype), layout.skeleton.activation(1))
    torch.testing.assert_close(got, expected)
    wrong = replace(found, w13_bias=-found.w13_bias).to(x.device, x.dtype)
    other = run_expert(x, wrong, layout.skeleton.activation(1))
    assert (other - expected).abs().max() > 1e-2 * expected.abs().max()


def test_a_compressed_expert_has_gates_above_ups_too(tmp_path):
    folder = make_checkpoint(tmp_path / "model", "gpt_oss", widths="0321", dense_bits=16)
    checkpoint = open_checkpoint(folder)
    quantization = read_config(checkpoint)
    layout = open_layout(checkpoint, quantization)
    reader, place = PackedExperts(checkpoint, layout, quantization), "model.layers.1.mlp.experts"
    assert reader.read(1, 0) is None
    found = reader.read(1, 2)
    stored = checkpoint.read(checkpoint.names(place))
    w13, w2 = (
        packing.dequantize(
            stored[f"{place}.2.{m}_weight_packed"], stored[f"{place}.2.{m}_weight_scale"], 2
        )
        for m in ("w13", "w2")
    )
    bias = stored[f"{place}.gate_up_proj_bias"][2]
    assert torch.equal(found.w13, torch.cat([w13[::2], w13[1::2]])) and torch.equal(found.w2, w2)
    assert torch.equal(found.w13_bias, torch.cat([bias[::2], bias[1::2]]))
    assert torch.equal(found.w2_bias, stored[f"{place}.down_proj_bias"][2])


def test_biases_are_added():
    generator = torch.Generator().manual_seed(0)
    w13, w2, b13, b2, x = (
        torch.randn(*shape, generator=generator) for shape in ((6, 4), (4, 3), (6,), (4,), (5, 4))
    )
    got = run_expert(x, Expert(w13, w2, b13, b2), gated(torch.nn.functional.silu))
    gate, up = (x @ w13.t() + b13).chunk(2, dim=1)
    torch.testing.assert_close(got, (torch.nn.functional.silu(gate) * up) @ w2.t() + b2)


@pytest.mark.slow
def test_a_job_reads_an_expert_once_a_phase_and_hashes_a_shard_once(
    tiny_models, tmp_path, calibration_text, monkeypatch
):
    reads, hashes = Counter(), Counter()
    read, file_sha256 = StoredExperts.read, manifest.file_sha256

    def counted(self, layer, expert):
        reads[layer, expert] += 1
        return read(self, layer, expert)

    def hashed(path):
        hashes[path.name] += 1
        return file_sha256(path)

    monkeypatch.setattr(StoredExperts, "read", counted)
    monkeypatch.setattr(manifest, "file_sha256", hashed)
    quantize(
        QuantizeOptions(
            str(tiny_models("mixtral")), str(tmp_path / "out"), bits=2.5, candidate_bits=(2, 3),
            calibration=str(calibration_text), samples=4, sequence_length=64,
        )
    )  # fmt: skip
    assert set(reads.values()) == {2}  # measured, quantized: probes and exact states read no more
    assert len(reads) == 2 * 4 and set(hashes.values()) == {1} and len(hashes) == 3
