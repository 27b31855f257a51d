"""The main memory of this process."""

import ctypes
import resource
import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    try:
        # Unlike getrusage, whose figure a process inherits from the one that started it.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Give what was freed back to the system, where the C library can (glibc).

    It keeps the room of freed tensors otherwise, in pieces that the next layer's may not fit: a
    model of 32 layers then needs a sixth more than one of 8.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
