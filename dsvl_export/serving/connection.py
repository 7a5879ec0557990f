"""Time limits of a connection that uvicorn does not have, and errors in the form of the API."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsvl_export.serving.errors import RequestError, unavailable
from dsvl_export.serving.limits import refuse

MAX_CONNECTIONS = 512
HEAD_SECONDS = STALL_SECONDS = 30
LINGER_SECONDS = 2


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 with limits for slow clients and for the number of connections.

    While no request is being answered, the rest of the last body and the head of the next request
    must arrive within ``HEAD_SECONDS``; uvicorn only closes connections that send nothing. A client
    must read some of its answer within ``STALL_SECONDS``. After bytes that are not HTTP, the
    connection is read for ``LINGER_SECONDS`` more: closing it with unread bytes resets it, and the
    client may not see the answer (RFC 9112, section 9.6). Beyond ``MAX_CONNECTIONS``, the
    connection that has waited longest for a complete request is closed; if none waits, requests are
    answered with 503.
    """

    _stall: asyncio.TimerHandle | None = None
    _late: asyncio.TimerHandle | None = None
    _refused = False  # the request is not HTTP; nothing after it is parsed
    _since = 0.0  # time at which the connection began to wait for a request

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create the protocol of a connection, as uvicorn does."""
        super().__init__(*args, **kwargs)
        app = self.app

        async def limited(scope: Any, receive: Any, send: Any) -> None:
            if self._crowded:
                message = f"{MAX_CONNECTIONS} connections are open; try again in a moment."
                await refuse(send, unavailable(message))
            else:
                await app(scope, receive, send)

        self.app = limited

    def connection_made(self, transport: Any) -> None:
        """Start the time limit; close another connection if there are too many."""
        super().connection_made(transport)
        self._limit_request()
        if self._crowded:
            waiting = [other for other in self._open if other.waits and other is not self]
            if waiting:
                min(waiting, key=lambda other: other._since).transport.close()

    @property
    def _open(self) -> list[BoundedProtocol]:
        """Connections that are not closing; new ones may be made before a closed one is removed."""
        ours = (other for other in self.connections if isinstance(other, BoundedProtocol))
        return [other for other in ours if not other.transport.is_closing()]

    @property
    def _crowded(self) -> bool:
        """Whether there are too many connections."""
        return len(self.connections) > MAX_CONNECTIONS and len(self._open) > MAX_CONNECTIONS

    @property
    def waits(self) -> bool:
        """Whether the client has sent no complete request since its last one was answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def data_received(self, data: bytes) -> None:
        """Parse bytes of the client, unless the request was refused."""
        if self._refused:
            return
        super().data_received(data)
        self._limit_request()

    def on_response_complete(self) -> None:
        """Start the time limit of the next request."""
        super().on_response_complete()
        self._limit_request()

    def _limit_request(self) -> None:
        """Start the time limit while the connection waits for a request.

        Stop it during an answer.
        """
        if self._refused:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_clock()
        elif self._late is None and not self.transport.is_closing():
            self._since = self.loop.time()
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP, in the form of the API, unless an answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers, body = RequestError(400, msg).encoded()
            if self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD":
                body = b""
            response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (response, h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # the request whose body it was
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._refused = True
        self._stop_clock()
        self._late = self.loop.call_later(LINGER_SECONDS, self.transport.close)
        self.transport.write_eof()

    def pause_writing(self) -> None:
        """Watch whether the client reads the answer."""
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Stop watching: the client reads the answer."""
        super().resume_writing()
        self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._unwatch()
        self._stop_clock()
        super().connection_lost(exc)

    def _watch(self, unsent: int) -> None:
        """Check after ``STALL_SECONDS`` whether some of the unsent bytes were read."""
        self._stall = self.loop.call_later(STALL_SECONDS, self._abort_if_stalled, unsent)

    def _abort_if_stalled(self, unsent: int) -> None:
        """Abort the connection if the client has read nothing since the last check."""
        if (left := self.transport.get_write_buffer_size()) < unsent:
            self._watch(left)
        else:
            self.transport.abort()

    def _unwatch(self) -> None:
        if self._stall:
            self._stall.cancel()
            self._stall = None

    def _stop_clock(self) -> None:
        if self._late:
            self._late.cancel()
            self._late = None
