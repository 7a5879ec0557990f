"""Write an IR. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino

from runtimes.backends.openvino_requests import reason


def write_ir(model: Any, file: Path) -> None:
    """Write a model as ``file`` (``.xml``) and, beside it, ``.bin``; the types stay as they are.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    try:
        openvino.save_model(model, file, compress_to_fp16=False)
    except RuntimeError as error:
        raise OSError(f"{file} cannot be written ({reason(error)})") from error
