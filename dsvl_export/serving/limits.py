"""Limits of a request, checked before any of it is kept."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsvl_export.serving.errors import RequestError, quoted

MAX_HEADERS, MAX_HEADER_BYTES = 64, 16_384
MAX_LARGEST_BODIES = 8  # bodies of the maximum size in memory at a time
LOCAL = ("localhost", "127.0.0.1", "[::1]")


class RequestLimits:
    """ASGI middleware that checks host, token and headers, and reads bodies within limits."""

    def __init__(
        self,
        app: ASGIApp,
        paths: Sequence[str],
        token: str | None,
        guarded: Sequence[str],
        local: bool,
        max_bytes: int,
        seconds: float,
    ) -> None:
        """Wrap an application.

        Args:
            app: the application.
            paths: paths whose bodies are read; other paths get no body.
            token: the bearer token of the guarded paths; None requires none.
            guarded: prefixes of the guarded paths.
            local: accept only host names of this machine, against DNS rebinding.
            max_bytes: maximum size of a body.
            seconds: time in which the body must arrive.
        """
        self._app, self._paths, self._guarded, self._local = app, paths, tuple(guarded), local
        self._token = None if token is None else token.encode()
        self._max_bytes, self._seconds = max_bytes, seconds
        self._held = 0  # bytes of the bodies of all requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and pass it to the application or answer with an error."""
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
                    return  # the client disconnected
                await self._app(scope, _replay(body, receive), send)
            finally:
                self._held -= held[0]
        except RequestError as error:
            await refuse(send, error)
        except asyncio.TimeoutError:
            message = f"The body did not arrive within {self._seconds:g} seconds."
            await refuse(send, RequestError(408, message))

    def _check_headers(self, scope: Scope) -> None:
        """Raise RequestError if the headers, the host, the token or the length are refused."""
        headers = scope["headers"]
        total = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > MAX_HEADERS or total > MAX_HEADER_BYTES:
            raise RequestError(
                431, f"The request has more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them."
            )
        values = dict(headers)
        host = values.get(b"host", b"").decode("latin-1")
        # Browsers always send a host; a health check with HTTP/1.0 may not.
        if self._local and host and _without_port(host).lower() not in LOCAL:
            raise RequestError(
                403, f"This server accepts only the hosts {', '.join(LOCAL)}, not {quoted(host)}."
            )
        if self._token is not None and scope["path"].startswith(self._guarded):
            kind, _, token = values.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(token, self._token):
                raise RequestError(
                    401, "The bearer token is missing or wrong.", "authentication_error", "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        length = values.get(b"content-length", b"")
        if length.isdigit() and (len(length) > 18 or int(length) > self._max_bytes):
            raise self._too_large()

    async def _read(self, receive: Receive, held: list[int]) -> list[bytes] | None:
        """Read the body and count its bytes in ``held``; return None if the client disconnects."""
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            if held[0] + len(part) > self._max_bytes:
                raise self._too_large()
            if self._held + len(part) > MAX_LARGEST_BODIES * self._max_bytes:
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
        return RequestError(413, f"The body is larger than the limit of {self._max_bytes} bytes.")


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return name if port.isdigit() and name else host


def _replay(parts: list[bytes], receive: Receive) -> Receive:
    """Return a ``receive`` that gives the body once, then the end of the connection."""

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
