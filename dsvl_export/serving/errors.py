"""Errors of a request, in the form of the OpenAI protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from runtimes.errors import UserError
from runtimes.scheduler import BusyError, ClosedError, DeadlineError

INTERNAL = "The server failed at this request; its log says why."


def quoted(text: str, most: int = 80) -> str:
    """A value of the client's as an error quotes it: on one line, cut where it is long."""
    return repr(text if len(text) <= most else f"{text[:most]}…")


class RequestError(UserError):
    """A request that is answered with a status and one sentence.

    Args:
        status: of HTTP.
        kind, code: ``type`` and ``code`` of the protocol's error object.
        param: the field of the request that is at fault.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        sentence: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(sentence)
        self.status, self.kind, self.code, self.param = status, kind, code, param
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        """As it comes from another process."""
        return RequestError, (self.status, str(self), self.kind, self.code, self.param, self.headers)

    def document(self) -> dict[str, Any]:
        """The body of the response."""
        return {
            "error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code},
        }

    def encoded(self) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Headers and body of a response after which the connection is closed."""
        body = json.dumps(self.document()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),  # what the client still sends is not read
            *((name.lower().encode(), value.encode()) for name, value in self.headers.items()),
        ]
        return headers, body


def unavailable(sentence: str) -> RequestError:
    """The request is well, and may be answered later."""
    return RequestError(503, sentence, "server_error", headers={"Retry-After": "5"})


def request_error(error: Exception) -> RequestError:
    """What any error of a request is told as."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ClosedError):
        return unavailable(str(error))
    if isinstance(error, BusyError):
        return RequestError(429, str(error), "rate_limit_error", "busy", headers={"Retry-After": "1"})
    if isinstance(error, DeadlineError):
        return RequestError(504, str(error), "timeout_error", "late")
    if isinstance(error, UserError):
        return RequestError(400, str(error))
    return RequestError(500, INTERNAL, "server_error")
