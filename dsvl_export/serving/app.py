"""The HTTP face of a bundle: the OpenAI chat protocol, health, metrics and a web page."""

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
from dsvl_export.serving.protocol import Conversation, conversation, read_request
from dsvl_export.serving.service import Exchange, ServeOptions, Service, Work
from dsvl_export.version import __version__
from runtimes.errors import UserError
from runtimes.scheduler import Step

CHAT, GUARDED = "/v1/chat/completions", ("/v1/", "/metrics")
BODY_SECONDS = 30
# The page is one file: nothing is loaded from elsewhere, and nothing may frame it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CLIENT_GONE = 499  # a status for the metrics alone, as nginx has it
log = logging.getLogger(__name__)


def create_app(service: Service, options: ServeOptions) -> FastAPI:
    """The application; closing it finishes the requests that were taken."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="dsvl-export", version=__version__, lifespan=lifespan,
        openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False,
    )  # fmt: skip
    metrics, page = Metrics(service), files("dsvl_export.serving").joinpath("page.html").read_text("utf-8")

    @app.exception_handler(Exception)  # which the server logs
    @app.exception_handler(UserError)
    async def refused(request: Request, error: Exception) -> Response:
        known = request_error(error)
        return JSONResponse(known.document(), known.status, known.headers)

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> Response:
        sentence = {
            404: f"There is no {request.url.path[:200]} here.",
            405: f"{request.url.path} does not take {request.method[:20]}.",
        }.get(error.status_code, str(error.detail))
        return JSONResponse(
            RequestError(error.status_code, sentence).document(), error.status_code, error.headers
        )

    @app.api_route("/", methods=["GET", "HEAD"], response_class=HTMLResponse)
    async def web_page() -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(page, headers=headers)

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def health() -> Response:
        if (reason := await run_in_threadpool(service.ailing)) is not None:
            return JSONResponse({"status": "unavailable", "detail": reason}, 503)
        return JSONResponse({"status": "ok", "models": service.open})

    document = openapi_document(service.names, options.token is not None)

    @app.get("/openapi.json")
    async def described() -> dict[str, Any]:
        return document

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [describe(service, name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name not in service.names:
            raise RequestError(404, f"There is no model {quoted(name)} here.", code="model_not_found")
        return describe(service, name)

    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        _check_media_type(request)
        # Not request.body(), which keeps it: what is read of it may be as large.
        body = b"".join([part async for part in request.stream()])
        asked = await run_in_threadpool(read_request, body)
        del body
        work = Work(
            asked.model,
            conversation(asked.messages, options.images.images),
            asked.options(options.longest, options.drafts),
            bool(asked.stream),
            options.seconds,
        )
        wants_usage = asked.wants_usage
        del asked  # its images are in the work
        exchange = service.exchange(work)
        work = replace(work, talk=Conversation())
        found = await _unless_gone(request, exchange.first())
        if found is None:
            exchange.close()  # it may have begun at that moment
            return Response(status_code=CLIENT_GONE)
        completion = Completion(exchange.model, service.tokenizer)
        if work.stream:
            events = _events(wants_usage, completion, found, exchange, metrics)
            return EventStream(events, exchange)
        assert found.answer
        metrics.answered(exchange.model, found.answer)
        return JSONResponse(completion.whole(found.answer))

    app.add_middleware(
        RequestLimits, paths=(CHAT,), token=options.token, guarded=GUARDED, local=options.local,
        body=options.body, seconds=BODY_SECONDS,
    )  # fmt: skip
    if options.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.origins, allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=["Retry-After"],
        )  # fmt: skip
    app.add_middleware(CountRequests, metrics=metrics)
    return app


class EventStream(StreamingResponse):
    """A stream that gives back what its exchange holds however it ends, also before it began."""

    def __init__(self, events: AsyncIterator[str], exchange: Exchange) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.close()


def describe(service: Service, name: str) -> dict[str, Any]:
    """A model as the protocol lists it."""
    backend, precision = name.split("/")
    return {
        "id": name, "object": "model", "created": 0, "owned_by": "dsvl-export", "backend": backend,
        "precision": precision, "default": name == service.default,
        "open": name in service.open,
    }  # fmt: skip


def _check_media_type(request: Request) -> None:
    """Refuse what a web page elsewhere may send without being asked first, and compressed bodies."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise RequestError(415, "The body must be application/json; set the Content-Type header.")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise RequestError(415, "The body must not be compressed; send it without Content-Encoding.")


async def _unless_gone(request: Request, work: Awaitable[Step]) -> Step | None:
    """What the work gives; it is cancelled, and gives nothing, where the client goes away before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    usage: bool, completion: Completion, first: Step, exchange: Exchange, metrics: Metrics
) -> AsyncIterator[str]:
    """Server-sent events of a stream; an error on the way is the last of them."""
    step = first
    try:
        yield _event(completion.chunk(first=True, usage=usage))
        while True:
            if step.text or step.logprobs:
                yield _event(completion.chunk(step.text, step.logprobs, usage=usage))
            if step.answer:
                break
            step = await exchange.next()
    except Exception as error:
        if not isinstance(error, UserError):  # those of the model are logged already
            log.error("a stream failed", exc_info=error)
        metrics.failed(exchange.model)
        yield _event(request_error(error).document())
        return
    metrics.answered(exchange.model, step.answer)
    yield _event(completion.chunk(reason=step.answer.finish_reason, usage=usage))
    if usage:
        yield _event(completion.usage_chunk(step.answer))
    yield "data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
