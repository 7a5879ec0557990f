"""The HTTP face of a bundle: the OpenAI chat protocol, health, metrics and a web page."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from dsvl_export.serving.errors import RequestError, request_error
from dsvl_export.serving.images import ImageLimits, read_image
from dsvl_export.serving.limits import RequestLimits
from dsvl_export.serving.metrics import CountRequests, Metrics
from dsvl_export.serving.models import Model, Models
from dsvl_export.serving.protocol import ChatRequest, Completion, Conversation, conversation, read_request
from dsvl_export.version import __version__
from runtimes.chain import Prompt
from runtimes.errors import UserError
from runtimes.prompt import format_chat
from runtimes.sampling import GenerationOptions
from runtimes.scheduler import Step

BODY_SECONDS = 30
PREPARING = 2  # requests whose images are decoded at a time
# The page is one file: nothing is loaded from elsewhere, and nothing may frame it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CLIENT_GONE = 499  # a status for the metrics alone, as nginx has it
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeOptions:
    """What the server takes.

    Args:
        token: the bearer token that requests must have; None asks for none.
        longest: tokens of an answer where the request does not say.
        drafts: whether an answer that is written alone may guess what repeats.
        seconds: after which a request is given up.
        body: bytes of a request.
        images: of a request.
    """

    token: str | None = None
    longest: int = 512
    drafts: bool = True
    seconds: float = 300.0
    body: int = 32_000_000
    images: ImageLimits = field(default_factory=ImageLimits)


def create_app(models: Models, options: ServeOptions) -> FastAPI:
    """The application; closing it finishes the requests that were taken."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(models.close)

    app = FastAPI(
        title="dsvl-export", version=__version__, lifespan=lifespan,
        openapi_url=None, docs_url=None, redoc_url=None,
    )  # fmt: skip
    metrics, page = Metrics(models), files("dsvl_export.serving").joinpath("page.html").read_text("utf-8")
    preparing = asyncio.Semaphore(PREPARING)

    async def authorised(request: Request) -> None:
        if options.token is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), options.token.encode()):
            raise RequestError(
                401, "The bearer token is missing or wrong.", "authentication_error", "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    @app.exception_handler(Exception)  # which the server logs
    @app.exception_handler(UserError)
    async def refused(request: Request, error: Exception) -> Response:
        known = request_error(error)
        return JSONResponse(known.document(), known.status, known.headers)

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> Response:
        sentence = {
            404: f"There is no {request.url.path} here.",
            405: f"{request.url.path} does not take {request.method}.",
        }.get(error.status_code, str(error.detail))
        return JSONResponse(RequestError(error.status_code, sentence).document(), error.status_code)

    @app.get("/", response_class=HTMLResponse)
    async def web_page() -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(page, headers=headers)

    @app.get("/healthz")
    async def health() -> Response:
        if (file := models.changed()) is not None:
            return JSONResponse({"status": "changed", "detail": f"{file} of the bundle changed."}, 503)
        return JSONResponse({"status": "ok", "models": [model.name for model in models.open]})

    @app.get("/metrics", dependencies=[Depends(authorised)])
    async def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=[Depends(authorised)])
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [describe(models, name) for name in models.names]}

    @app.get("/v1/models/{name:path}", dependencies=[Depends(authorised)])
    async def one_model(name: str) -> dict[str, Any]:
        if name not in models.names:
            raise RequestError(404, f"There is no model {name!r} here.", code="model_not_found")
        return describe(models, name)

    @app.post("/v1/chat/completions", dependencies=[Depends(authorised)])
    async def chat(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise RequestError(415, "The body must be application/json.")
        asked = read_request(await request.body())
        generation = asked.options(options.longest, options.drafts)
        talk = conversation(asked.messages, options.images.images)
        model = await run_in_threadpool(models.get, asked.model)
        async with preparing:
            prompt = await run_in_threadpool(prepare, model, talk, options.images)
        steps = _steps(model, prompt, generation, options.seconds, asked.stream)
        completion = Completion(model.name, model.pipeline.chain.tokenizer)
        wanted = steps.__anext__() if asked.stream else _last(steps)
        found = await _unless_gone(request, wanted)
        if found is None:
            return Response(status_code=CLIENT_GONE)
        if asked.stream:
            events = _events(asked, completion, found, steps, model, metrics)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        assert found.answer
        metrics.answered(model.name, found.answer)
        return JSONResponse(completion.whole(found.answer))

    app.add_middleware(RequestLimits, body=options.body, seconds=BODY_SECONDS)
    app.add_middleware(CountRequests, metrics=metrics)
    return app


def describe(models: Models, name: str) -> dict[str, Any]:
    """A model as the protocol lists it."""
    backend, precision = name.split("/")
    return {
        "id": name, "object": "model", "created": 0, "owned_by": "dsvl-export", "backend": backend,
        "precision": precision, "default": name == models.default,
        "open": any(model.name == name for model in models.open),
    }  # fmt: skip


def prepare(model: Model, talk: Conversation, limits: ImageLimits) -> Prompt:
    """Read the images and tokenize; raises RequestError or UserError."""
    images = [read_image(url, limits, f"image {place}") for place, url in enumerate(talk.urls, 1)]
    system = model.pipeline.system_prompt if talk.system is None else talk.system
    return model.pipeline.chain.prepare(format_chat(talk.turns, system), images)


async def _steps(
    model: Model, prompt: Prompt, options: GenerationOptions, seconds: float, stream: bool
) -> AsyncIterator[Step]:
    """A request's steps, or its last one alone; leaving early cancels it."""
    loop, found = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def deliver(step: Step | Exception) -> None:
        loop.call_soon_threadsafe(found.put_nowait, step)

    job = model.scheduler.submit(prompt, options, deliver, seconds, stream)
    try:
        while True:
            step = await found.get()
            if isinstance(step, Exception):
                raise step
            yield step
            if step.answer:
                return
    finally:
        job.cancel()


async def _last(steps: AsyncIterator[Step]) -> Step:
    async for step in steps:  # noqa: B007
        pass
    return step


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


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    asked: ChatRequest,
    completion: Completion,
    first: Step,
    steps: AsyncIterator[Step],
    model: Model,
    metrics: Metrics,
) -> AsyncIterator[str]:
    """Server-sent events of a stream; an error on the way is the last of them."""
    yield _event(completion.chunk(first=True))
    step = first
    try:
        while True:
            if step.text or step.logprobs:
                yield _event(completion.chunk(step.text, step.logprobs))
            if step.answer:
                break
            step = await steps.__anext__()
    except Exception as error:
        known = request_error(error)
        if known.status == 500:
            log.error("a stream failed", exc_info=error)
        yield _event(known.document())
        return
    finally:
        await steps.aclose()  # type: ignore[attr-defined]
    metrics.answered(model.name, step.answer)
    yield _event(completion.chunk(reason=step.answer.finish_reason))
    if asked.wants_usage:
        yield _event(completion.usage_chunk(step.answer))
    yield "data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
