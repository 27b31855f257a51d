"""What `mcmoe quantize` writes for some models, as the SHA-256 of every shard.

    python tests/golden/hash_checkpoints.py TEXT.jsonl MODEL... > before.json

Two commits that print the same wrote the same bytes. Compare on one machine, and with one number
of threads: sums over tokens depend on both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPES = ("best", "paper")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="calibration text")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--flags", default="", help="further flags of `mcmoe quantize`")
    parsed = parser.parse_args()
    found = {}
    for model in parsed.models:
        for recipe in RECIPES:
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "compressed"
                command = [sys.executable, "-m", "mcmoe_vllm.cli", "quantize", model]
                command += ["-o", str(output), "--recipe", recipe, "--calibration", parsed.text]
                subprocess.run([*command, *parsed.flags.split()], check=True, stdout=sys.stderr)
                found[f"{Path(model).name} {recipe}"] = {
                    shard.name: hashlib.sha256(shard.read_bytes()).hexdigest()
                    for shard in sorted(output.glob("*.safetensors"))
                }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
