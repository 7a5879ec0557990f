"""File signatures: checks by its first bytes that a file is what its name says."""

from __future__ import annotations

import codecs
from pathlib import Path

from runtimes.errors import UserError

_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_TORCH_SIGNATURES = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # the zip format, the legacy format


def check_file_signature(file: Path) -> None:
    """Check that a checkpoint's file is not empty, a Git LFS pointer, a web page or another format.

    A JSON file must not start with a byte order mark: neither ``json`` nor ``tokenizers`` reads it.

    Raises:
        UserError: the file cannot be read, or is not what its name says.
    """
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is not a regular file.")
    try:
        with file.open("rb") as handle:
            start = handle.read(128)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    if not start:
        raise UserError(f"{file} is empty; download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{file} is a Git LFS pointer, not the file itself; run 'git lfs pull' in its folder."
        )
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{file} is an HTML page, not a checkpoint file; download it again.")
    if file.suffix == ".json" and start.startswith(_BYTE_ORDER_MARKS):
        raise UserError(f"{file} starts with a byte order mark; save it as UTF-8 without one.")
    if file.suffix == ".bin" and start[8:10] == b'{"':
        raise UserError(f"{file} is a safetensors file; rename it to model.safetensors.")
    if file.suffix == ".safetensors" and start.startswith(_TORCH_SIGNATURES):
        raise UserError(
            f"{file} is a file of torch.save, not of safetensors; rename it to pytorch_model.bin."
        )
