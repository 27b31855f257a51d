"""Counts of pruned pairs, and their way to /metrics."""

import gc
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from mcmoe_kernels.pruning import pair_counts, prune
from mcmoe_vllm.plugin import metrics
from mcmoe_vllm.plugin.metrics import PruningCounts
from mcmoe_vllm.plugin.pruning import LayerPruning
from tests.helpers.expert_layers import random_routing

pytestmark = pytest.mark.vllm


def metric_lines() -> list[str]:
    """What a server that starts in this process would show, ours alone."""
    from prometheus_client import generate_latest
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    text = generate_latest(get_prometheus_registry()).decode()
    return sorted(line for line in text.splitlines() if line.startswith("mcmoe_"))


def counted(routed=(7, 0), pruned=(2, 0)) -> PruningCounts:
    counts = PruningCounts([3, 5], torch.device("cpu"))
    for place, pair in enumerate(zip(routed, pruned, strict=True)):
        counts.row(place).add_(torch.tensor(pair))
    return counts


SHOWN = [
    'mcmoe_pruned_pairs_total{layer="3"} 4.0',
    'mcmoe_pruned_pairs_total{layer="5"} 1.0',
    'mcmoe_routed_pairs_total{layer="3"} 14.0',
    'mcmoe_routed_pairs_total{layer="5"} 9.0',
]


def test_requests_are_counted_and_dummy_runs_are_not(forward):
    counts = PruningCounts([3, 5], torch.device("cpu"))
    first, second = (LayerPruning(0.6, counts=counts.of_layer(i)) for i in (3, 5))
    weights, ids = random_routing(9, 6, 2)
    ids[0] = -1  # padding
    expected = pair_counts(ids, prune(weights, ids, 0.6)[1])
    assert expected[0] == 16 and 0 < expected[1] < 9
    with forward(None):
        first(weights, ids)
    assert counts.values() == {3: (0, 0), 5: (0, 0)}
    for _ in range(2):
        with forward({"model.layers.0.self_attn.attn": object()}):
            second(weights, ids)
    assert counts.values() == {3: (0, 0), 5: tuple((2 * expected).tolist())}


def test_one_api_server_sums_what_the_workers_wrote(tmp_path, monkeypatch):
    from prometheus_client import REGISTRY

    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    before = set(REGISTRY._collector_to_names)
    metrics.export()
    (collector,) = set(REGISTRY._collector_to_names) - before
    try:
        assert metric_lines() == []
        metrics.write_counts(counted(), metrics.counts_file())
        metrics.write_counts(counted((7, 9), (2, 1)), metrics.counts_file())
        assert metric_lines() == SHOWN
    finally:
        REGISTRY.unregister(collector)


def test_several_api_servers_show_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv(metrics.PROMETHEUS_FOLDER, str(tmp_path))
    metrics.write_counts(counted((14, 9), (4, 1)), metrics.counts_file())
    assert metric_lines() == SHOWN


def test_the_first_process_names_the_folder(tmp_path, monkeypatch):
    from prometheus_client import REGISTRY

    before = set(REGISTRY._collector_to_names)
    monkeypatch.delenv(metrics.FOLDER, raising=False)
    monkeypatch.setattr(metrics, "_folder", None)
    metrics.export()
    folder = metrics._folder.name
    assert metrics.counts_file().parent.samefile(folder)
    metrics.export()  # as a child does
    assert metrics._folder.name == folder
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


def test_counts_are_written_while_an_engine_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "PUBLISH_SECONDS", 0.01)
    counts = counted()
    monkeypatch.delenv(metrics.FOLDER, raising=False)
    counts.publish()
    assert not any(t.name == "mcmoe-metrics" for t in threading.enumerate())
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    counts.publish()

    def wait_until(true):
        end = time.monotonic() + 20
        while not true() and time.monotonic() < end:
            time.sleep(0.01)
        assert true()

    def written():
        from prometheus_client.multiprocess import MultiProcessCollector

        found = {}
        for metric in MultiProcessCollector(None, str(tmp_path)).collect():
            found |= {(s.name, s.labels["layer"]): s.value for s in metric.samples}
        return found.get(("mcmoe_routed_pairs_total", "3"))

    wait_until(lambda: written() == 7.0)
    counts.row(0).add_(torch.tensor([5, 1]))
    wait_until(lambda: written() == 12.0)
    del counts
    gc.collect()
    wait_until(lambda: not any(t.name == "mcmoe-metrics" for t in threading.enumerate()))


@pytest.fixture
def child(tmp_path, monkeypatch):
    """child(worker): a forked process that makes a folder, and its own child if it has a worker.
    -> its id, the folder, and what ends both when it is called."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ends = []

    def start(worker=False):
        told, stay = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(stay[1])
            made = metrics.make_folder()
            os.write(told[1], made.name.encode())
            if worker and os.fork() != 0:
                os._exit(0)
            os.read(stay[0], 1)  # until the test closes the other end
            os._exit(0)
        os.close(told[1])
        ends.append(stay[1])
        return pid, Path(os.read(told[0], 4096).decode())

    yield start
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("killed", [True, False])
def test_what_a_process_left_the_next_one_removes(tmp_path, child, killed):
    pid, folder = child(worker=not killed)
    (folder / "counter_mcmoe-1-0.db").write_bytes(b"counts")
    metrics.remove_abandoned(tmp_path)
    assert (folder / "counter_mcmoe-1-0.db").exists(), "its process lives"
    if killed:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert folder.exists(), "no process cleans up after os._exit"
    metrics.remove_abandoned(tmp_path)
    assert folder.exists() != killed, "a worker outlives its parent and still counts"


def test_folders_of_others_are_left(tmp_path, monkeypatch):
    """Links, files and other users' folders, which stand in everybody's TMPDIR."""
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / f"{metrics.PREFIX}link").symlink_to(target)
    (tmp_path / f"{metrics.PREFIX}file").touch()
    theirs = tmp_path / f"{metrics.PREFIX}theirs"
    theirs.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: theirs.stat().st_uid + 1)
    metrics.remove_abandoned(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_is_taken_for_an_abandoned_one_is_made_again(tmp_path, monkeypatch):
    """Between its making and its locking."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lock, taken = metrics._lock, []

    def late(folder):
        if not taken:
            taken.append(folder)
            folder.rmdir()
        return lock(folder)

    monkeypatch.setattr(metrics, "_lock", late)
    folder = metrics.make_folder()
    assert Path(folder.name).is_dir() and Path(folder.name) != taken[0]


def test_without_locks_there_is_still_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(metrics, "_lock", lambda folder: None)
    folder = metrics.make_folder()
    metrics.remove_abandoned(tmp_path)
    assert Path(folder.name).is_dir() and len(list(tmp_path.iterdir())) == 1
