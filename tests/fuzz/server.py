"""An hour of badly behaved clients, and what a server makes of it.

    PYTHONPATH=.:kernels python -m tests.fuzz.server DIR --json FILE -- --enforce-eager

What follows `--` is for `vllm serve DIR`, which prunes if DIR is calibrated. With --url a running
server is used; --pid then names one of its processes, whose memory is watched.

It must answer what is sound, refuse what is not, write no error, give the same greedy texts before
and after, come to rest, and need no more memory in its second half than in its first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

from benchmarks.serving import server
from tests.fuzz.clients import BEHAVIOURS, Target, ask, choose, send

START_SECONDS = 600
REST_SECONDS = 120
WATCH_SECONDS = 5.0
GREEDY = ("The file", "import os", "A dictionary is")
MOST_GROWTH = 0.03  # of all memory, in the second half
MOST_FAULTS = 200  # that are kept
ROUTED, PRUNED = "mcmoe_routed_pairs_total", "mcmoe_pruned_pairs_total"
WAITING = ("vllm:num_requests_running", "vllm:num_requests_waiting")
PRUNES = re.compile(r"pruning in \d+ layers")
COMPLAINT = re.compile(r"\bERROR\b|\bCRITICAL\b|Traceback \(most recent call last\)")


@dataclass
class Tally:
    """What clients and the watch have seen so far; appended to by many threads."""

    answers: dict[str, Counter[str]] = field(
        default_factory=lambda: {name: Counter() for name in BEHAVIOURS}
    )
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, behaviour: str, status: int | None) -> None:
        with self.lock:
            self.answers[behaviour][str(status)] += 1

    def fault(self, line: str) -> None:
        with self.lock:
            if len(self.faults) < MOST_FAULTS:
                self.faults.append(line)
                print(line, file=sys.stderr, flush=True)


def misbehave(target: Target, rng: Random, end: threading.Event, tally: Tally) -> None:
    """One client: a request after the other."""
    while not end.is_set():
        name = choose(rng)
        behave, _, is_right = BEHAVIOURS[name]
        try:
            answer = behave(target, rng)
        except (OSError, HTTPException) as e:
            tally.note(name, None)
            tally.fault(f"{name}: {type(e).__name__}: {e}")
            continue
        tally.note(name, answer.status)
        if not is_right(answer.status):
            tally.fault(f"{name}: {answer}")


def metrics(target: Target) -> dict[str, float]:
    """Name with labels -> value, of /metrics."""
    lines = send(target, "GET", "/metrics").body.decode(errors="replace").splitlines()
    found = {}
    for line in lines:
        name, _, value = line.rpartition(" ")
        if name and not line.startswith("#"):
            found[name] = float(value)
    return found


def total(values: Mapping[str, float], name: str) -> float:
    return sum(v for key, v in values.items() if key.partition("{")[0] == name)


def wrong_pairs(before: Mapping[str, float], now: Mapping[str, float]) -> Iterator[str]:
    """Counters of the plugin that contradict each other, or what they were."""
    for key in before.keys() - now.keys():
        if key.partition("{")[0] in (ROUTED, PRUNED):
            yield f"counters: {key} is gone, it was {before[key]:.0f}"
    for key, value in now.items():
        name, _, labels = key.partition("{")
        if name in (ROUTED, PRUNED) and value < before.get(key, 0):
            yield f"counters: {key} fell from {before[key]:.0f} to {value:.0f}"
        if name == PRUNED and value > now.get(f"{ROUTED}{{{labels}", 0):
            yield f"counters: {key} is {value:.0f}, more than were routed"


def memory(pid: int | None) -> dict[str, int]:
    """Resident MiB of every process in the session of `pid`, by name and pid."""
    found: dict[str, int] = {}
    for process in Path("/proc").glob("[0-9]*") if pid is not None else ():
        with contextlib.suppress(OSError, IndexError):  # it may end right now
            if os.getsid(int(process.name)) == os.getsid(pid):
                pages = int((process / "statm").read_text().split()[1])
                name = (process / "comm").read_text().strip()
                found[f"{name} {process.name}"] = pages * os.sysconf("SC_PAGE_SIZE") >> 20
    return found


def greedy(target: Target) -> list[str]:
    """Texts that depend on nothing but the server's health: asked alone, too short to be cached."""
    bodies = (
        {"model": target.model, "prompt": p, "max_tokens": 24, "temperature": 0} for p in GREEDY
    )
    answers = [ask(target, "/v1/completions", body) for body in bodies]
    return [
        json.loads(a.body)["choices"][0]["text"] if a.status == 200 else str(a) for a in answers
    ]


def come_to_rest(target: Target) -> str | None:
    """None as soon as nothing runs or waits, or what does."""
    deadline = time.monotonic() + REST_SECONDS
    while True:
        values = metrics(target)
        left = {name: total(values, name) for name in WAITING}
        if not any(left.values()):
            return None
        if time.monotonic() > deadline:
            return f"no rest after {REST_SECONDS} s: {left}"
        time.sleep(0.5)


