"""How many pairs of token and expert were routed and pruned, by layer, on vLLM's /metrics.

    mcmoe_routed_pairs_total{layer="3"}    mcmoe_pruned_pairs_total{layer="3"}

A worker counts where it prunes. A thread writes its sums to a file of prometheus_client's
multiprocess mode, in a folder that the first process names in the environment and that its children
inherit; `export` lets the registry behind /metrics collect that folder. With several API servers
vLLM collects $PROMETHEUS_MULTIPROC_DIR instead, so the file then lies there.

Pairs that no request asked for are left out: padding has the id -1, and a forward pass without
attention metadata (profiling, warming up) adds to a row that nobody reads. While a CUDA graph is
captured nothing runs; its replays count. vLLM 0.26 gives padding that id only with
VLLM_USE_V2_MODEL_RUNNER=1 and VLLM_MOE_SKIP_PADDING=1; without, the rows that pad a graph's batch
count on a GPU, and so do the runs that prepare a capture. One rank counts for all that route the
same tokens, and it must share a file system with the API server.

Why not prometheus_client's own counters: they write files only if $PROMETHEUS_MULTIPROC_DIR is set
before they are made, and where that is set vLLM's /metrics shows its own metrics, too, from there,
without the process's. So `write_counts` writes the files.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mcmoe_kernels.pruning import pair_counts

# Name and help of each column of the counts; Prometheus appends _total to the name.
METRICS = (
    ("mcmoe_routed_pairs", "Pairs of token and expert that the router chose."),
    ("mcmoe_pruned_pairs", "Routed pairs that online pruning left out."),
)
FOLDER = "MCMOE_METRICS_DIR"
PREFIX = "mcmoe-metrics-"
TRIES = 8
PROMETHEUS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
PUBLISH_SECONDS = 0.5

_folder: tempfile.TemporaryDirectory[str] | None = None
_numbers = itertools.count()


def export() -> None:
    """Put what the workers will count on this process's /metrics; called once per process."""
    global _folder
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    if not os.path.isdir(os.environ.get(FOLDER, "")):
        remove_abandoned(Path(tempfile.gettempdir()))
        _folder = make_folder()
        os.environ[FOLDER] = _folder.name
    MultiProcessCollector(REGISTRY, path=os.environ[FOLDER])


def make_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder, locked for as long as this process or a forked child of its lives: the kernel
    lets the lock go with them, however they end."""
    for _ in range(TRIES):
        folder = tempfile.TemporaryDirectory(prefix=PREFIX)
        if _lock(Path(folder.name)) is not None and os.path.isdir(folder.name):
            return folder  # and the lock stays open
        folder.cleanup()  # another process took it for an abandoned one
    return tempfile.TemporaryDirectory(prefix=PREFIX)  # a file system without locks


def remove_abandoned(parent: Path) -> None:
    """Remove this user's folders whose processes were killed or left without cleaning up."""
    for folder in parent.glob(f"{PREFIX}*"):
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A lock on a folder of this user's; None if it is gone, or another process has the lock."""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(opened).st_uid == os.geteuid():
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return opened
    except OSError:
        pass
    os.close(opened)
    return None


class PruningCounts:
    """The sums of one engine's layers: int64 [layers + 1, 2] as METRICS, on the device that prunes;
    the last row is for runs that are no request's."""

    def __init__(self, layers: Sequence[int], device: torch.device) -> None:
        self.layers = tuple(layers)
        self.sums = torch.zeros(len(self.layers) + 1, 2, dtype=torch.int64, device=device)
        self._shown = self.sums
        if device.type != "cpu":  # a copy that the writing thread can read without the device
            self._shown = torch.zeros(self.sums.shape, dtype=torch.int64, pin_memory=True)
        self._last = -1

    def of_layer(self, layer: int) -> LayerCounts:
        place = self.layers.index(layer)
        self._last = max(self._last, place)
        return LayerCounts(self, place)

    def row(self, place: int) -> torch.Tensor:
        # What is captured runs when it is replayed, and then for requests.
        captured = self.sums.is_cuda and torch.cuda.is_current_stream_capturing()
        return self.sums[place if captured or not _is_dummy_run() else -1]

    def show(self, place: int) -> None:
        """Once a forward pass, behind its last layer."""
        if self._shown is not self.sums and place == self._last:
            self._shown.copy_(self.sums, non_blocking=True)

    def values(self) -> dict[int, tuple[int, int]]:
        """Layer -> pairs routed and pruned so far."""
        rows = self._shown[:-1].tolist()
        return {i: (row[0], row[1]) for i, row in zip(self.layers, rows, strict=True)}

    def publish(self) -> None:
        """Write the sums twice a second from now on, for as long as this object lives; nothing
        where no process named a folder."""
        file = counts_file()
        if file is None:
            return
        arguments = (weakref.ref(self), file)
        threading.Thread(target=_publish, args=arguments, name="mcmoe-metrics", daemon=True).start()


@dataclass(frozen=True)
class LayerCounts:
    """One layer's place in the counts."""

    counts: PruningCounts
    place: int

    @property
    def sums(self) -> torch.Tensor:
        """Of all layers."""
        return self.counts.sums

    def row(self) -> torch.Tensor:
        """int64 [2] to which a kernel adds."""
        return self.counts.row(self.place)

    def show(self) -> None:
        """To be called after the kernel was launched."""
        self.counts.show(self.place)

    def add(self, topk_ids: torch.Tensor, kept_ids: torch.Tensor) -> None:
        """Count what plain torch pruned: ids [T, k] before and after."""
        self.row().add_(pair_counts(topk_ids, kept_ids))
        self.show()


def write_counts(counts: PruningCounts, file: Path) -> None:
    """Write the present sums for MultiProcessCollector, which must not find half of them."""
    from prometheus_client.mmap_dict import MmapedDict, mmap_key

    new = file.with_suffix(".new")
    values = MmapedDict(str(new))
    for layer, row in counts.values().items():
        for (name, text), value in zip(METRICS, row, strict=True):
            key = mmap_key(name, f"{name}_total", ["layer"], [str(layer)], text)
            values.write_value(key, float(value), time.time())
    values.close()
    new.replace(file)


def counts_file() -> Path | None:
    """A new file for this process's counts; how Prometheus sums them is its name's beginning."""
    folder = os.environ.get(PROMETHEUS_FOLDER) or os.environ.get(FOLDER)
    if not folder:
        return None
    return Path(folder) / f"counter_mcmoe-{os.getpid()}-{next(_numbers)}.db"


def _publish(alive: weakref.ref[PruningCounts], file: Path) -> None:
    written: dict[int, tuple[int, int]] | None = None
    while (counts := alive()) is not None:
        values = counts.values()
        if values != written and file.parent.is_dir():
            write_counts(counts, file)
            written = values
        del counts
        time.sleep(PUBLISH_SECONDS)


def _is_dummy_run() -> bool:
    """Whether vLLM runs the model for itself, not for requests."""
    from vllm.forward_context import get_forward_context, is_forward_context_available

    return is_forward_context_available() and get_forward_context().attn_metadata is None
