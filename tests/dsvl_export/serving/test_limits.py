"""What ``serve`` refuses, and that it goes on: bad bodies, limits, tokens, hosts, clients that go away."""

from __future__ import annotations

import http.server
import io
import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import dsvl_export.serving.app as serving_app
from dsvl_export.serving import connection
from dsvl_export.serving.images import ImageLimits
from dsvl_export.serving.service import ServeOptions
from runtimes.bundle.bundle import Bundle
from tests.dsvl_export.serving.server import (
    DESCRIBE,
    MODEL,
    Served,
    ask,
    connected,
    held,
    png_of,
    running,
    sentence,
    serving,
    user_part,
)
from tests.runtimes.gate import Gate

TINY_PNG = png_of(8)
BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "gpt-4"}, 404, "There is no model 'gpt-4'; use one of onnxruntime/fp32, onnxruntime/fp16."),
    ({"model": "../../etc/passwd"}, 404, "There is no model '../../etc/passwd'"),
    ({"messages": []}, 400, "messages: List should have at least 1 item"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content: the content is missing."),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.tool_call_id: no earlier message has a call"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "The last message must be the user's."),
    ({"messages": ask("x", "data:image/png;base64,@@@")}, 400, "image 1: the data URL is not valid base64."),
    ({"messages": ask("x", "data:text/plain")}, 400, "a data URL has the form data:image/png;base64,"),
    ({"messages": ask("x", "data:text/plain,hello")}, 400, "image 1 is not a readable image; use PNG,"),
    ({"messages": ask("x", "data:;base64,a-_b")}, 400, "not valid base64. It uses the URL-safe alphabet; replace - by + and _ by /"),
    ({"messages": ask("x", "picture.png")}, 400, "image 1 is neither a URL nor base64; pass a URL such as data:"),
    ({"messages": ask("x", b"no image")}, 400, "image 1 is not a readable image; use PNG, JPEG, WEBP, GIF, BMP."),
    ({"messages": ask("x", TINY_PNG[:100])}, 400, "image 1 is damaged: "),
    ({"messages": ask("x", "http://127.0.0.1/x.png")}, 400, "this server accepts only data URLs."),
    ({"messages": ask("x", "file:///etc/passwd")}, 400, "this server accepts only data URLs."),
    ({"messages": ask("word " * 5000)}, 400, "tokens but the KV cache holds 1024"),
    ({"messages": ask("\ud800")}, 400, "half a surrogate pair"),
    ({"messages": ask("x", *["data:,"] * 10_000)}, 400, "The request has 10000 images; the limit is 16."),
    ({"messages": user_part({"type": "image_url", "image_url": 1})}, 400, "messages.0.content.0.image_url: Input should be"),
    ({"messages": user_part({"type": "image_url", "image_url": {"url": 1}})}, 400, "messages.0.content.0.image_url.url: "),
    ({"messages": user_part({"type": "image_url", "image_url": {}})}, 400, "messages.0.content.0.image_url.url: Field required."),
    ({"messages": user_part({"type": "input_image", "file_id": "x"})}, 400, "messages.0.content.0.image_url: Field required."),
    ({"messages": user_part({"type": "image", "source": {"type": "file"}})}, 400, "messages.0.content.0.source: Input tag"),
    ({"messages": user_part({"type": "text", "text": None})}, 400, "messages.0.content.0.text: Input should be a valid string."),
    ({"messages": [*ask("x"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, *ask("y")]}, 400, "messages.1.tool_calls.0.function: Field required."),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400, "messages.0.content.0: Input tag 'video'"),
    ({"messages": [0] * 100_000}, 400, "messages.0: Input should be a valid dictionary"),
    ({"messages": ask("word " * 100_000)}, 400, "The prompt has at least"),
    ({"messages": ask("x", *["data:image/png;base64,AAAA"] * 16)}, 400, "The prompt has at least 1027 tokens but"),
    ({"temperature": float("inf")}, 400, "not valid JSON: Infinity is not a number"),
    ({"temperature": True}, 400, "temperature: Input should be a valid number."),
    ({"temperature": "1"}, 400, "temperature: Input should be a valid number."),
    ({"stream": "yes"}, 400, "stream: Input should be a valid boolean."),
    ({"max_tokens": True}, 400, "max_tokens: Input should be a valid integer."),
    ({"max_tokens": 1.5}, 400, "max_tokens: Input should be a valid integer."),
    ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens and max_completion_tokens differ; pass one"),
    ({"model": None}, 400, "model: Input should be a valid string."),
    ({"model": "\x1b[31m" + "x" * 10_000}, 404, "There is no model '\\x1b[31m"),
    ({"repetition_penalty": 1e-300}, 400, "repetition_penalty: Input should be"),
    ({"temperature": 3}, 400, "temperature: Input should be less than or equal to 2."),
    ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1."),
    ({"stop": [""]}, 400, "stop.0: String should have at least 1 character."),
    ({"stop": ["x"] * 17}, 400, "stop: List should have at most 16 items"),
    ({"stop": "x" * 1001}, 400, "stop: String should have at most 1000 characters."),
    ({"top_logprobs": 3}, 400, "top_logprobs needs logprobs: true."),
    ({"n": 2}, 400, "The parameter n is not supported; leave it out."),
    ({"tools": [{"type": "function"}]}, 400, "tools.0.function: Field required."),
    ({"tools": [{"type": "web_search"}]}, 400, "tools.0.type: Input should be 'function'."),
    ({"functions": [{"name": "f"}]}, 400, "The parameter functions is not supported"),
    ({"n": True}, 400, "The parameter n is not supported; leave it out."),
    ({"tool_choice": "required"}, 400, "tool_choice is required, but the request has no tools."),
    ({"logit_bias": {"5": 1}}, 400, "The parameter logit_bias is not supported"),
    ({"presence_penalty": 0.5}, 400, "The parameter presence_penalty is not supported"),
    ({"modalities": ["text", "audio"]}, 400, "The parameter modalities is not supported"),
    ({"guided_json": {}}, 400, "The parameter guided_json is not supported"),
    ({"min_p": 0.1}, 400, "The parameter min_p is not supported"),
    ({"best_of": 2}, 400, "The parameter best_of is not supported"),
    ({"max_token": 5}, 400, "The parameter 'max_token' is unknown (did you mean max_tokens?); leave it out."),
    ({"num_predict": None}, 400, "The parameter 'num_predict' is unknown; leave it out."),
]  # fmt: skip