def run_campaign(target: Target, asked: argparse.Namespace, pid: int | None) -> dict[str, Any]:
    """Clients for so many seconds, watched; what is reported."""
    tally, end = Tally(), threading.Event()
    before, rss = greedy(target), {"start": memory(pid)}
    started, counters = time.monotonic(), metrics(target)
    clients = [
        threading.Thread(
            target=misbehave, args=(target, Random(f"{asked.seed} {i}"), end, tally), daemon=True
        )
        for i in range(asked.clients)
    ]
    for client in clients:
        client.start()
    while (spent := time.monotonic() - started) < asked.seconds:
        if spent > asked.seconds / 2:
            rss.setdefault("middle", memory(pid))
        time.sleep(min(WATCH_SECONDS, max(0.0, asked.seconds - spent)))
        try:
            now = metrics(target)
        except (OSError, HTTPException) as e:
            tally.fault(f"metrics: {type(e).__name__}: {e}")
            continue
        for line in wrong_pairs(counters, now):
            tally.fault(line)
        counters = now
    rss["end"] = memory(pid)
    end.set()
    for client in clients:
        client.join(REST_SECONDS * 3)
    try:
        if left := come_to_rest(target):
            tally.fault(left)
        if (after := greedy(target)) != before:
            tally.fault(f"greedy texts: {before} before, {after} after")
        counters = metrics(target)
    except (OSError, HTTPException, ValueError) as e:
        tally.fault(f"it does not answer any more: {type(e).__name__}: {e}")
    for line in growth(rss):
        tally.fault(line)
    return {
        "requests": sum(sum(found.values()) for found in tally.answers.values()),
        "seconds": round(time.monotonic() - started),
        "clients": asked.clients,
        "answers": {name: dict(found) for name, found in tally.answers.items()},
        "pairs": {"routed": total(counters, ROUTED), "pruned": total(counters, PRUNED)},
        "memory_mib": rss,
        "faults": tally.faults,
    }


def growth(rss: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """What grew in the second half, and processes that ended."""
    middle, last = rss.get("middle", {}), rss.get("end", {})
    for name in middle.keys() - last.keys():
        yield f"memory: {name} has ended"
    before, after = sum(middle.values()), sum(last.values())
    if after > before * (1 + MOST_GROWTH):
        yield f"memory: {before} MiB in the middle, {after} at the end"


def complaints(log: str) -> list[str]:
    return [line[:300] for line in log.splitlines() if COMPLAINT.search(line)]


def uncounted(log: str, pairs: Mapping[str, float]) -> Iterator[str]:
    """Pruning that /metrics does not show."""
    if (found := PRUNES.search(log)) and not pairs["routed"]:
        yield f"counters: the log says {found[0]!r}, and no pair is counted"


def target_of(url: str) -> Target:
    """The server at an address, and its first model."""
    parts = urlsplit(url)
    target = Target(parts.hostname or "127.0.0.1", parts.port or 80, "")
    models = json.loads(send(target, "GET", "/v1/models").body)["data"]
    return Target(target.host, target.port, models[0]["id"])


def serve_and_run(asked: argparse.Namespace) -> dict[str, Any]:
    """Start `vllm serve`, run against it, and end it; its log is looked through."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    environment.pop("TRITON_INTERPRET", None)
    port = server.free_port()
    command = [*server.VLLM, "serve", str(asked.folder), "--port", str(port), *asked.flags]
    log = Path(asked.log or Path(tempfile.mkdtemp()) / "server.log")
    process = server.start(command, log, environment)
    try:
        url = f"http://127.0.0.1:{port}"
        if failure := server.wait_until_ready(process, url, START_SECONDS):
            raise RuntimeError(f"vllm serve did not come up, {failure}: see {log}")
        result = run_campaign(target_of(url), asked, process.pid)
    finally:
        server.stop(process)
    said = log.read_text(errors="replace")
    found = complaints(said)
    wrong = [*(f"log: {line}" for line in found[:20]), *uncounted(said, result["pairs"])]
    faults = [*result["faults"], *wrong]
    return {**result, "complaints": len(found), "log": str(log), "faults": faults}


def main() -> int:
    arguments = sys.argv[1:]
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="DIR")
    add("--url", help="of a running server")
    add("--pid", type=int, help="of a process of the server at --url")
    add("--seconds", type=float, default=3600)
    add("--clients", type=int, default=24)
    add("--seed", type=int, default=0)
    add("--log", metavar="FILE", help="for what the server prints")
    add("--json", metavar="FILE")
    asked = parser.parse_args(own)
    asked.flags = arguments[len(own) + 1 :]
    if (asked.folder is None) == (asked.url is None):
        parser.error("give either DIR or --url")
    if asked.url:
        result = run_campaign(target_of(asked.url), asked, asked.pid)
    else:
        result = serve_and_run(asked)
    if asked.json:
        Path(asked.json).write_text(json.dumps(result, indent=1))
    print(json.dumps({**result, "faults": len(result["faults"])}, indent=1))
    return int(bool(result["faults"]))


if __name__ == "__main__":
    sys.exit(main())
