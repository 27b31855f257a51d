"""Compress, check and serve a made-up architecture in a made-up format: `program.py FOLDER TEXT`.

Prints the largest difference between the served model's log-probabilities and those of the
compressor's own run of the checkpoint, both in float32.
"""

import json
import shutil
import sys
from pathlib import Path

import orchard
import torch

from mcmoe_kernels import formats
from mcmoe_kernels.formats.format import find
from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.compress.pipeline import quantize
from mcmoe_vllm.inspection import inspect_checkpoint
from mcmoe_vllm.model.moe_model import open_model
from mcmoe_vllm.model.runner import final_hidden

ROOT = Path(__file__).parents[3]
FORMAT = 6  # "mirrored" of tests/kernels/made_up


def main() -> None:
    folder, text = Path(sys.argv[1]), sys.argv[2]
    formats.__path__.append(str(ROOT / "tests" / "kernels" / "made_up"))
    formats.discover()
    orchard.register()
    source, output = folder / "orchard", folder / "compressed"
    orchard.save(
        source, hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=8192,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "examples" / "mixtral-6m" / name, source / name)
    quantize(
        QuantizeOptions(
            str(source), str(output), bits=FORMAT, candidate_bits=(FORMAT,), group_size=32,
            calibration=text, samples=2, sequence_length=64, finetune_passes=0,
        )
    )  # fmt: skip
    found = inspect_checkpoint(output, check=True)
    prompt = torch.randint(2, 8192, (1, 48), generator=torch.Generator().manual_seed(0))
    own, served = run(output, prompt), serve(output, prompt)
    result = {
        "format": find(FORMAT).name,
        "widths": sorted({w for pair in found.bits.values() for row in pair for w in row}),
        "code_bits": found.code_bits,
        "difference": float((own - served).abs().max()),
        "spread": float(own.std()),
    }
    print("RESULT " + json.dumps(result), flush=True)


def run(folder: Path, prompt: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token but the first, by the compressor."""
    model = open_model(open_checkpoint(folder), "cpu")
    (logits,) = model.logits(final_hidden(model, prompt))
    return logits[:-1].log_softmax(-1).gather(1, prompt[0, 1:, None])[:, 0]


def serve(folder: Path, prompt: torch.Tensor) -> torch.Tensor:
    """The same by vLLM."""
    from vllm import LLM, SamplingParams

    ids = prompt[0].tolist()
    llm = LLM(
        str(folder), dtype="float32", enforce_eager=True, max_model_len=128,
        enable_prefix_caching=False, distributed_executor_backend="uni",
        additional_config={"cpu_weight_cache_gib": 0},
    )  # fmt: skip
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    (output,) = llm.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
    return torch.tensor([output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))])


if __name__ == "__main__":
    main()
