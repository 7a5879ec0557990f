"""The command that serves a bundle."""

from __future__ import annotations

import logging
import signal
import socket
from contextlib import ExitStack, suppress
from typing import Annotated, Optional
from urllib.parse import urlsplit

import typer

from dsvl_export.cli.app import app
from dsvl_export.cli.options import (
    Backend,
    BundleFolder,
    Capacity,
    Device,
    Drafts,
    Precision,
    Threads,
    TrustEngine,
    Verify,
)
from dsvl_export.terminal import say
from runtimes.errors import UserError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
BACKLOG = 512  # connections that are not accepted yet


@app.command()
def serve(
    bundle: BundleFolder,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    backend: Backend = None,
    precision: Precision = None,
    api_key: Annotated[
        Optional[str],
        typer.Option(envvar="DSVL_API_KEY", help="Bearer token that requests must have. Default: none."),
    ] = None,
    slots: Annotated[
        Optional[int],
        typer.Option(min=1, help="Requests answered at once. Default: up to 8, as the memory allows."),
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are told to retry.")] = 64,
    models: Annotated[
        int, typer.Option(min=1, help="Models (backend and precision) of the bundle open at a time.")
    ] = 2,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer where a request does not say, tokens.")
    ] = 512,
    drafts: Drafts = True,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a request is given up.")] = 300,
    max_body: Annotated[int, typer.Option(min=1, help="Megabytes of a request.")] = 32,
    max_images: Annotated[int, typer.Option(min=0, help="Images of a request.")] = 16,
    max_pixels: Annotated[int, typer.Option(min=1, max=89, help="Megapixels of an image.")] = 40,
    image_host: Annotated[
        Optional[list[str]],
        typer.Option(help="Host whose image URLs are fetched, repeatable. Default: data URLs only."),
    ] = None,
    allow_origin: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="ORIGIN",
            help="Origin of web pages elsewhere that may ask (CORS), as http://localhost:5173; '*' is any."
            " Repeatable. Default: none.",
        ),
    ] = None,
    device: Device = None,
    threads: Threads = None,
    capacity: Capacity = None,
    verify: Verify = True,
    trust_engine: TrustEngine = False,
    ray: Annotated[
        Optional[str],
        typer.Option(
            metavar="ADDRESS",
            help="Ray cluster whose machines answer: auto or HOST:PORT. The bundle must have the same path on"
            " all of them; --slots and --models are each replica's. Default: this process answers.",
        ),
    ] = None,
    replicas: Annotated[
        Optional[int],
        typer.Option(
            min=1, help="With --ray: processes that answer, of --threads each. Default: one for each machine."
        ),
    ] = None,
) -> None:
    """Serve a bundle: the OpenAI chat protocol at /v1, a web page at /, figures at /metrics.

    Several requests are answered at once. Ctrl-C (or SIGTERM) finishes what runs. With --ray the answers come
    from replicas on a Ray cluster; requests whose replica is lost before it began to answer go to another.

    Example: dsvl-export serve tiny-bundle
    """
    if replicas and not ray:
        raise UserError("--replicas are processes on a Ray cluster; give --ray ADDRESS.")
    try:
        import uvicorn

        from dsvl_export.serving.app import create_app
        from dsvl_export.serving.connection import BoundedProtocol
        from dsvl_export.serving.exchange import LocalService
        from dsvl_export.serving.images import ImageLimits
        from dsvl_export.serving.models import ModelOptions
        from dsvl_export.serving.service import ServeOptions, Service

        if ray:
            from dsvl_export.serving.deploying import deployed
    except ImportError as error:
        extras = "serve,ray" if ray else "serve"
        raise UserError(f"serve needs {error.name}; run: pip install 'dsvl-export[{extras}]'.") from error
    from dsvl_export import display
    from runtimes.bundle import Bundle
    from runtimes.engines.trust import trust_engines

    if trust_engine and ray:
        raise UserError(
            "--trust-engine is remembered on this machine alone; run a command with it on each machine of the"
            " cluster instead."
        )
    if trust_engine:
        trust_engines(Bundle.open(bundle))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    choice = ModelOptions(backend, precision, device, threads, capacity, slots, queue, models, verify)
    hosts = frozenset(each.lower() for each in image_host or ())
    limits = ImageLimits(max_pixels * 1_000_000, max_images, max_body * 1_000_000, hosts)
    options = ServeOptions(
        api_key or None, host in LOOPBACK and not api_key, max_new_tokens, drafts, timeout,
        max_body * 1_000_000, limits, tuple(map(_origin, allow_origin or ())),
    )  # fmt: skip
    with ExitStack() as stack:
        listening = stack.enter_context(_listen(host, port))
        address = listening.getsockname()
        place = f"{f'[{address[0]}]' if ':' in address[0] else address[0]}:{address[1]}"
        service: Service
        if ray:
            name = f"dsvl-export-{socket.gethostname()}-{place}"  # one server at a time has it
            replicated = deployed(ray, Bundle.open(bundle), choice, limits, replicas, name)
            service = stack.enter_context(replicated)
        else:
            service = LocalService(Bundle.open(bundle), choice, limits)
        config = uvicorn.Config(
            create_app(service, options), log_config=None, access_log=False, http=BoundedProtocol,
            server_header=False, ws="none",
            timeout_graceful_shutdown=int(timeout) + 5,
        )  # fmt: skip
        if host not in LOOPBACK and not api_key:
            display.err.print(
                "[yellow]Open to the network:[/] anybody who reaches it may ask; give --api-key."
            )
        if "*" in options.origins:
            display.err.print("[yellow]Open to web pages:[/] any page that a user visits may ask.")
        say(f"Serving {service.default} at http://{place} (Ctrl-C stops)")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):  # raised once the server has stopped
            uvicorn.Server(config).run(sockets=[listening])


def _origin(text: str) -> str:
    """An origin as browsers send it: scheme, host and port, in lower case."""
    try:
        parts = urlsplit(text.lower().rstrip("/"))
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    else:
        if parts.port is not None and parts.port == {"http": 80, "https": 443}.get(parts.scheme):
            text = text.rstrip("/").rpartition(":")[0]  # browsers leave it out
    if text != "*" and (not valid or parts.path or parts.query or parts.fragment or parts.username):
        raise UserError(f"--allow-origin takes http://HOST[:PORT], https://HOST[:PORT] or '*', not {text!r}.")
    return text.lower().rstrip("/")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off where TCP is named alone; with it a response takes 40 ms more.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise UserError(f"Cannot listen at {host} port {port}: {reason}.") from error
    return listening
