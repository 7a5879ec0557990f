"""Connections that send no whole request, or read no answer, are closed, which uvicorn leaves open."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = STALL_SECONDS = 30


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 with time limits for the head of a connection's first request, and for a client to read on."""

    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        asyncio.get_running_loop().call_later(HEAD_SECONDS, self._check_head)

    def _check_head(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = asyncio.get_running_loop().call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reads_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self._reads_on()
        super().connection_lost(exc)

    def _reads_on(self) -> None:
        if self._stall:
            self._stall.cancel()
            self._stall = None
