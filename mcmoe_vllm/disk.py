"""JSON files and the disk: read warily, written whole or not at all, refused in one sentence."""

from __future__ import annotations

import json
import os
import secrets
import sys
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
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8: {e}") from None
    except RecursionError:
        raise UserError(f"{path} is not usable JSON: it is nested too deeply") from None
    except ValueError as e:  # of json, of int for too many digits, of open for a NUL in the name
        raise UserError(f"{path} is not valid JSON: {e}") from None


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file beside `path` to write to; then it is flushed to the disk and takes its place.

    Whoever reads `path` sees the old content or the new, never half of it. If the block fails,
    nothing is left behind.
    """
    path = Path(path)
    # Random and exclusive: in a folder of several users nobody can put a link in its way.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
        f.write("\n")


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


def is_number(value: Any) -> bool:
    """Whether it is a number of JSON's that a float can hold; NaN and infinity are none."""
    return (is_integer(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


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


def require_file(path: str | os.PathLike[str]) -> None:
    """Raises UserError if `path` is a folder or its folder takes no file: before the work, as the
    result would be lost."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    require_parent(Path(path))


def require_parent(path: Path) -> None:
    """Raises UserError if no file can be made in the folder of `path`."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{parent}, the folder for {path.name}, does not exist; create it first")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent}, the folder for {path.name}, is not writable")