@pytest.mark.parametrize(("more", "status", "text"), BAD)
def test_bad_requests(served: Served, more: dict[str, Any], status: int, text: str) -> None:
    content = json.dumps({"model": MODEL, "messages": ask("Hello."), **more})
    refusal = served.post(None, content=content, headers={"Content-Type": "application/json"})
    assert refusal.status_code == status
    assert text in sentence(refusal)


def test_bad_bodies_and_paths(served: Served) -> None:
    as_json = {"Content-Type": "application/json"}
    for content, headers, status, text in (
        (b"{", as_json, 400, "not valid JSON"),
        (b"[" * 100_000, as_json, 400, "not valid JSON"),
        (b"\xff\xfe", as_json, 400, "not valid JSON"),
        (b'{"seed": ' + b"1" * 5000 + b"}", as_json, 400, "has more than 64 bits"),
        (b'{"seed": NaN}', as_json, 400, "NaN is not a number"),
        (b'{"temperature": 1e999}', as_json, 400, "the number 1e999 is too large"),
        (b'{"model": "a", "model": "b"}', as_json, 400, "the key 'model' occurs twice"),
        (b'{"user": "\\ud800"}', as_json, 400, "half a surrogate pair"),
        (b'{"\\udfff": 1}', as_json, 400, "half a surrogate pair"),
        (b'{"metadata": ' + b"[" * 70 + b"]" * 70 + b"}", as_json, 400, "more than 64 levels"),
        (b"[" + b"[]," * 500_000 + b"1]", as_json, 400, "more than 500000 values"),
        (b"{}", {**as_json, "Content-Encoding": "gzip"}, 415, "must not be compressed"),
        (b"{}", {"Content-Type": "multipart/form-data"}, 415, "must be application/json"),
        (b"[]", as_json, 400, "The body: Input should be"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "must be application/json"),
        (b"{}", {**as_json, "X-Long": "x" * 20_000}, 431, "more than 64 headers or 16384 bytes"),
        (b"{}", {**as_json, **{f"X-{i}": "x" for i in range(70)}}, 431, "more than 64 headers"),
    ):
        refusal = served.post(None, content=content, headers=headers)
        assert refusal.status_code == status
        assert text in sentence(refusal)
    for path in ("/nothing", "/%2e%2e/manifest.json", "/v1/../../etc/passwd", "//etc/passwd", "/page.html"):
        assert httpx.get(served.url + path).status_code == 404
    wrong = httpx.get(f"{served.url}/v1/chat/completions")
    assert (wrong.status_code, sentence(wrong)) == (
        405,
        "/v1/chat/completions does not support the method GET.",
    )


