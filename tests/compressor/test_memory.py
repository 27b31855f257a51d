"""Peak memory is one layer's, however deep the model is."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import make_tiny_model

# One layer is 26 MiB in 16 bits: 4 more of them would show as 104 MiB.
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8}
LAYER_BYTES = 2 * (8 * 3 * 512 * 1024 + 3 * 512 * 512)

PROGRAM = """
import json, sys
from dataclasses import replace
from mcmoe_vllm.compress.options import QuantizeOptions
from mcmoe_vllm.compress.pipeline import quantize
from mcmoe_vllm.recipes import BEST
model, output, text = sys.argv[1:]
result = quantize(QuantizeOptions(model=model, output=output, calibration=text, bits=2.0,
                                  candidate_bits=(2,), finetune_passes=0, samples=4,
                                  sequence_length=128, method="rtn",
                                  recipe=replace(BEST, error_method="minmax")))
print(json.dumps({"peak": result["peak_rss_bytes"], "bytes": result["bytes"]["original"]}))
"""


# Freed tensors go back at once; otherwise the peaks of two equal runs differ by four layers.
EXACT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "1"}


@pytest.mark.nightly
def test_peak_memory_does_not_grow_with_depth(tmp_path, calibration_text):
    peaks = {}
    for layers in (2, 6):
        model = make_tiny_model(tmp_path / f"model-{layers}", "mixtral", layers=layers, **WIDE)
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM, model, tmp_path / f"out-{layers}", calibration_text],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | EXACT,
        )
        peaks[layers] = json.loads(process.stdout.splitlines()[-1])
        print(layers, "layers", peaks[layers])
    grown = peaks[6]["peak"] - peaks[2]["peak"]
    assert peaks[6]["bytes"] - peaks[2]["bytes"] == pytest.approx(4 * LAYER_BYTES, rel=0.01)
    # 4 layers held would add their bytes at least; two equal runs differ by less than one layer's.
    assert grown < 4 * LAYER_BYTES / 3
