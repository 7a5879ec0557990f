"""Errors of a request, in the form of the OpenAI API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from runtimes.errors import UserError
from runtimes.job import BusyError, ClosedError, DeadlineError

INTERNAL = "The server failed at this request; its log has the reason."


def quoted(text: str, max_length: int = 80) -> str:
    """Quote a value of the client for an error: on one line, and cut if it is long."""
    return repr(text if len(text) <= max_length else f"{text[:max_length]}…")


class RequestError(UserError):
    """An error that is answered with an HTTP status and a message."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Create an error.

        Args:
            status: HTTP status.
            message: one sentence that says what is wrong.
            kind: ``type`` of the API's error object.
            code: ``code`` of the API's error object.
            param: the field of the request that is wrong.
            headers: headers of the response.
        """
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling, for errors of replicas."""
        return RequestError, (self.status, str(self), self.kind, self.code, self.param, self.headers)

    def document(self) -> dict[str, Any]:
        """Return the body of the response."""
        return {
            "error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code},
        }

    def encoded(self) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Return headers and body of a response after which the connection is closed."""
        body = json.dumps(self.document()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),  # the rest of the request is not read
            *((name.lower().encode(), value.encode()) for name, value in self.headers.items()),
        ]
        return headers, body


def unavailable(message: str) -> RequestError:
    """Return the error for a valid request that the server cannot answer now."""
    return RequestError(503, message, "server_error", headers={"Retry-After": "5"})


def request_error(error: Exception) -> RequestError:
    """Return the error that the client gets for any exception."""
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
