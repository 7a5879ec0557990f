"""Time limits of a connection, which uvicorn does not have, and its errors in the protocol's form."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsvl_export.serving.errors import RequestError, unavailable
from dsvl_export.serving.limits import refuse

MOST_CONNECTIONS = 512
HEAD_SECONDS = STALL_SECONDS = 30
LINGER_SECONDS = 2


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 with limits for what a client does slowly.

    While no request is being answered, the head of the next one, and the rest of the last one's body, must
    arrive within ``HEAD_SECONDS``, however the client divides them; uvicorn closes connections that send
    nothing. A client must take some of its answer within ``STALL_SECONDS``. After what is not HTTP, the
    connection is read for ``LINGER_SECONDS`` more, since closing it with unread bytes resets it, and the
    client may then not see the answer (RFC 9112, section 9.6). Beyond ``MOST_CONNECTIONS``, the
    one that has sent no whole request for longest is closed; if all have, requests are answered with 503.
    """

    _stall: asyncio.TimerHandle | None = None
    _late: asyncio.TimerHandle | None = None
    _refused = False  # the request is not HTTP; nothing after it is parsed
    _since = 0.0  # when the connection began to wait for its request

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        app = self.app

        async def limited(scope: Any, receive: Any, send: Any) -> None:
            if self._crowded:
                sentence = f"{MOST_CONNECTIONS} connections are open; try again in a moment."
                await refuse(send, unavailable(sentence))
            else:
                await app(scope, receive, send)

        self.app = limited

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._limit_request()
        if self._crowded:
            waiting = [each for each in self._open if each.waits and each is not self]
            if waiting:
                min(waiting, key=lambda each: each._since).transport.close()

    @property
    def _open(self) -> list[BoundedProtocol]:
        """Connections that are not about to be closed: several may be made before one is gone."""
        ours = (each for each in self.connections if isinstance(each, BoundedProtocol))
        return [each for each in ours if not each.transport.is_closing()]

    @property
    def _crowded(self) -> bool:
        return len(self.connections) > MOST_CONNECTIONS and len(self._open) > MOST_CONNECTIONS

    @property
    def waits(self) -> bool:
        """Whether the client has sent no whole request since its last one was answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        self._limit_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._limit_request()

    def _limit_request(self) -> None:
        """Start the clock of a request when the last one is answered; stop it when it is being answered."""
        if self._refused:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_clock()
        elif self._late is None and not self.transport.is_closing():
            self._since = self.loop.time()
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, in the protocol's form, unless an answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers, body = RequestError(400, msg).encoded()
            if self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD":
                body = b""
            response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (response, h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # whose body it was
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._refused = True
        self._stop_clock()
        self._late = self.loop.call_later(LINGER_SECONDS, self.transport.close)
        self.transport.write_eof()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        self._stop_clock()
        super().connection_lost(exc)

    def _watch(self, unsent: int) -> None:
        """Look again after a while, at how much of the bytes that wait has been taken."""
        self._stall = self.loop.call_later(STALL_SECONDS, self._check_taken, unsent)

    def _check_taken(self, unsent: int) -> None:
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
