"""Compare kernels before and after a change, GPU or not: their code, and what ptxas says of them.

    python tests/kernels/compile_variants.py DEVICE CAPABILITY --all > before.jsonl
    (the same on the change)                                         > after.jsonl
    python benchmarks/kernels/compare_variants.py before.jsonl after.jsonl

Both list the same launches of one table in one order; with another Triton by PYTHONPATH, one pair a
version. Ends with 1 if a variant takes more registers or spills.
"""

import argparse
import json
import sys
from pathlib import Path

KEPT = ("kernel", "capability")
COMPARED = ("registers", "spilled_bytes", "shared_bytes", "ptx")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    given = parser.parse_args()
    before, after = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (given.before, given.after)
    )
    if [[r[k] for k in KEPT] for r in before] != [[r[k] for k in KEPT] for r in after]:
        print("the two list different launches", file=sys.stderr)
        return 2
    worse = changed = 0
    for old, new in zip(before, after, strict=True):
        values = {k: (old[k], new[k]) for k in COMPARED if old[k] != new[k]}
        if values:
            changed += 1
            worse += any(new[k] > old[k] for k in COMPARED[:2])
            print(*(new[k] for k in KEPT), *(f"{k} {a} -> {b}" for k, (a, b) in values.items()))
    print(f"{len(after)} variants, {changed} changed, {worse} with more registers or spills")
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
