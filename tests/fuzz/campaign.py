"""Thousands of damaged inputs, counted by reader and outcome.

    PYTHONPATH=.:kernels python -m tests.fuzz.campaign --count 5000 --processes 2 --json FILE

Each number is a case of its own, whatever the rest: `--first N --count 1` repeats one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

# Of ten cases so many; a compressed folder has the most readers.
SHARES = ("compressed",) * 6 + ("source",) * 2 + ("plan", "text")


def try_number(sound: Any, number: int) -> tuple[int, str, str, dict[str, str], list[str]]:
    from tests.fuzz.cases import FAMILIES

    family = SHARES[number % len(SHARES)]
    with tempfile.TemporaryDirectory() as scratch:
        case = FAMILIES[family](sound, Path(scratch), number)
    words = {reader: outcome.word for reader, outcome in case.outcomes.items()}
    return number, family, case.damage, words, case.faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop then")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", metavar="FILE")
    asked = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Who reads an endless file ends here, and not the machine.
    resource.setrlimit(resource.RLIMIT_DATA, (12 << 30, 12 << 30))
    import torch

    torch.set_num_threads(1)
    from tests.conftest import make_tiny_model
    from tests.fuzz.test_mutants import make_sound

    counts, faults, done = Counter[str](), [], 0
    with tempfile.TemporaryDirectory() as folder:
        source = make_tiny_model(Path(folder, "source"), "mixtral")
        text = Path(folder, "all.jsonl")
        text.write_text(json.dumps({"text": Path(json.__file__).read_text() * 4}) + "\n")
        sound = make_sound(source, text, Path(folder))
        numbers = range(asked.first, asked.first + asked.count)
        started = time.monotonic()  # making what is damaged may take longer than was asked for
        with multiprocessing.get_context("fork").Pool(asked.processes) as pool:
            for number, family, damage, words, wrong in pool.imap_unordered(
                partial(try_number, sound), numbers, chunksize=4
            ):
                done += 1
                counts.update(f"{reader}: {word}" for reader, word in words.items())
                faults += [[number, family, damage, line] for line in wrong]
                for line in wrong:
                    print(f"{number} {family} ({damage}): {line}", file=sys.stderr, flush=True)
                if time.monotonic() - started > asked.seconds:
                    pool.terminate()
                    break
    seconds = round(time.monotonic() - started)
    result = {"cases": done, "seconds": seconds, "counts": dict(counts), "faults": faults}
    if asked.json:
        Path(asked.json).write_text(json.dumps(result, indent=1))
    print(json.dumps({**result, "faults": len(faults)}, indent=1))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
