"""JSON files and the disk: read warily, written whole or not at all, refused in one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcmoe_vllm.errors import UserError


def read_json(path: str | os.PathLike[str]) -> Any:
    """A JSON file's content. Raises UserError if it is missing, no UTF-8 or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, a JSON file is needed") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8: {e}") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not valid JSON: {e}") from None
    except RecursionError:
        raise UserError(f"{path} is not usable JSON: it is nested too deeply") from None


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON beside `path`, flush it to the disk and rename: never half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def check_version(version: Any, source: str, newest: int) -> None:
    if not is_integer(version) or version < 1:
        raise UserError(f"{source}: format_version is {version!r}, needs an integer from 1")
    if version > newest:
        raise UserError(
            f"{source} has format_version {version}, this mcmoe-vllm reads up to {newest}: "
            f"upgrade with pip install -U mcmoe-vllm"
        )


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@contextmanager
def explain_os_errors(action: str) -> Iterator[None]:
    """Turn a full disk or a refused write into one sentence (UserError)."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{action} failed: {e.strerror or e} ({e.filename or 'no file'})") from e
    except Exception as e:  # safetensors reports I/O errors through its own class
        if type(e).__name__ == "SafetensorError":
            raise UserError(f"{action} failed: {e}") from e
        raise


def require_parent(path: Path) -> None:
    """Raises UserError if no file can be made in the folder of `path`."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{parent}, the folder for {path.name}, does not exist; create it first")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent}, the folder for {path.name}, is not writable")
