"""The campaign against a server that is none: what is sound passes, and each fault is seen."""

import json
import threading
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import pytest

from tests.fuzz import clients, server
from tests.fuzz.clients import BEHAVIOURS, Target
from tests.fuzz.server import (
    complaints,
    growth,
    run_campaign,
    target_of,
    uncounted,
    wrong_pairs,
)

SOUND_METRICS = """# HELP mcmoe_routed_pairs_total pairs
mcmoe_routed_pairs_total{layer="0"} 40.0
mcmoe_pruned_pairs_total{layer="0"} 10.0
vllm:num_requests_running{engine="0"} 0.0
vllm:num_requests_waiting{engine="0"} 0.0
"""


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM does, but for what `fault` names."""

    fault = ""
    texts = 0
    default_request_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, *_):
        self.answer(400, b"{}")

    def do_GET(self):
        metrics = SOUND_METRICS
        if self.fault == "pairs":
            metrics = metrics.replace("10.0", "41.0")
        if self.fault == "rest":
            metrics = metrics.replace("0.0\nvllm", "2.0\nvllm")
        if self.path == "/metrics":
            self.answer(200, metrics.encode(), "text/plain")
        elif self.path == "/v1/models":
            self.answer(200, json.dumps({"data": [{"id": "m"}]}).encode())
        else:
            self.answer(404, b"{}")

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        try:
            body = json.loads(self.rfile.read(int(length) if length.isdigit() else 0))
            stream = body.get("stream")
        except (ValueError, AttributeError, RecursionError):
            return self.answer(400, b"{}")
        if self.path != "/v1/completions" or body.get("model") != "m":
            return self.answer(404, b"{}")
        if self.fault == "status":
            return self.answer(500, b"it broke")
        if stream:
            end = b"" if self.fault == "stream" else b"data: [DONE]\n\n"
            return self.answer(200, b"data: {}\n\n" + end, "text/event-stream")
        Handler.texts += self.fault == "greedy"
        text = {"choices": [{"text": f"text {Handler.texts}"}]}
        return self.answer(200, json.dumps(text).encode())

    def unsupported(self):
        self.answer(405, b"{}")

    do_PUT = do_DELETE = do_PATCH = unsupported


@pytest.fixture
def target(monkeypatch):
    monkeypatch.setattr(clients, "PATIENCE", 0.1)
    monkeypatch.setattr(server, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(server, "REST_SECONDS", 1)
    monkeypatch.setattr(ThreadingHTTPServer, "handle_error", lambda *_: None)  # clients that left
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield target_of(f"http://127.0.0.1:{running.server_port}")
        running.shutdown()


def test_the_model_is_the_servers(target):
    assert target == Target("127.0.0.1", target.port, "m")


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_sound_server_answers_rightly(target, name):
    behave, _, is_right = BEHAVIOURS[name]
    for number in range(4):
        answer = behave(target, Random(number))
        assert is_right(answer.status), (number, answer)


def test_what_no_server_may_answer():
    for name, (_, _, is_right) in BEHAVIOURS.items():
        assert not is_right(500), name


ASKED = Namespace(seconds=0.2, clients=2, seed=0)


def test_a_sound_server_has_no_faults(target):
    result = run_campaign(target, ASKED, None)
    assert result["faults"] == [] and result["requests"] >= ASKED.clients
    assert result["pairs"] == {"routed": 40, "pruned": 10}


@pytest.mark.parametrize(
    ("fault", "behaviour", "words"),
    [
        ("status", "plain", "500 'it broke'"),
        ("stream", "streamed", "streamed: 0"),
        ("greedy", "wrong path", "greedy texts"),
        ("pairs", "wrong path", "more than were routed"),
        ("rest", "wrong path", "no rest"),
    ],
)
def test_faults_are_seen(target, monkeypatch, fault, behaviour, words):
    monkeypatch.setattr(Handler, "fault", fault)
    monkeypatch.setattr(server, "choose", lambda rng: behaviour)
    result = run_campaign(target, ASKED, None)
    assert any(words in line for line in result["faults"]), result["faults"]


def test_a_server_that_ends_is_seen(target):
    gone = Target(target.host, 1, target.model)
    with pytest.raises(ConnectionRefusedError):
        run_campaign(gone, ASKED, None)


def test_counters_may_not_fall():
    before, now = (
        {'mcmoe_routed_pairs_total{layer="1"}': 5.0},
        {'mcmoe_routed_pairs_total{layer="1"}': 4.0},
    )
    assert len(list(wrong_pairs(before, now))) == 1 and not list(wrong_pairs(now, before))
    assert len(list(wrong_pairs(before, {}))) == 1 and not list(wrong_pairs({}, before))


def test_pruning_that_is_not_counted_is_seen():
    log = "INFO mcmoe 0.1.0: 4 MoE layers, compute path = CPU, pruning in 4 layers\n"
    assert len(list(uncounted(log, {"routed": 0.0}))) == 1
    assert not list(uncounted(log, {"routed": 8.0})) and not list(uncounted("", {"routed": 0.0}))


@pytest.mark.parametrize(
    ("middle", "end", "faults"),
    [
        ({"a 1": 1000, "b 2": 500}, {"a 1": 1010, "b 2": 500}, 0),
        ({"a 1": 1000, "b 2": 500}, {"a 1": 1100, "b 2": 500}, 1),
        ({"a 1": 1000, "b 2": 500}, {"a 1": 1000}, 1),
        ({}, {}, 0),
    ],
)
def test_memory_must_be_flat(middle, end, faults):
    assert len(list(growth({"start": {}, "middle": middle, "end": end}))) == faults


def test_the_log_is_looked_through():
    log = "INFO all is well, no error\nERROR 11-30 it broke\n  Traceback (most recent call last):\n"
    assert complaints(log) == ["ERROR 11-30 it broke", "  Traceback (most recent call last):"]
