"""What a badly behaved client does to a server: a table of behaviours, each one request.

A behaviour takes an address and a random generator and returns what came back; `expected` says
whether that is right. Sockets alone, for requests that no library would send.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPConnection
from random import Random
from typing import Any

SECONDS = 300.0  # after which an answer is missed
PATIENCE = 10.0  # for an answer to half a request
WORDS = (
    "the file", "import os", "a dictionary", "of text", "def parse(self):", "returns", "None", "é",
    "日本", "\n", "\t", "0", "\U0001f600", "{", "}", '"', "\\", "<s>", "</s>", "[INST]", "\x00",
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """status: None if there was none, 0 if it did not begin with one; body: what followed."""

    status: int | None
    body: bytes = b""

    def __str__(self) -> str:
        return f"{self.status} {self.body[-300:].decode(errors='replace')!r}"


@dataclass(frozen=True)
class Target:
    """A server. model: its name there."""

    host: str
    port: int
    model: str


Behaviour = Callable[[Target, Random], Answer]


def ask(target: Target, path: str, body: dict[str, Any]) -> Answer:
    """POST a JSON object and read the answer."""
    return _exchange(target, "POST", path, json.dumps(body), {"Content-Type": "application/json"})


def send(target: Target, method: str, path: str) -> Answer:
    """A request without a body."""
    return _exchange(target, method, path, None, {})


# Behaviours


def plain(target: Target, rng: Random) -> Answer:
    return ask(target, *_sound_request(target, rng, stream=False))


def streamed(target: Target, rng: Random) -> Answer:
    answer = ask(target, *_sound_request(target, rng, stream=True))
    whole = answer.status == 200 and b"data: [DONE]" in answer.body
    return answer if whole else Answer(0, answer.body)


def aborted(target: Target, rng: Random) -> Answer:
    """A client that leaves, by closing or by a reset, before the answer or in it."""
    path, body = _sound_request(target, rng, stream=rng.random() < 0.7)
    body |= {"max_tokens": 100, "ignore_eos": True}
    with _connect(target) as s:
        s.sendall(_post(path, json.dumps(body).encode()))
        if rng.random() < 0.5:
            s.settimeout(rng.uniform(0.01, 1))
            with contextlib.suppress(TimeoutError):
                s.recv(rng.choice((1, 400, 4000)))
        else:
            time.sleep(rng.random() ** 3)
        _leave(s, reset=rng.random() < 0.5)
    return Answer(None)


def cut_off(target: Target, rng: Random) -> Answer:
    """A request that ends in its midst."""
    path, body = _sound_request(target, rng, stream=False)
    request = _post(path, json.dumps(body).encode())
    with _connect(target) as s:
        s.sendall(request[: rng.randrange(1, len(request))])
        how = rng.choice(("close", "reset", "shutdown"))
        if how == "shutdown":
            s.shutdown(socket.SHUT_WR)
            s.settimeout(PATIENCE)  # whether a server answers half a request is its own affair
            try:
                return Answer(None, s.recv(100))
            except TimeoutError:
                return Answer(None)
        _leave(s, reset=how == "reset")
    return Answer(None)


def malformed(target: Target, rng: Random) -> Answer:
    """A body that is no JSON object, or bytes that are no HTTP."""
    body = rng.choice(
        (
            b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe\x00", b"{'a': 1}", b'{"prompt": ',
            b"[" * 50_000, b'{"prompt": ' + b"9" * 10_000 + b"}", b'{"prompt": "\\ud800"}',
            b"x" * 100_000, b'{"a": NaN}', b"prompt=x", rng.randbytes(99),
        )
    )  # fmt: skip
    path = rng.choice(("/v1/completions", "/v1/chat/completions", "/tokenize"))
    start = f"POST {path} HTTP/1.1\r\nHost: x\r\n".encode()
    request = rng.choice(
        (
            _post(path, body), _post(path, body), _post(path, body, kind="text/plain"),
            b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n",
            start + b"Content-Length: -5\r\n\r\n",
            start + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        )
    )  # fmt: skip
    with _connect(target) as s:
        s.sendall(request)
        s.settimeout(PATIENCE)  # a server may wait for the rest of what has none
        try:
            return _read(s)
        except TimeoutError:
            return Answer(None)


def wrong_parameters(target: Target, rng: Random) -> Answer:
    _, body = _sound_request(target, rng, stream=False)
    body["messages"] = [{"role": "user", "content": "x"}]
    name, value = rng.choice(WRONG)
    path = rng.choice(("/v1/completions", "/v1/completions", "/v1/chat/completions"))
    return ask(target, path, {**body, name: value})


def wrong_path(target: Target, rng: Random) -> Answer:
    method, path = rng.choice(
        (
            ("POST", "/v1/nothing"), ("GET", "/v1/completions"), ("DELETE", "/v1/models"),
            ("PUT", "/v1/completions"), ("GET", "/../../etc/passwd"), ("GET", "/" + "x" * 5000),
            ("POST", "/v1/models"), ("GET", "/%00"), ("GET", "//"), ("PATCH", "/health"),
        )
    )  # fmt: skip
    return send(target, method, path)


# Behaviour -> its share of the requests, and the answers that are right; None: no answer.
BEHAVIOURS: dict[str, tuple[Behaviour, int, Callable[[int | None], bool]]] = {
    "plain": (plain, 30, lambda status: status == 200),
    "streamed": (streamed, 14, lambda status: status == 200),
    "aborted": (aborted, 22, lambda status: status is None),
    "cut off": (cut_off, 6, lambda status: status is None),
    "malformed": (malformed, 8, lambda status: status is None or 400 <= status < 500),
    "wrong parameters": (
        wrong_parameters,
        16,
        lambda status: status is not None and (status == 200 or 400 <= status < 500),
    ),
    "wrong path": (wrong_path, 4, lambda status: status is not None and 200 <= status < 500),
}

WRONG: tuple[tuple[str, Any], ...] = (
    ("model", "another"), ("model", 3), ("model", ""), ("prompt", None), ("prompt", []),
    ("prompt", ""), ("prompt", [-1]), ("prompt", [2**31]), ("prompt", [[1], ["x"]]),
    ("prompt", {"a": 1}), ("prompt", "x " * 20_000), ("messages", []), ("messages", "x"),
    ("messages", [{"role": "x"}]), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 10**9),
    ("max_tokens", "many"), ("max_tokens", 1.5), ("temperature", -1), ("temperature", 1e400),
    ("temperature", "hot"), ("top_p", 0), ("top_p", 2), ("top_k", -5), ("n", 0), ("n", -1),
    ("stop", [""]), ("stop", [3]), ("stop", ["x"] * 1000), ("logprobs", 10**6),
    ("logprobs", -3), ("seed", 2**70), ("seed", "x"), ("logit_bias", {"x": 1}),
    ("logit_bias", {"99999999": 1}), ("presence_penalty", 9), ("repetition_penalty", 0),
    ("response_format", {"type": "x"}), ("echo", "maybe"), ("best_of", 0), ("unknown", 1),
    ("prompt_logprobs", -7), ("min_tokens", 500), ("stop_token_ids", ["x"]), ("user", 3),
    ("stream_options", {"include_usage": True}), ("add_special_tokens", "x"),
)  # fmt: skip


def choose(rng: Random) -> str:
    """A behaviour's name, by their shares."""
    return rng.choices(list(BEHAVIOURS), [share for _, share, _ in BEHAVIOURS.values()])[0]


