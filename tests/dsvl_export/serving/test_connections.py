"""What connections may do to ``serve``: slowly sent heads and bodies, garbage, text that takes long, full queues."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from dsvl_export.serving import connection, text
from dsvl_export.serving.images import ImageLimits
from dsvl_export.serving.service import ServeOptions
from runtimes.bundle.bundle import Bundle
from runtimes.chain import EncodedImage
from runtimes.pipeline import Pipeline
from tests.dsvl_export.serving.server import (
    DESCRIBE,
    MODEL,
    Served,
    ask,
    connected,
    png_of,
    sentence,
    serving,
)
from tests.dsvl_export.serving.slow_tokenizer import SlowTokenizer
from tests.runtimes.gate import Gate

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"


@contextmanager
def opened(url: str) -> Iterator[socket.socket]:
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0), timeout=60) as found:
        yield found


def answer_of(sent: socket.socket) -> bytes:
    """One answer of a connection that stays open: its head and a body of the announced length."""
    found = b""
    while b"\r\n\r\n" not in found:
        part = sent.recv(1 << 16)
        assert part, found
        found += part
    head, _, body = found.partition(b"\r\n\r\n")
    (length,) = (int(line[15:]) for line in head.lower().splitlines() if line.startswith(b"content-length:"))
    while len(body) < length:
        body += sent.recv(1 << 16)
    return head


SLOW: dict[str, tuple[bytes, bytes]] = {
    "the head of the second request": (HEALTH + b"\r\n", b"GET /healthz HTTP/1.1\r\nX: "),
    "a body after its answer": (HEALTH + b"Content-Length: 1000\r\n\r\n", b""),
    "a body in chunks after its answer": (HEALTH + b"Transfer-Encoding: chunked\r\n\r\n", b"ff\r\n"),
    "blank lines between requests": (HEALTH + b"\r\n", b"\r\n"),
    "pipelined": (HEALTH + b"\r\n" + HEALTH + b"\r\nGET /h", b""),
}


@pytest.mark.parametrize("kind", SLOW)
def test_slow_senders_are_closed(served: Served, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then does not keep a connection open, also not after a request that was answered."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    first, then = SLOW[kind]
    with opened(served.url) as slow:
        slow.sendall(first)
        assert answer_of(slow).startswith(b"HTTP/1.1 200")
        started = time.monotonic()
        try:
            slow.sendall(then)
            while time.monotonic() - started < 30:
                slow.sendall(b"\r\n" if kind.startswith("blank") else b"x")
                time.sleep(0.05)
            pytest.fail("it was not closed")
        except (BrokenPipeError, ConnectionResetError):
            pass


def test_a_connection_that_is_used_stays_open(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request has a time of its own, also one that is answered for longer."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    with opened(served.url) as used:
        for _ in range(4):
            used.sendall(HEALTH)
            time.sleep(0.2)
            used.sendall(b"\r\n")
            assert answer_of(used).startswith(b"HTTP/1.1 200")
            time.sleep(0.1)


def test_requests_beyond_the_connections(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have sent no whole request make room; while all are being answered, there is none."""
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 2)
    with serving(tiny_bundle) as found:
        with opened(found.url) as first:
            first.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
            )
            time.sleep(0.05)  # the server's clock counts milliseconds
            with opened(found.url) as second:
                second.sendall(HEALTH)
                assert httpx.get(f"{found.url}/healthz").status_code == 200
                assert first.recv(10) == b""
                second.sendall(b"\r\n")
                assert answer_of(second).startswith(b"HTTP/1.1 200")
        gate = Gate(found.models.open_models[0].scheduler)
        messages = ask("Hello.")
        with connected(found, messages, False), connected(found, messages, False):
            while found.busy() < 2:
                time.sleep(0.01)
            refusal = httpx.get(f"{found.url}/v1/models")
            assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "5")
            assert sentence(refusal) == "2 connections are open; try again in a moment."
            gate.open.set()
        found.rests()


def test_a_broken_body_of_a_head_request(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with opened(served.url) as sent:
        sent.sendall(
            b"HEAD /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
        )
        answer = b"".join(iter(lambda: sent.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"\r\n\r\n")
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"x" * 100_000,
        b"GET /" + b"x" * 10_000_000,
    ],
)
def test_what_is_not_http(served: Served, content: bytes) -> None:
    """It is answered in the protocol's form, and closed."""
    with opened(served.url) as sent:
        sent.sendall(content)
        answer = b"".join(iter(lambda: sent.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 "), answer
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_client_that_waits_for_leave(served: Served) -> None:
    """``Expect: 100-continue``: leave is given, unless the head shows that the body is not taken."""
    body = json.dumps({"model": MODEL, "messages": ask("Hello."), "max_tokens": 2}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-Continue\r\n"
    with opened(served.url) as sent:
        sent.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body))
        assert sent.recv(1 << 16).startswith(b"HTTP/1.1 100")
        sent.sendall(body)
        assert answer_of(sent).startswith(b"HTTP/1.1 200")
    with opened(served.url) as sent:
        sent.sendall(head + b"Content-Length: 99999999999\r\n\r\n")
        assert sent.recv(1 << 16).startswith(b"HTTP/1.1 413")


def test_a_health_check_of_http_1_0(served: Served) -> None:
    """It may name no host, which browsers always do."""
    with opened(served.url) as sent:
        sent.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: sent.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b'"models":["onnxruntime/fp32"]}')


