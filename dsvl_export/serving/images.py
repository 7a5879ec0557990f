"""Images of requests: data URLs, and remote ones of hosts that were allowed."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from http.client import HTTPException
from time import monotonic
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener
from urllib.response import addinfourl

from PIL import Image, UnidentifiedImageError

from dsvl_export.serving.errors import RequestError
from runtimes.errors import first_line

FETCH_SECONDS = 10
PIECE = 1 << 16  # bytes that are fetched at a time
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow knows others, some of which start programs


@dataclass(frozen=True)
class ImageLimits:
    """What an image may be.

    Args:
        pixels: the most of one image, checked before it is decoded.
        images: the most of one request.
        bytes: the most that is fetched of a remote one.
        hosts: whose http and https URLs are fetched; redirects are not followed.
    """

    pixels: int = 40_000_000
    images: int = 16
    bytes: int = 20_000_000
    hosts: frozenset[str] = frozenset()


def read_image(url: str, limits: ImageLimits, where: str) -> bytes:
    """The file that a URL stands for, which is an image of a size that may be decoded.

    Args:
        where: the place in the request, for the sentence.

    Raises:
        RequestError: it is not.
    """
    data = _data(url, where) if url.startswith("data:") else _fetched(url, limits, where)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, RuntimeError) as error:
        kinds = ", ".join(FORMATS)
        raise RequestError(
            400, f"{where} is no image that can be read; it may be {kinds}.", param=where
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(400, f"{where} has too many pixels to decode safely.", param=where) from error
    if width * height > limits.pixels:
        raise RequestError(
            400, f"{where} has {width} × {height} pixels, this server takes {limits.pixels}.", param=where
        )
    return data


def _data(url: str, where: str) -> bytes:
    head, comma, content = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RequestError(400, f"{where}: a data URL reads data:image/png;base64,….", param=where)
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, f"{where}: the data URL is not valid base64.", param=where) from error


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *arguments: object) -> None:
        return None


def _fetched(url: str, limits: ImageLimits, where: str) -> bytes:
    try:
        address = urlsplit(url)
        host = (address.hostname or "").lower()
    except ValueError:
        address, host = urlsplit(""), ""
    if address.scheme not in ("http", "https") or host not in limits.hosts:
        taken = f" or URLs of {', '.join(sorted(limits.hosts))}" if limits.hosts else ""
        raise RequestError(400, f"{where}: this server takes data URLs{taken} only.", param=where)
    try:
        response: addinfourl
        with build_opener(_NoRedirects).open(Request(url), timeout=FETCH_SECONDS) as response:
            data, until = b"", monotonic() + FETCH_SECONDS
            while (piece := response.read(PIECE)) and len(data) <= limits.bytes:
                data += piece
                if monotonic() > until:
                    raise TimeoutError(f"it took more than {FETCH_SECONDS} seconds")
    except (URLError, OSError, ValueError, HTTPException) as error:
        reason = first_line(error)
        raise RequestError(400, f"{where}: {host} did not give the image ({reason}).", param=where) from error
    if len(data) > limits.bytes:
        raise RequestError(400, f"{where} has more than {limits.bytes} bytes.", param=where)
    return data
