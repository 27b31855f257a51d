"""A compressed model behind `vllm serve`: the API, the flags, and what a user reads on failure."""

import json
import shutil
import time

import pytest
import torch

from mcmoe_kernels.pruning import pair_counts
from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.checkpoint.format import QuantizationConfig
from mcmoe_vllm.model.moe_model import open_model
from mcmoe_vllm.model.runner import final_hidden
from mcmoe_vllm.pruning.table import Pruning, read_table

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
COMPILED = ("--quantization", "mcmoe", "--chat-template", CHAT_TEMPLATE)
EAGER = ("--enforce-eager", "--load-format", "mcmoe")
ROUTED, PRUNED = "mcmoe_routed_pairs_total", "mcmoe_pruned_pairs_total"


def assert_counts_of(server, folder, prompt, slack):
    """Before the first request nothing is counted, neither warming up nor padding; then exactly the
    prompt's pairs, of which are pruned as many as by the definition, give or take `slack`."""
    nothing = {(name, layer): 0 for name in (ROUTED, PRUNED) for layer in range(4)}
    assert wait_for(server, bool) == nothing
    server.post("/v1/completions", prompt=prompt, max_tokens=1)
    counts = wait_for(server, lambda counts: counts[ROUTED, 3] > 0)
    checkpoint = open_checkpoint(folder)
    quantization = QuantizationConfig.from_dict(checkpoint.config["quantization_config"])
    found = {}

    class Watch(Pruning):
        def __call__(self, layer, topk_weights, topk_ids):
            weights, ids = super().__call__(layer, topk_weights, topk_ids)
            found[layer] = pair_counts(topk_ids, ids).tolist()
            return weights, ids

    ratios = read_table(quantization).layer_ratios()
    final_hidden(open_model(checkpoint), torch.tensor([prompt]), Watch(ratios))
    for layer, (routed, pruned) in found.items():
        assert counts[ROUTED, layer] == routed == 2 * len(prompt)
        assert abs(counts[PRUNED, layer] - pruned) <= slack
    assert sum(pruned for _, pruned in found.values()) > len(prompt)


def wait_for(server, true):
    """The server's counts, as soon as they are `true`: they are published twice a second."""
    end = time.monotonic() + 30
    while not true(counts := server.counts()) and time.monotonic() < end:
        time.sleep(0.1)
    return counts


class TestCompiledWithTheFlag:
    """torch.compile on, --quantization mcmoe, vLLM's default loader, online pruning."""

    @pytest.fixture
    def server(self, serve, calibrated):
        return serve(calibrated, *COMPILED)

    def test_pairs_of_requests_are_counted(self, server, calibrated, prompts):
        assert_counts_of(server, calibrated, prompts[0][:200], slack=12)  # bfloat16: near ties

    def test_completions(self, server):
        answer = server.post("/v1/completions", prompt="The file", max_tokens=8, temperature=0)
        assert answer["usage"]["completion_tokens"] == 8 and answer["choices"][0]["text"].strip()
        again = server.post("/v1/completions", prompt="The file", max_tokens=8, temperature=0)
        assert again["choices"][0]["text"] == answer["choices"][0]["text"]

    def test_a_batch_of_prompts(self, server):
        prompts = ["The file", "If the", "This option", "import os", "A dictionary is", "See also"]
        answer = server.post("/v1/completions", prompt=prompts, max_tokens=24, temperature=0)
        assert [c["index"] for c in answer["choices"]] == list(range(6))
        assert all(c["text"] for c in answer["choices"])

    def test_chat(self, server):
        answer = server.post(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": "What is a file?"}],
            max_tokens=8,
        )
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["usage"]["completion_tokens"] > 0

    def test_streaming_gives_the_same_text(self, server):
        body = {"prompt": "The file", "max_tokens": 12, "temperature": 0}
        whole = server.post("/v1/completions", **body)["choices"][0]["text"]
        with server.stream("/v1/completions", stream=True, **body) as response:
            lines = [line.decode().strip() for line in response if line.startswith(b"data: ")]
        assert lines[-1] == "data: [DONE]" and len(lines) > 3
        pieces = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]]
        assert "".join(pieces) == whole

    def test_the_plugin_says_once_what_it_does(self, server):
        log = server.log()
        assert log.count("true bits/weight (experts), compute path = CPU") == 1
        assert "mcmoe 0.1.0: 4 MoE layers, " in log


@pytest.mark.nightly
class TestEagerWithTheCheckedLoader:
    """--enforce-eager, --load-format mcmoe; config.json alone says that it is mcmoe. Two processes
    answer, and either knows all counts."""

    @pytest.fixture
    def server(self, serve, calibrated):
        return serve(calibrated, *EAGER, "--dtype", "float32", "--api-server-count", "2")

    def test_pairs_of_requests_are_counted(self, server, calibrated, prompts):
        assert_counts_of(server, calibrated, prompts[0][:200], slack=0)

    def test_completions(self, server):
        answer = server.post("/v1/completions", prompt="The file", max_tokens=8, temperature=0)
        assert answer["usage"]["completion_tokens"] == 8

    def test_the_loader_reports(self, server):
        assert "their SHA-256, dtypes and shapes are the manifest's, peak" in server.log()
        assert server.log().count("compute path = CPU") == 1


@pytest.mark.nightly
def test_a_corrupted_shard_is_named(compressed_example, tmp_path, refused_start):
    """What the plugin refuses is in the log that a user reads, whatever it is."""
    damaged = tmp_path / "damaged"
    shutil.copytree(compressed_example, damaged)
    shard = sorted(damaged.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    log = refused_start(damaged, *EAGER)
    assert "1 tensor(s) are not what mcmoe_manifest.json says" in log and shard.name in log