def test_text_that_takes_long_holds_up_nobody(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is killed; meanwhile others are answered; the next long text is tokenized again."""
    monkeypatch.setattr(text, "TEXT_SECONDS", 3.0)
    monkeypatch.setattr(text.TokenizerProcess, "asset", SlowTokenizer)
    monkeypatch.setattr(text, "SHORT_TEXT", 300)
    long = "word " * 40
    body = {"model": MODEL, "max_tokens": 2}
    with serving(tiny_bundle) as found, ThreadPoolExecutor(1) as pool:
        assert found.post({**body, "messages": ask(long)}).status_code == 200
        slow = pool.submit(found.post, {**body, "messages": ask("slow " + long)})
        answered = 0
        while not slow.done():
            assert found.post({**body, "messages": ask("Hello.")}).status_code == 200
            answered += not slow.done()
        assert answered
        assert slow.result().status_code == 400
        assert sentence(slow.result()) == "The text takes more than 3 seconds to tokenize; shorten it."
        assert found.post({**body, "messages": ask(long)}).status_code == 200
        ended = found.post({**body, "messages": ask("exit " + long)})
        assert (ended.status_code, ended.headers["retry-after"]) == (503, "5")
        assert found.post({**body, "messages": ask(long)}).status_code == 200


def test_a_request_keeps_its_time_while_its_text_is_read(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text.TokenizerProcess, "asset", SlowTokenizer)
    monkeypatch.setattr(text, "SHORT_TEXT", 300)
    long = "word " * 40
    with serving(tiny_bundle, ServeOptions(seconds=2)) as found:
        body = {"model": MODEL, "messages": ask(long), "max_tokens": 2}
        until = time.monotonic() + 60
        while found.post(body).status_code != 200:  # its process starts
            assert time.monotonic() < until
        late = found.post({"model": MODEL, "messages": ask("slow " + long)})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "late")


def test_long_text_gives_the_same_tokens(
    served: Served, alone: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the other process, also where it spells control tokens."""
    monkeypatch.setattr(text, "SHORT_TEXT", 300)
    content = "<image_placeholder> <｜end▁of▁sentence｜> é " * 5
    found = served.post({"model": MODEL, "messages": ask(content), "max_tokens": 5, "ignore_eos": True})
    prompt = alone.format(content, 0)
    assert len(prompt) > text.SHORT_TEXT
    assert found.json()["usage"]["prompt_tokens"] == len(alone.chain.tokenizer.encode(prompt))


def test_waiting_requests_hold_files_alone(tiny_bundle: Bundle) -> None:
    """Of many requests with many small pictures, none is decoded before its turn, and their bytes are bounded."""
    pictures = [png_of(side) for side in range(1, 15)]
    options = ServeOptions(images=ImageLimits(bytes=sum(map(len, pictures))))
    with serving(tiny_bundle, options, slots=1) as found:
        scheduler = found.models.open_models[0].scheduler
        gate = Gate(scheduler)
        body = {"model": MODEL, "messages": ask(DESCRIBE, *pictures), "max_tokens": 1}
        with ThreadPoolExecutor(12) as pool:
            try:
                answers = [pool.submit(found.post, body) for _ in range(8)]
                until = time.monotonic() + 20
                while found.busy() < 8 and time.monotonic() < until:
                    time.sleep(0.01)
                images = [image for job in scheduler._waiting for image in job.prompt.images.values()]
                assert len(images) >= 7 * 14
                assert all(isinstance(image, EncodedImage) and not image.decoded for image in images)
                refusal = found.post(body)
                assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "5")
                assert sentence(refusal) == "Too many large images are waiting; try again in a moment."
            finally:
                gate.open.set()
            assert {each.result().status_code for each in answers} == {200}
        assert found.post(body).status_code == 200
        more = found.post({**body, "messages": ask(DESCRIBE, *pictures, pictures[0])})
        assert sentence(more) == f"The images of the request have more than {options.images.bytes} bytes."
