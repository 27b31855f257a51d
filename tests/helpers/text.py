"""Text that no change of this project changes: modules of Python's standard library."""

import json
import sysconfig
from pathlib import Path

CALIBRATION = ("argparse", "calendar", "heapq", "shlex", "statistics", "textwrap")
EVALUATION = ("difflib", "fractions", "optparse", "tempfile")


def write_text(file: Path, modules: tuple[str, ...]) -> Path:
    """Write a document for each module, as .jsonl."""
    folder = Path(sysconfig.get_path("stdlib"))
    documents = [(folder / f"{m}.py").read_text(encoding="utf-8") for m in modules]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return file
