"""Does it matter whether windows begin with the token that begins a text (BOS)?

    python benchmarks/quality/bos.py MODEL --calibration A.jsonl --text B.jsonl

A model is compressed twice, calibrated on windows with and without BOS, and scored twice, on
windows with and without it. Windows keep their length: with BOS, their last token is left out.
Prints a line for each of the four, with the 16-bit model's figures on the same windows beside them.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch

from mcmoe_vllm.checkpoint.files import open_checkpoint
from mcmoe_vllm.compress import pipeline
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.evaluate.perplexity import compare
from mcmoe_vllm.model.moe_model import open_model
from mcmoe_vllm.model.runner import final_hidden
from mcmoe_vllm.model.text import load_tokenizer, strided_windows, window_length


def begin_with(bos: int, windows: torch.Tensor) -> torch.Tensor:
    """Windows [S, L] with BOS before them and without their last token."""
    return torch.cat([torch.full_like(windows[:, :1], bos), windows[:, :-1]], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--finetune-passes", type=int)
    arguments = parser.parse_args()
    base = open_model(open_checkpoint(arguments.model))
    tokenizer = load_tokenizer(arguments.model)
    bos, length = tokenizer.bos_token_id, window_length(base.config, None)
    without = strided_windows(arguments.text, tokenizer, arguments.windows, length)
    scored = {"without": without, "with": begin_with(bos, without)}
    hidden = {name: final_hidden(base, tokens) for name, tokens in scored.items()}
    read_windows = pipeline.read_windows
    print("calibrated  scored   perplexity  of 16 bits  loss difference (error)  KL")
    for calibrated in scored:
        if calibrated == "with":
            pipeline.read_windows = lambda *given: begin_with(bos, read_windows(*given))
        with tempfile.TemporaryDirectory() as folder:
            options = QuantizeOptions(
                arguments.model,
                Path(folder, "out"),
                bits=arguments.bits,
                calibration=arguments.calibration,
                samples=arguments.samples,
                finetune_passes=arguments.finetune_passes,
            )
            pipeline.quantize(options)
            compressed = open_model(open_checkpoint(options.output))
            for name, tokens in scored.items():
                found = compare(
                    compressed, final_hidden(compressed, tokens), base, hidden[name], tokens
                )
                print(
                    f"{calibrated:10}  {name:7}  {math.exp(found['loss']):10.4f}"
                    f"  {found['base_perplexity']:10.4f}"
                    f"  {found['loss_difference']:15.5f} ({found['paired_stderr']:.5f})"
                    f"  {found['kl']:.5f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
