"""The HTTP front end of a bundle: OpenAI chat completions, health, metrics and a web page."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from dsvl_export.serving.completion import Completion
from dsvl_export.serving.errors import RequestError, quoted, request_error
from dsvl_export.serving.limits import RequestLimits
from dsvl_export.serving.metrics import CountRequests, Metrics
from dsvl_export.serving.openapi import openapi_document
from dsvl_export.serving.protocol import Conversation, parse_conversation, read_request
from dsvl_export.serving.service import AnswerStream, ModelRequest, ServeOptions, Service, split_model
from dsvl_export.version import __version__
from runtimes.errors import UserError
from runtimes.job import Step

CHAT, GUARDED = "/v1/chat/completions", ("/v1/", "/metrics")
BODY_SECONDS = 30
# The page is one file: it loads nothing else, and no other page can embed it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CLIENT_CLOSED_REQUEST = 499  # for the metrics only; nginx uses this status too
log = logging.getLogger(__name__)


def create_app(service: Service, options: ServeOptions) -> FastAPI:
    """Create the application; when it closes, it finishes the accepted requests."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="dsvl-export", version=__version__, lifespan=lifespan,
        openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False,
    )  # fmt: skip
    metrics, page = Metrics(service), files("dsvl_export.serving").joinpath("page.html").read_text("utf-8")

    @app.exception_handler(Exception)  # the server logs it
    @app.exception_handler(UserError)
    async def refused(request: Request, error: Exception) -> Response:
        answer = request_error(error)
        return JSONResponse(answer.document(), answer.status, answer.headers)

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> Response:
        message = {
            404: f"There is no path {request.url.path[:200]}; see /openapi.json.",
            405: f"{request.url.path} does not support the method {request.method[:20]}.",
        }.get(error.status_code, str(error.detail))
        return JSONResponse(
            RequestError(error.status_code, message).document(), error.status_code, error.headers
        )

    @app.api_route("/", methods=["GET", "HEAD"], response_class=HTMLResponse)
    async def web_page() -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(page, headers=headers)

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def health() -> Response:
        if (reason := await run_in_threadpool(service.health_problem)) is not None:
            return JSONResponse({"status": "unavailable", "detail": reason}, 503)
        return JSONResponse({"status": "ok", "models": service.open_models})

    document = openapi_document(service.names, options.token is not None)

    @app.get("/openapi.json")
    async def openapi() -> dict[str, Any]:
        return document

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [describe_model(service, name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        found = service.find_model(name)
        if found is None:
            raise RequestError(
                404,
                f"There is no model {quoted(name)}; GET /v1/models lists the models.",
                code="model_not_found",
            )
        return describe_model(service, found)

    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        _check_media_type(request)
        # request.body() would keep the body in memory beside the parsed request, which may be as
        # large.
        body = b"".join([part async for part in request.stream()])
        chat_request = await run_in_threadpool(read_request, body)
        del body
        tools = chat_request.callable_tools
        model_request = ModelRequest(
            chat_request.model,
            parse_conversation(chat_request.messages, options.images.images, tools),
            chat_request.options(options.max_new_tokens, options.drafts),
            bool(chat_request.stream),
            options.seconds,
        )
        wants_usage = chat_request.wants_usage
        del chat_request  # frees its copy of the images
        steps = service.submit(model_request)
        model_request = replace(model_request, conversation=Conversation())
        step = await _until_disconnected(request, steps.first())
        if step is None:
            steps.close()  # the first step may have been made at that moment
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        completion = Completion(steps.model, service.tokenizer, bool(tools))
        if model_request.stream:
            events = _events(wants_usage, completion, step, steps, metrics)
            return EventStreamResponse(events, steps)
        assert step.answer
        metrics.count_answer(steps.model, step.answer)
        return JSONResponse(completion.completion(step.answer))

    app.add_middleware(
        RequestLimits, paths=(CHAT,), token=options.token, guarded=GUARDED, local=options.local,
        max_bytes=options.max_body_bytes, seconds=BODY_SECONDS,
    )  # fmt: skip
    if options.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.origins, allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=["Retry-After"],
        )  # fmt: skip
    app.add_middleware(CountRequests, metrics=metrics)
    return app


class EventStreamResponse(StreamingResponse):
    """A response with server-sent events; it closes the answer stream, even if it never starts."""

    def __init__(self, events: AsyncIterator[str], steps: AnswerStream) -> None:
        """Prepare a response.

        Args:
            events: server-sent events.
            steps: the answer that the events are made from.
        """
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._steps = steps

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._steps.close()


def describe_model(service: Service, name: str) -> dict[str, Any]:
    """Return a model as OpenAI's list of models has it, with backend and precision.

    A model with an adapter has the base model as its ``parent``, as in vLLM.
    """
    base, adapter = split_model(name, service.default)
    backend, precision = base.split("/")
    return {
        "id": name, "object": "model", "created": 0, "owned_by": "dsvl-export", "backend": backend,
        "precision": precision, "default": name == service.default,
        "open": name in service.open_models, **({"parent": base} if adapter else {}),
    }  # fmt: skip


def _check_media_type(request: Request) -> None:
    """Refuse compressed bodies, and media types that need no CORS preflight."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise RequestError(415, "The body must be application/json; set the Content-Type header.")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise RequestError(415, "The body must not be compressed; send it without Content-Encoding.")


async def _until_disconnected(request: Request, step: Awaitable[Step]) -> Step | None:
    """Await a step; if the client disconnects before, cancel it and return None."""
    task = asyncio.ensure_future(step)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    usage: bool, completion: Completion, first: Step, steps: AnswerStream, metrics: Metrics
) -> AsyncIterator[str]:
    """Yield the server-sent events of an answer; an error is the last event."""
    step = first
    try:
        yield _event(completion.chunk(first=True, usage=usage))
        while True:
            if step.text or step.logprobs:
                yield _event(completion.chunk(step.text, step.logprobs, usage=usage))
            if step.answer:
                break
            step = await steps.next()
    except Exception as error:
        if not isinstance(error, UserError):  # errors of the model are logged already
            log.error("a stream failed", exc_info=error)
        metrics.count_failed_stream(steps.model)
        yield _event(request_error(error).document())
        return
    metrics.count_answer(steps.model, step.answer)
    yield _event(completion.chunk(reason=step.answer.finish_reason, usage=usage))
    if usage:
        yield _event(completion.usage_chunk(step.answer))
    yield "data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> str:
    """Return a document as a server-sent event."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
