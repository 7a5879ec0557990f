"""A server on a free port, in a thread of the tests' own process."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image
from starlette.types import ASGIApp

from dsvl_export.cli.serve import _listen
from dsvl_export.serving.app import create_app
from dsvl_export.serving.connection import BoundedProtocol
from dsvl_export.serving.local_service import LocalService
from dsvl_export.serving.models import ModelOptions, Models
from dsvl_export.serving.service import ServeOptions
from runtimes.bundle.bundle import Bundle
from tests.runtimes.gate import Gate

MODEL = "onnxruntime/fp32"
DESCRIBE = "Describe the picture."
LONG = {"ignore_eos": True, "max_tokens": 600}


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    models: Models

    def post(self, body: Any, **more: Any) -> httpx.Response:
        """A chat completion; with ``content`` the body as it is."""
        given = more if "content" in more else {"json": body, **more}
        return httpx.post(f"{self.url}/v1/chat/completions", timeout=60, **given)

    def busy(self) -> int:
        return sum(model.scheduler.running + model.scheduler.waiting for model in self.models.open_models)

    def rests(self) -> None:
        """Wait until nothing is answered any more."""
        until = time.monotonic() + 20
        while self.busy():
            assert time.monotonic() < until, "a request was not given up"
            time.sleep(0.01)


@contextmanager
def serving(bundle: Bundle, options: ServeOptions | None = None, **choice: Any) -> Iterator[Served]:
    options = options or ServeOptions(local=True)
    service = LocalService(bundle, ModelOptions(**{"threads": 1, **choice}), options.images)
    with running(create_app(service, options)) as url:
        yield Served(url, service.models)


@contextmanager
def running(app: ASGIApp) -> Iterator[str]:
    """The address of an application; at the end it is stopped and closed."""
    opened = _listen("127.0.0.1", 0)
    config = uvicorn.Config(app, http=BoundedProtocol, log_config=None, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        opened.close()
        assert not thread.is_alive()


def data_url(image: bytes | Path) -> str:
    data = image if isinstance(image, bytes) else image.read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def ask(question: str, *images: bytes | Path | str) -> list[dict[str, Any]]:
    """Messages of one turn, images (files, bytes or URLs) first."""
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def user_part(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of one turn with one part."""
    return [{"role": "user", "content": [part]}]


def png_of(side: int, **more: Any) -> bytes:
    """A picture of noise, as a file."""
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **more)
    return file.getvalue()


def sentence(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


@contextmanager
def connected(served: Served, messages: list[dict[str, Any]], stream: bool) -> Iterator[socket.socket]:
    """A connection that has sent a request for a long answer, closed at the end."""
    content = json.dumps({"model": MODEL, "messages": messages, **LONG, "stream": stream}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    address = httpx.URL(served.url)
    with socket.create_connection((address.host, address.port or 0), timeout=20) as opened:
        opened.sendall(head.encode() + content)
        yield opened


@contextmanager
def held(found: Served, body: dict[str, Any]) -> Iterator[None]:
    """While a request is being answered, which is then answered well."""
    gate = Gate(found.models.open_models[0].scheduler)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(found.post, body)
        try:
            while not found.busy():
                time.sleep(0.001)
            yield
        finally:
            gate.open.set()
        assert answer.result().status_code == 200
