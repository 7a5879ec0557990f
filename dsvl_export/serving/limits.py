"""What a connection may send, checked before anything of it is kept."""

from __future__ import annotations

import asyncio
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsvl_export.serving.errors import RequestError

HEADERS, HEADER_BYTES = 64, 16_384


class RequestLimits:
    """ASGI middleware: reads a request's body within its limits, then hands it on whole.

    Args:
        body: bytes.
        seconds: for the body to arrive.
    """

    def __init__(self, app: ASGIApp, body: int, seconds: float) -> None:
        self._app, self._body, self._seconds = app, body, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_headers(scope)
            body = await asyncio.wait_for(self._read(receive), self._seconds)
        except RequestError as error:
            await _refuse(send, error)
            return
        except asyncio.TimeoutError:
            late = f"The body did not arrive within {self._seconds:g} seconds."
            await _refuse(send, RequestError(408, late))
            return
        if body is None:
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()  # the end of the connection
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _check_headers(self, scope: Scope) -> None:
        headers = scope["headers"]
        total = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > HEADERS or total > HEADER_BYTES:
            raise RequestError(431, f"The request has more than {HEADERS} headers or {HEADER_BYTES} bytes.")
        for name, value in headers:
            if name == b"content-length" and value.isdigit() and int(value) > self._body:
                raise self._too_large()

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None where the client went away."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self._body:
                raise self._too_large()
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_large(self) -> RequestError:
        return RequestError(413, f"The body is larger than the {self._body} bytes that this server takes.")


async def _refuse(send: Send, error: RequestError) -> None:
    body = json.dumps(error.document()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # what the client still sends is not read
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
