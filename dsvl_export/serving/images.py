"""Images of requests: data URLs, and URLs of allowed hosts."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from http.client import HTTPException
from time import monotonic
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener
from urllib.response import addinfourl

import numpy as np
from PIL import Image

from dsvl_export.serving.errors import RequestError
from runtimes.errors import UserError, first_line
from runtimes.images import load_image

FETCH_SECONDS = 10
CHUNK = 1 << 16  # bytes that are read from another host at a time
MAX_SCHEME = 64  # characters of a URL that are searched for its scheme
URL_SPACE = "".join(map(chr, range(33)))  # removed around a URL: C0 controls and space
ASCII_SPACE = "\t\n\f\r "
NEWLINES = dict.fromkeys(map(ord, "\t\n\r"))  # removed from URLs
BASE64_SPACE = dict.fromkeys(map(ord, ASCII_SPACE))
HEX_VALUES = np.full(256, -1, np.int16)
for _value, _digit in enumerate("0123456789abcdef"):
    HEX_VALUES[[ord(_digit), ord(_digit.upper())]] = _value
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow starts programs for some other formats


@dataclass(frozen=True)
class ImageLimits:
    """Limits of the images of a request.

    Attributes:
        pixels: maximum of one image, checked before it is decoded.
        images: maximum number in one request.
        bytes: maximum size of a downloaded image, and of all images of a request.
        hosts: hosts whose http and https URLs are downloaded; redirects are not followed.
    """

    pixels: int = 40_000_000
    images: int = 16
    bytes: int = 20_000_000
    hosts: frozenset[str] = frozenset()


def image_file(url: str, limits: ImageLimits, where: str) -> bytes:
    """Return the content of a URL; may wait for another host.

    Args:
        url: a ``data:`` URL, an ``http(s):`` URL of an allowed host, or base64 without a scheme.
        limits: maximum size, and allowed hosts.
        where: name of the image in the request, for errors.

    Raises:
        RequestError: the URL is not valid, or its file cannot be fetched.
    """
    scheme, url = _scheme(url), url.strip(URL_SPACE)
    if scheme is None:
        try:
            return decode_base64(url, where)
        except RequestError as error:
            message = f"{where} is neither a URL nor base64; pass a URL such as data:image/png;base64,…."
            raise RequestError(400, message, param=where) from error
    return read_data_url(url, where) if scheme == "data" else _download(url, limits, where)


def is_remote(url: str) -> bool:
    """Return whether the file of a URL is on another host."""
    return _scheme(url) not in (None, "data")


def _scheme(url: str) -> str | None:
    """Return the scheme of a URL in lower case; None without a colon."""
    scheme, colon, _ = url.lstrip(URL_SPACE)[:MAX_SCHEME].partition(":")
    return scheme.lower() if colon else None


def check_image(data: bytes, limits: ImageLimits, where: str) -> None:
    """Check that a file is an image within the limits that can be decoded.

    Raises:
        RequestError: it is not.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise RequestError(400, f"{where} has too many pixels to decode safely.", param=where) from error
    except Exception as error:  # Pillow's decoders raise many types
        kinds = ", ".join(FORMATS)
        raise RequestError(400, f"{where} is not a readable image; use {kinds}.", param=where) from error
    if width * height > limits.pixels:
        raise RequestError(
            400, f"{where} has {width} × {height} pixels; the limit is {limits.pixels} pixels.", param=where
        )
    try:
        load_image(data)
    except UserError as error:
        raise RequestError(400, f"{where} is damaged: {error}", param=where) from error


def read_data_url(url: str, where: str) -> bytes:
    """Return the content of a ``data:`` URL, by the Fetch standard's "data: URL processor".

    The media type is ignored; the first bytes of the content decide.

    Raises:
        RequestError: it has no comma, or its base64 is not valid.
    """
    url = url.translate(NEWLINES).partition("#")[0]  # as URLs are parsed
    head, comma, content = url.partition(",")
    if not comma:
        raise RequestError(400, f"{where}: a data URL has the form data:image/png;base64,….", param=where)
    data = _percent_decoded(content.encode())
    _, semicolon, last = head.strip(ASCII_SPACE).rpartition(";")
    if semicolon and last.lstrip(" ").lower() == "base64":
        return decode_base64(data.decode("latin-1"), where)
    return data


def _percent_decoded(text: bytes) -> bytes:
    """Decode ``%41`` to ``A``; urllib takes 10 seconds for 30 MB of them."""
    if b"%" not in text:
        return text
    codes = np.frombuffer(text + b"\0\0", np.uint8)
    places = np.flatnonzero(codes == ord("%"))
    high, low = HEX_VALUES[codes[places + 1]], HEX_VALUES[codes[places + 2]]
    valid = (high >= 0) & (low >= 0)
    places, decoded = places[valid], codes[:-2].copy()
    decoded[places] = high[valid] * 16 + low[valid]
    return np.delete(decoded, np.concatenate([places + 1, places + 2])).tobytes()


def decode_base64(text: str, where: str) -> bytes:
    """Decode base64 by the Infra standard's "forgiving-base64 decode".

    White space and padding are ignored.

    Raises:
        RequestError: it is not valid.
    """
    text = text.translate(BASE64_SPACE)
    if len(text) % 4 == 0:
        text = text.removesuffix("=").removesuffix("=")
    try:
        if "=" in text:
            raise ValueError("padding is only allowed at the end")
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:  # binascii.Error is one
        url_safe = "-" in text or "_" in text
        hint = " It uses the URL-safe alphabet; replace - by + and _ by /." if url_safe else ""
        raise RequestError(400, f"{where}: the data URL is not valid base64.{hint}", param=where) from error


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *arguments: object) -> None:
        return None


def _download(url: str, limits: ImageLimits, where: str) -> bytes:
    """Return the content of an ``http(s):`` URL of an allowed host."""
    try:
        address = urlsplit(url)
        host = (address.hostname or "").lower()
    except ValueError:
        address, host = urlsplit(""), ""
    if address.scheme not in ("http", "https") or host not in limits.hosts:
        hosts = f" and URLs of {', '.join(sorted(limits.hosts))}" if limits.hosts else ""
        raise RequestError(400, f"{where}: this server accepts only data URLs{hosts}.", param=where)
    try:
        response: addinfourl
        with build_opener(_NoRedirects).open(Request(url), timeout=FETCH_SECONDS) as response:
            data, until = b"", monotonic() + FETCH_SECONDS
            while (chunk := response.read(CHUNK)) and len(data) <= limits.bytes:
                data += chunk
                if monotonic() > until:
                    raise TimeoutError(f"it took more than {FETCH_SECONDS} seconds")
    except (URLError, OSError, ValueError, HTTPException) as error:
        reason = first_line(error)
        raise RequestError(
            400, f"{where}: cannot download the image from {host} ({reason}).", param=where
        ) from error
    if len(data) > limits.bytes:
        raise RequestError(400, f"{where} has more than {limits.bytes} bytes.", param=where)
    return data
