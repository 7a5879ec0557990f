"""Engines that may run code of their own on the host: those built here, and those the user trusts.

A version-compatible engine brings a runtime library, which TensorRT loads and executes. A bundle's hashes say
that its files belong together, not that their author is honest.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import sha256_of_file

FOLDER = "dsvl-export/engines"


def state_folder() -> Path:
    """Where the SHA-256 of each trusted engine is the name of an empty file (XDG base directories).

    Raises:
        OSError: the user has no home folder.
    """
    state = os.environ.get("XDG_STATE_HOME")
    try:
        return (Path(state) if state else Path.home() / ".local/state") / FOLDER
    except RuntimeError as error:  # no HOME, and a user without an entry
        raise OSError(errno.ENOENT, "there is no home folder; set XDG_STATE_HOME") from error


def trust_engine(file: Path) -> None:
    """Remember that this engine may run code on this machine.

    Raises:
        OSError: the state folder cannot be written.
    """
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / sha256_of_file(file)).touch()


def trust_engines(bundle: Bundle) -> None:
    """Trust all engines of a bundle, whose hashes are checked.

    Raises:
        UserError: one is not as the manifest says.
        OSError: see ``trust_engine``.
    """
    engines = [artifact.engine.file for artifact in bundle.manifest.artifacts if artifact.engine]
    bundle.check(engines)
    for engine in engines:
        trust_engine(bundle.path(engine))


def is_trusted(file: Path) -> bool:
    """Whether an engine was built on this machine, or trusted by its user."""
    try:
        folder = state_folder()
    except OSError:
        return False
    return folder.is_dir() and (folder / sha256_of_file(file)).exists()
