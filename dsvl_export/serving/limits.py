"""What a connection may send, checked before anything of it is kept."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsvl_export.serving.errors import RequestError, quoted

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
            held = [0]
            try:
                body = await asyncio.wait_for(self._read(receive, held), self._seconds)
                if body is None:
                    return  # the client went away
                await self._app(scope, _replayed(body, receive), send)
            finally:
                self._held -= held[0]
        except RequestError as error:
            await refuse(send, error)
        except asyncio.TimeoutError:
            late = f"The body did not arrive within {self._seconds:g} seconds."
            await refuse(send, RequestError(408, late))

    def _check_headers(self, scope: Scope) -> None:
        headers = scope["headers"]
        total = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > HEADERS or total > HEADER_BYTES:
            raise RequestError(431, f"The request has more than {HEADERS} headers or {HEADER_BYTES} bytes.")
        given = dict(headers)
        host = given.get(b"host", b"").decode("latin-1")
        # Browsers name a host always; a health check that speaks HTTP/1.0 may not.
        if self._local and host and _without_port(host).lower() not in LOCAL:
            raise RequestError(403, f"This server answers to {', '.join(LOCAL)} only, not to {quoted(host)}.")
        if self._token is not None and scope["path"].startswith(self._guarded):
            kind, _, token = given.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(token, self._token):
                raise RequestError(
                    401, "The bearer token is missing or wrong.", "authentication_error", "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        length = given.get(b"content-length", b"")
        if length.isdigit() and (len(length) > 18 or int(length) > self._body):
            raise self._too_large()

    async def _read(self, receive: Receive, held: list[int]) -> list[bytes] | None:
        """Collect the body, counting its bytes in ``held``; None where the client went away."""
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            if held[0] + len(part) > self._body:
                raise self._too_large()
            if self._held + len(part) > HELD * self._body:
                raise RequestError(
                    503, "Too many large requests are being answered; try again in a moment.",
                    "server_error", headers={"Retry-After": "1"},
                )  # fmt: skip
            self._held += len(part)
            held[0] += len(part)
            parts.append(part)
            if not message.get("more_body"):
                return parts

    def _too_large(self) -> RequestError:
        return RequestError(413, f"The body is larger than the {self._body} bytes that this server takes.")


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return name if port.isdigit() and name else host


def _replayed(parts: list[bytes], receive: Receive) -> Receive:
    """The body that was read, which is then forgotten; then what comes next: the end of the connection."""

    async def replay() -> Message:
        if not parts:
            return await receive()
        body = b"".join(parts)
        parts.clear()
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def refuse(send: Send, error: RequestError) -> None:
    """Answer with an error, and close the connection."""
    headers, body = error.encoded()
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
