"""How much main memory this process has needed."""

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