def test_hosts(tiny_bundle: Bundle, served: Served) -> None:
    """On this machine alone, a page of another host cannot pose as it; with a name of its own it is not asked."""
    for host, status in (
        ("localhost", 200),
        ("[::1]:80", 200),
        ("127.0.0.1:8000", 200),
        ("evil.example", 403),
        ("localhost.evil:80", 403),
    ):
        assert httpx.get(f"{served.url}/healthz", headers={"Host": host}).status_code == status
    with serving(tiny_bundle, ServeOptions(local=False)) as found:
        assert httpx.get(f"{found.url}/healthz", headers={"Host": "models.example"}).status_code == 200


def test_image_bombs(served: Served) -> None:
    """A small file of 400 million pixels, and one of more than this server takes."""
    for side, text in ((20_000, "too many pixels to decode safely"), (7_000, "7000 × 7000 pixels")):
        file = io.BytesIO()
        Image.new("1", (side, side)).save(file, "PNG")
        refusal = served.post({"model": MODEL, "messages": ask("x", file.getvalue())})
        assert refusal.status_code == 400
        assert text in sentence(refusal)


def test_tokens(tiny_bundle: Bundle) -> None:
    with serving(tiny_bundle, ServeOptions(token="secret")) as found:
        assert httpx.get(f"{found.url}/healthz").status_code == 200
        assert httpx.get(f"{found.url}/").status_code == 200
        for path in ("/v1/models", "/metrics", f"/v1/models/{MODEL}"):
            for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
                refusal = httpx.get(found.url + path, headers=header)
                assert refusal.status_code == 401
                assert refusal.headers["www-authenticate"] == "Bearer"
                assert sentence(refusal) == "The bearer token is missing or wrong."
            assert httpx.get(found.url + path, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert found.post({"model": MODEL, "messages": ask("x")}).status_code == 401


def test_limits(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies that are too large, announced or not, and one that never ends; the server goes on."""
    monkeypatch.setattr(serving_app, "BODY_SECONDS", 0.5)
    with serving(tiny_bundle, ServeOptions(max_body_bytes=10_000)) as found:
        large = found.post({"model": MODEL, "messages": ask("x" * 20_000)})
        assert large.status_code == 413
        assert sentence(large) == "The body is larger than the limit of 10000 bytes."
        address = httpx.URL(found.url)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for rest, status in (
            (b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"x" * 4096 + b"\r\n", b"408"),
            (b"Transfer-Encoding: chunked\r\n\r\n" + b"4000\r\n" + b"x" * 16384 + b"\r\n", b"413"),
            (b"Content-Length: 99999\r\n\r\n", b"413"),
            (b"Content-Length: 100\r\n\r\n{", b"408"),
        ):
            with socket.create_connection((address.host, address.port or 0), timeout=10) as sent:
                sent.sendall(head + rest)
                assert sent.recv(64).startswith(b"HTTP/1.1 " + status)
        assert found.post({"model": MODEL, "messages": ask("Hello.")}).status_code == 200


def test_heads_that_never_end(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with serving(tiny_bundle) as found:
        address = httpx.URL(found.url)
        with socket.create_connection((address.host, address.port or 0), timeout=10) as half:
            half.sendall(b"GET /healthz HTTP/1.1\r\nHost: loc")
            assert half.recv(10) == b""
        with httpx.Client() as client:  # a connection that has had a request is not closed for its age
            assert client.get(f"{found.url}/healthz").status_code == 200
            time.sleep(0.5)
            assert client.get(f"{found.url}/healthz").status_code == 200


def test_answers_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes nothing for a while is cut off; one that is slow is not."""
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.4)

    async def large(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(200):
            await send({"type": "http.response.body", "body": bytes(1 << 18), "more_body": True})

    with running(large) as url:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port or 0), timeout=10) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            for _ in range(6):
                time.sleep(0.2)
                assert slow.recv(1 << 20)
        with socket.create_connection((address.host, address.port or 0), timeout=10) as stalled:
            stalled.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(1.5)
            assert 0 < sum(map(len, iter(lambda: stalled.recv(1 << 20), b""))) < 200 << 18


