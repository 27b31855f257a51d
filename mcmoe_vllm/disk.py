"""Files and the disk: read warily, written whole or not at all, refused in one sentence."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mcmoe_vllm.errors import UserError, reason_of

MOST_JSON_BYTES = 128 << 20  # several times the manifest of 60 layers of 256 experts
NAME_LENGTH = 32  # of a file's name in that of its unfinished twin, which may not be too long
PARTIAL = re.compile(r"\.(.{1,32})\.[0-9a-f]{16}\.partial", re.DOTALL)
StrPath = str | os.PathLike[str]


# Reading


def require_regular(path: StrPath, most_bytes: int | None = None) -> int:
    """The bytes of a regular file. For files that a library opens; others: `open_regular`.

    Raises UserError for a file that is missing or larger than `most_bytes`, and for all that may
    never answer or never end: a folder, a pipe, a device.
    """
    with _explain_reading(path):
        found = os.stat(path)
    return _require_regular(path, found, most_bytes)


def open_regular(path: StrPath, most_bytes: int | None = None) -> BinaryIO:
    """A regular file, opened for reading. Raises UserError like `require_regular`, and for a file
    that may not be read."""
    require_regular(path, most_bytes)  # opening a device can have effects of its own
    with _explain_reading(path):
        # A pipe that took its place in between is not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(descriptor), most_bytes)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_json(path: StrPath, *, finite: bool = True) -> Any:
    """A JSON file's content. finite: whether a number that JSON cannot hold is refused.

    Raises UserError if it cannot be read, is no UTF-8, no JSON, or larger than MOST_JSON_BYTES.
    """
    with open_regular(path, MOST_JSON_BYTES) as f, _explain_reading(path):
        content = f.read(MOST_JSON_BYTES + 1)  # files of /proc do not tell their size
    if len(content) > MOST_JSON_BYTES:
        _refuse_size(path, len(content), MOST_JSON_BYTES)
    checks: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _finite}
    try:
        return json.loads(content.decode("utf-8"), **(checks if finite else {}))
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8: {e}") from None
    except RecursionError:
        raise UserError(f"{path} is not usable JSON: it is nested too deeply") from None
    except ValueError as e:  # of json, and of int for too many digits
        raise UserError(f"{path} is not valid JSON: {e}") from None


# Writing


def is_stream(path: StrPath) -> bool:
    """Whether a result at `path` is written into what is there: a pipe, a terminal, a device such
    as /dev/null, or this program's standard output. All else is a file that takes its place.

    Raises UserError for what is neither: a folder, a disk, a socket, a link.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise UserError(f"{path} is a link that leads nowhere; name a file") from None
        return False
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be written: {reason_of(e)}") from None
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path} is a folder; name a file in it")
    if stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode) or is_stdout(path):
        return True
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is a disk or a socket; name a file")
    if os.path.islink(path):
        # Replaced, it would lead nowhere any more; followed, it might be a trap of others.
        raise UserError(f"{path} is a link to {os.path.realpath(path)}; name that file itself")
    return False


def is_stdout(path: StrPath) -> bool:
    """Whether a path is what this program's standard output leads to."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except (OSError, ValueError):
        return False


@contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """A new file to write to; then it is flushed to the disk and takes the place of `path`, with
    the mode of what was there, or as the umask says.

    Whoever reads `path` sees the old content or the new, never half of it. If the block fails,
    nothing is left behind. What `is_stream` is written to in the end. Raises UserError as that.
    """
    path = Path(path)
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "result"
            _pour(Path(folder) / "result", path)
        return
    # Random and exclusive: in a folder of several users nobody can put a link in its way.
    temporary = path.with_name(f".{path.name[:NAME_LENGTH]}.{secrets.token_hex(8)}.partial")
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = os.stat(path if path.exists() else descriptor).st_mode
        os.close(descriptor)
        yield temporary
        # Who wrote it may have made it anew, as safetensors does, readable for its owner alone.
        temporary.chmod(stat.S_IMODE(mode))
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_partial(name: str, of: str | None = None) -> bool:
    """Whether a file's name is that of a file which a killed process was writing, `of` by name."""
    found = PARTIAL.fullmatch(name)
    return found is not None and (of is None or found[1] == of[:NAME_LENGTH])


def write_json(path: StrPath, value: Any) -> None:
    """Write JSON, whole or not at all. Raises UserError for numbers that JSON cannot hold."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as f:
        try:
            json.dump(value, f, indent=2, allow_nan=False)
        except ValueError as e:
            raise UserError(f"{path} is not written, a number is NaN or infinite: {e}") from None
        f.write("\n")


def flush_folder(path: Path) -> None:
    """What was renamed in a folder stays so when the power fails."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explain_os_errors(action: str) -> Iterator[None]:
    """Turn a full disk or a refused write into one sentence (UserError).

    A pipe that nobody reads any more is no such error: it ends the program, as it ends others.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        raise UserError(f"{action} failed: {e.strerror or e} ({e.filename or 'no file'})") from e
    except Exception as e:  # safetensors reports I/O errors through its own class
        if type(e).__name__ == "SafetensorError":
            raise UserError(f"{action} failed: {e}") from e
        raise


# What JSON holds


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


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is too large a number")
    return value


@contextmanager
def _explain_reading(path: StrPath) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise UserError(f"{path} cannot be read: {reason_of(e)}") from None


def _require_regular(path: StrPath, found: os.stat_result, most_bytes: int | None) -> int:
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path} is a folder, a file is needed")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is a pipe or a device, a file is needed; save its content first")
    if most_bytes is not None and found.st_size > most_bytes:
        _refuse_size(path, found.st_size, most_bytes)
    return found.st_size


def _refuse_size(path: StrPath, found: int, most: int) -> NoReturn:
    raise UserError(f"{path} has {found:,} bytes or more, at most {most:,} are read")


def _pour(source: Path, path: Path) -> None:
    """Write a file's content into what is at `path`."""
    if is_stdout(path):
        if sys.stdout is not None:
            sys.stdout.flush()
        # The same open file: behind what was printed, and never cut.
        descriptor = os.dup(1)
    else:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOCTTY)
    with source.open("rb") as content, os.fdopen(descriptor, "wb") as out:
        shutil.copyfileobj(content, out)
