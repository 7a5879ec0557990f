"""A limit of the MIL interpreter's CPU threads, which are those of numpy's BLAS."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

from runtimes.errors import UserError
from runtimes.installation import install_command

_LIMITED = Lock()  # the number of threads belongs to the process, so limited calls take turns


@contextmanager
def blas_threads(threads: int | None) -> Iterator[None]:
    """Limit the threads of numpy's BLAS while the context is open, and restore them afterward.

    Args:
        threads: the most threads; None changes nothing.

    Raises:
        UserError: a limit is given, and threadpoolctl is not installed.
    """
    if threads is None:
        yield
        return
    controller = _controller()
    with _LIMITED, controller.limit(limits=threads, user_api="blas"):
        yield


def check_threads(threads: int | None) -> None:
    """Raise UserError where a limit is given that ``blas_threads`` cannot set."""
    if threads is not None:
        _controller()


@cache
def _controller() -> Any:
    """Return threadpoolctl's controller of the loaded BLAS libraries, numpy's among them."""
    try:
        from threadpoolctl import ThreadpoolController  # optional
    except ModuleNotFoundError as error:
        raise UserError(
            "A limit of CPU threads (--threads) for the MIL interpreter needs threadpoolctl;"
            f" run: {install_command('threadpoolctl')}."
        ) from error
    return ThreadpoolController().select(user_api="blas")
