"""What a connection may send, checked before anything of it is kept."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsvl_export.serving.errors import RequestError

HEADERS, HEADER_BYTES = 64, 16_384
HELD = 8  # bodies of the largest size that are held at a time
LOCAL = ("localhost", "127.0.0.1", "[::1]")


class RequestLimits:
    """ASGI middleware: refuses what may not be asked, and reads bodies within their limits.

    Args:
        paths: those whose bodies are read; all others get none.
        token: the bearer token of ``guarded`` paths; None asks for none.
        guarded: beginnings of paths.
        local: whether only names of this machine are served, so that no web page elsewhere can pose as it.
        body: bytes.
        seconds: for the body to arrive.
    """

    def __init__(
        self,
        app: ASGIApp,
        paths: Sequence[str],
        token: str | None,
        guarded: Sequence[str],
        local: bool,
        body: int,
        seconds: float,
    ) -> None:
        self._app, self._paths, self._guarded, self._local = app, paths, tuple(guarded), local
        self._token = None if token is None else token.encode()
        self._body, self._seconds = body, seconds
        self._held = 0  # bytes of the bodies of all requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_headers(scope)
            if scope["method"] != "POST" or scope["path"] not in self._paths:
                await self._app(scope, receive, send)
                return
            parts: list[bytes] = []
            try:
                if not await asyncio.wait_for(self._read(receive, parts), self._seconds):
                    return  # the client went away
                await self._app(scope, _replayed(parts, receive), send)
            finally:
                self._held -= sum(map(len, parts))
        except RequestError as error:
            await _refuse(send, error)
        except asyncio.TimeoutError:
            late = f"The body did not arrive within {self._seconds:g} seconds."
            await _refuse(send, RequestError(408, late))

    def _check_headers(self, scope: Scope) -> None:
        headers = scope["headers"]
        total = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > HEADERS or total > HEADER_BYTES:
            raise RequestError(431, f"The request has more than {HEADERS} headers or {HEADER_BYTES} bytes.")
        given = dict(headers)
        host = given.get(b"host", b"").decode("latin-1")
        if self._local and _without_port(host).lower() not in LOCAL:
            raise RequestError(403, f"This server answers to {', '.join(LOCAL)} alone, not to {host!r}.")
        if self._token is not None and scope["path"].startswith(self._guarded):
            kind, _, token = given.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(token, self._token):
                raise RequestError(
                    401, "The bearer token is missing or wrong.", "authentication_error", "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        length = given.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._body:
            raise self._too_large()

    async def _read(self, receive: Receive, parts: list[bytes]) -> bool:
        """Collect the body; False where the client went away."""
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            part = message.get("body", b"")
            size += len(part)
            if size > self._body:
                raise self._too_large()
            if self._held + len(part) > HELD * self._body:
                raise RequestError(
                    503, "Too many large requests are being answered; try again in a moment.",
                    "server_error", headers={"Retry-After": "1"},
                )  # fmt: skip
            self._held += len(part)
            parts.append(part)
            if not message.get("more_body"):
                return True

    def _too_large(self) -> RequestError:
        return RequestError(413, f"The body is larger than the {self._body} bytes that this server takes.")


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return name if port.isdigit() and name else host


def _replayed(parts: Sequence[bytes], receive: Receive) -> Receive:
    """The body that was read, then what comes next: the end of the connection."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": b"".join(parts), "more_body": False}

    return replay


async def _refuse(send: Send, error: RequestError) -> None:
    body = json.dumps(error.document()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # what the client still sends is not read
        *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