def _sound_request(target: Target, rng: Random, stream: bool) -> tuple[str, dict[str, Any]]:
    prompt: Any = " ".join(rng.choices(WORDS, k=rng.randrange(1, 40)))
    if rng.random() < 0.2:
        prompt = [rng.randrange(3, 1000) for _ in range(rng.randrange(1, 60))]
    body: dict[str, Any] = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": rng.randrange(1, 40),
        "temperature": rng.choice((0, 0, 0.7, 1.5)),
        "stream": stream,
    }
    extra: tuple[dict[str, Any], ...] = (
        {}, {}, {"n": rng.randrange(2, 4), "temperature": 1.0}, {"top_p": 0.5}, {"logprobs": 3},
        {"stop": ["\n"]}, {"seed": rng.randrange(2**31)}, {"echo": True}, {"ignore_eos": True},
        {"presence_penalty": 1.0}, {"top_k": 5},
    )  # fmt: skip
    return "/v1/completions", body | rng.choice(extra)


def _exchange(
    target: Target, method: str, path: str, body: str | None, headers: dict[str, str]
) -> Answer:
    connection = HTTPConnection(target.host, target.port, timeout=SECONDS)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return Answer(response.status, response.read())


def _connect(target: Target) -> socket.socket:
    return socket.create_connection((target.host, target.port), timeout=SECONDS)


def _post(path: str, body: bytes, kind: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _read(s: socket.socket) -> Answer:
    """All until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionError):  # a server may drop what it does not want to read
        while part := s.recv(1 << 16):
            found += part
    if not found:
        return Answer(None)
    line, _, _ = found.partition(b"\r\n")
    words = line.split(b" ")
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    return Answer(status, found.partition(b"\r\n\r\n")[2])


def _leave(s: socket.socket, reset: bool) -> None:
    if reset:  # instead of a farewell, and without what is still to be sent
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()
