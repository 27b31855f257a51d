"""Peak memory is one layer's, however deep the model is."""

import json
import subprocess
import sys

import pytest

from tests.conftest import make_tiny_model

# One layer is 26 MiB in 16 bits: 12 more of them would show as 310 MiB.
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8}
LAYER_BYTES = 2 * (8 * 3 * 512 * 1024 + 3 * 512 * 512)

PROGRAM = """
import json, sys
from mcmoe_vllm.pipeline import QuantizeOptions, quantize
model, output, text = sys.argv[1:]
result = quantize(QuantizeOptions(model=model, output=output, calibration=text, bits=2.0,
                                  candidate_bits=(2,), tuning_passes=0, samples=4,
                                  sequence_length=128, method="rtn"))
print(json.dumps({"peak": result["peak_rss_bytes"], "bytes": result["bytes"]["original"]}))
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth(tmp_path, calibration_text):
    peaks = {}
    for layers in (8, 20):
        model = make_tiny_model(tmp_path / f"model-{layers}", "mixtral", layers=layers, **WIDE)
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM, model, tmp_path / f"out-{layers}", calibration_text],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[layers] = json.loads(process.stdout.splitlines()[-1])
        print(layers, "layers", peaks[layers])
    grown = peaks[20]["peak"] - peaks[8]["peak"]
    assert peaks[20]["bytes"] - peaks[8]["bytes"] == pytest.approx(12 * LAYER_BYTES, rel=0.01)
    # 12 layers held would add their bytes at least; names, hashes and the allocator's unevenness
    # have added less than 3 layers' to deeper models.
    assert grown < 3 * LAYER_BYTES
