"""Time of one call on the GPU: replays of a CUDA graph with a cold L2 cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from layers import Route

FLUSH_BYTES = 1 << 28


@dataclass(frozen=True)
class Timing:
    """Microseconds. median: the mean over the routes of each one's median."""

    median: float
    p20: float
    p80: float


_buffer: torch.Tensor | None = None


def flush(how: str) -> None:
    """Fill the L2 cache with other data. read: clean lines, as another layer's weights leave it.
    write: dirty lines, which the next kernel's reads must wait to see written back."""
    global _buffer
    if _buffer is None:
        _buffer = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64, device="cuda")
    _buffer.sum() if how == "read" else _buffer.zero_()


def time_call(
    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object],
    x: torch.Tensor,
    routes: Sequence[Route],
    repeats: int,
    how: str = "read",
) -> Timing:
    """call(x, topk_weights, topk_ids) on routes of one shape."""
    weights, ids = routes[0].topk_weights.clone(), routes[0].topk_ids.clone()
    for _ in range(2):
        call(x, weights, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(x, weights, ids)
    medians, everything = [], []
    for route in routes:
        weights.copy_(route.topk_weights)
        ids.copy_(route.topk_ids)
        graph.replay()
        events = []
        for _ in range(repeats):
            flush(how)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        times = sorted(begin.elapsed_time(end) * 1e3 for begin, end in events)
        medians.append(times[len(times) // 2])
        everything += times
    everything.sort()
    at = lambda share: everything[int(share * (len(everything) - 1))]  # noqa: E731
    return Timing(sum(medians) / len(medians), at(0.2), at(0.8))


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, read and written counted."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source))


def matrix_peak() -> float:
    """Floating-point operations per second of a bfloat16 product of 8192 x 8192."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / _seconds(lambda: a @ b)


def _seconds(call: Callable[[], object], repeats: int = 10) -> float:
    for _ in range(3):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    return sorted(times)[repeats // 2] / 1e3
