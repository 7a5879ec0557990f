"""The command ``serve``, which starts an HTTP server."""

from __future__ import annotations

import logging
import signal
import socket
from contextlib import ExitStack, suppress
from typing import Annotated, Optional
from urllib.parse import urlsplit

import typer

from dsvl_export.cli.app import command
from dsvl_export.cli.completion import values
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
from dsvl_export.cli.terminal import say
from runtimes.errors import UserError
from runtimes.installation import PACKAGES

# Panels of the help.
ACCESS = "Network and access"
LIMITS = "Limits"
CLUSTER = "Ray cluster"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
BACKLOG = 512  # connections that are not accepted yet


@command("serve")
def serve(
    bundle: BundleFolder,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; 0.0.0.0 listens on all.",
            rich_help_panel=ACCESS,
            autocompletion=values("127.0.0.1", "0.0.0.0"),
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Port; 0 selects a free port.", rich_help_panel=ACCESS),
    ] = 8000,
    backend: Backend = None,
    precision: Precision = None,
    api_key: Annotated[
        Optional[str],
        typer.Option(
            envvar="DSVL_API_KEY",
            help="Bearer token that requests must contain. Default: none.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    slots: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="Number of requests to answer at a time. Default: up to 8, if memory allows.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    queue: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of requests that can wait; the server asks further ones to retry.",
            rich_help_panel=LIMITS,
        ),
    ] = 64,
    models: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of models (backend and precision) to keep open at a time.",
            rich_help_panel=LIMITS,
        ),
    ] = 2,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum length of an answer, in tokens, if the request does not set one.",
            rich_help_panel=LIMITS,
        ),
    ] = 512,
    drafts: Drafts = True,
    timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds after which a request is canceled.", rich_help_panel=LIMITS),
    ] = 300,
    max_body: Annotated[
        int, typer.Option(min=1, help="Maximum size of a request, in MB.", rich_help_panel=LIMITS)
    ] = 32,
    max_images: Annotated[
        int, typer.Option(min=0, help="Maximum number of images in a request.", rich_help_panel=LIMITS)
    ] = 16,
    max_pixels: Annotated[
        int,
        typer.Option(min=1, max=89, help="Maximum size of an image, in megapixels.", rich_help_panel=LIMITS),
    ] = 40,
    image_host: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Host to download images from, repeatable. Default: requests can only contain data URLs.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    allow_origin: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="ORIGIN",
            help="Origin of other web pages that can send requests (CORS), for example http://localhost:5173;"
            " '*' allows all. Repeatable. Default: none.",
            rich_help_panel=ACCESS,
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
            help="Ray cluster that runs the replicas: auto or HOST:PORT. The bundle must have the same path"
            " on all machines; --slots and --models apply to each replica. Default: this process answers.",
            rich_help_panel=CLUSTER,
            autocompletion=values("auto"),
        ),
    ] = None,
    replicas: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="With --ray: number of replicas, each with --threads. Default: one on each machine.",
            rich_help_panel=CLUSTER,
        ),
    ] = None,
) -> None:
    """Serve a bundle over HTTP: the OpenAI chat API at /v1, a web page at /, metrics at /metrics.

    Ctrl-C (or SIGTERM) stops the server after it has finished the running requests. With --ray,
    replicas on a Ray cluster answer; if a replica fails before it starts an answer, another one
    takes the request.

    Example: dsvl-export serve tiny-bundle
    """
    if replicas and not ray:
        raise UserError("--replicas needs a Ray cluster; pass --ray ADDRESS too.")
    try:
        import uvicorn

        from dsvl_export.serving.app import create_app
        from dsvl_export.serving.connection import BoundedProtocol
        from dsvl_export.serving.images import ImageLimits
        from dsvl_export.serving.local_service import LocalService
        from dsvl_export.serving.models import ModelOptions
        from dsvl_export.serving.service import ServeOptions, Service

        if ray:
            from dsvl_export.serving.ray_deployment import deploy_replicas
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:  # a defect of dsvl-export
            raise
        extras = "serve,ray" if ray else "serve"
        raise UserError(f"serve needs {error.name}; run: pip install 'dsvl-export[{extras}]'.") from error
    from dsvl_export.cli import display
    from runtimes.backends.engines.trust import trust_engines
    from runtimes.bundle.bundle import Bundle

    if trust_engine and ray:
        raise UserError(
            "--trust-engine applies to this machine only. Run a command with --trust-engine on each machine"
            " of the cluster first, then serve without it."
        )
    if trust_engine:
        trust_engines(Bundle.open(bundle))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    choice = ModelOptions(backend, precision, device, threads, capacity, slots, queue, models, verify)
    hosts = frozenset(name.lower() for name in image_host or ())
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
            replicated = deploy_replicas(ray, Bundle.open(bundle), choice, limits, replicas, name)
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
                "[yellow]No API key:[/] everyone on the network can send requests; pass --api-key."
            )
        if "*" in options.origins:
            display.err.print(
                "[yellow]All origins are allowed:[/] every web page that a user visits can send requests."
            )
        say(f"Serving {service.default} at http://{place} (Ctrl-C stops)")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):  # raised once the server has stopped
            uvicorn.Server(config).run(sockets=[listening])


def _origin(text: str) -> str:
    """Return an origin as browsers send it: scheme, host and port, in lower case."""
    try:
        parts = urlsplit(text.lower().rstrip("/"))
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    else:
        if parts.port is not None and parts.port == {"http": 80, "https": 443}.get(parts.scheme):
            text = text.rstrip("/").rpartition(":")[0]  # browsers leave it out
    if text != "*" and (not valid or parts.path or parts.query or parts.fragment or parts.username):
        raise UserError(
            f"--allow-origin must be http://HOST[:PORT], https://HOST[:PORT] or '*', not {text!r}."
        )
    return text.lower().rstrip("/")


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Naming TCP makes asyncio disable Nagle's algorithm, which delays a response by 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise UserError(f"Cannot listen on {host} port {port}: {reason}.") from error
    return listening
