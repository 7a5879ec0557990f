"""Trusted engines, which may run host code: those built here and those that the user trusts.

A version-compatible engine contains a runtime library, which TensorRT loads and executes. The
hashes of a bundle prove that its files belong together, not that their author is trustworthy.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import sha256_of_file

FOLDER = "dsvl-export/engines"


def state_folder() -> Path:
    """Return the folder of trusted engines (XDG base directories).

    The SHA-256 of each trusted engine is the name of an empty file there.

    Raises:
        OSError: the user has no home folder.
    """
    state = os.environ.get("XDG_STATE_HOME")
    try:
        return (Path(state) if state else Path.home() / ".local/state") / FOLDER
    except RuntimeError as error:  # HOME is not set, and the user has no passwd entry
        raise OSError(errno.ENOENT, "there is no home folder; set XDG_STATE_HOME") from error


def trust_engine(file: Path) -> None:
    """Record that an engine may run host code on this machine.

    Raises:
        OSError: the state folder cannot be written.
    """
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / sha256_of_file(file)).touch()


def trust_engines(bundle: Bundle) -> None:
    """Trust all engines of a bundle after their hashes are checked.

    Raises:
        UserError: an engine differs from the manifest.
        OSError: see ``trust_engine``.
    """
    engines = [artifact.engine.file for artifact in bundle.manifest.artifacts if artifact.engine]
    bundle.check(engines)
    for engine in engines:
        trust_engine(bundle.path(engine))


def is_trusted(file: Path) -> bool:
    """Whether an engine was built on this machine or is trusted by its user."""
    try:
        folder = state_folder()
    except OSError:
        return False
    return folder.is_dir() and (folder / sha256_of_file(file)).exists()