def test_busy_and_late(tiny_bundle: Bundle, pictures: list[Path]) -> None:
    """More than the queue holds is told to retry; what takes too long ends."""
    body = {"model": MODEL, "messages": ask(DESCRIBE, pictures[0])}
    with serving(tiny_bundle, slots=1, queue=0) as found:
        with held(found, body):
            refusal = found.post(body)
            assert (refusal.status_code, refusal.headers["retry-after"]) == (429, "1")
            assert "1 requests are being answered and 0 are waiting" in sentence(refusal)
        assert found.post(body).status_code == 200
    with serving(tiny_bundle, ServeOptions(seconds=0.0)) as found:
        late = found.post(body)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "late")


def test_clients_that_go_away_free_their_slots(
    served: Served, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the answer began, and in the middle of a stream."""
    scheduler = served.models.open_models[0].scheduler
    chain, taken = scheduler.chain, []
    plain, submit = chain.decode, scheduler.submit
    monkeypatch.setattr(scheduler, "submit", lambda *given: taken.append(submit(*given)) or taken[-1])
    monkeypatch.setattr(chain, "decode", lambda *given: time.sleep(0.005) or plain(*given))
    for stream, waits in ((False, True), (True, True), (True, False)):
        gate = Gate(scheduler) if waits else None
        with connected(served, ask(DESCRIBE, pictures[0]), stream) as opened:
            while not taken:
                time.sleep(0.001)
            if not waits:
                assert opened.recv(1000).startswith(b"HTTP/1.1 200 OK")
        until = time.monotonic() + 10
        while not taken[0].canceled and time.monotonic() < until:
            time.sleep(0.001)
        if gate:
            gate.open.set()
        served.rests()
        job = taken.pop()
        assert job.canceled
        assert (job.sequence is None) == waits
        assert waits or len(job.sequence.answer.tokens) < 400


def test_a_bundle_that_changes(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.folder, folder)
    with serving(Bundle.open(folder)) as found:
        assert found.post({"model": MODEL, "messages": ask("Hello.")}).status_code == 200
        file = folder / tiny_bundle.artifact("adaptor", "onnxruntime", "fp32").files[0]
        os.utime(file, (1, 1))
        refusal = found.post({"model": MODEL, "messages": ask("Hello.")})
        assert refusal.status_code == 503
        assert "of the bundle changed while it was served; start the server again." in sentence(refusal)
        health = httpx.get(f"{found.url}/healthz")
        assert (health.status_code, health.json()["status"]) == (503, "unavailable")


def test_remote_images_of_allowed_hosts(tiny_bundle: Bundle, pictures: list[Path]) -> None:
    class Host(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "http://169.254.169.254/")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 300_000 if self.path == "/large" else pictures[0].read_bytes())

        def log_message(self, *_: Any) -> None:
            pass

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=host.serve_forever).start()
    at = f"http://127.0.0.1:{host.server_port}"
    try:
        limits = ImageLimits(bytes=200_000, hosts=frozenset({"127.0.0.1"}))
        with serving(tiny_bundle, ServeOptions(images=limits)) as found:
            body = {"model": MODEL, "messages": ask(DESCRIBE, f"{at}/x.png")}
            remote, local = found.post(body), found.post({**body, "messages": ask(DESCRIBE, pictures[0])})
            assert remote.json()["choices"] == local.json()["choices"]
            for url, text in (
                (f"{at}/moved", "cannot download the image from 127.0.0.1 (HTTP Error 302: Found)."),
                (f"{at}/large", "image 1 has more than 200000 bytes."),
                ("http://localhost/x", "this server accepts only data URLs and URLs of 127.0.0.1."),
                ("http://127.0.0.1:1/x", "cannot download the image from"),
            ):
                refusal = found.post({**body, "messages": ask("x", url)})
                assert refusal.status_code == 400
                assert text in sentence(refusal)
    finally:
        host.shutdown()
        host.server_close()
