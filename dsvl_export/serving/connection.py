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
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self, unsent: int) -> None:
        """Look again after a while, at how much of the bytes that wait has been taken."""
        self._stall = asyncio.get_running_loop().call_later(STALL_SECONDS, self._check_taken, unsent)

    def _check_taken(self, unsent: int) -> None:
        if (left := self.transport.get_write_buffer_size()) < unsent:
            self._watch(left)
        else:
            self.transport.abort()

    def _unwatch(self) -> None:
        if self._stall:
            self._stall.cancel()
            self._stall = None
