"""Repositories of the Hugging Face hub, named ``ORG/NAME`` or ``ORG/NAME@REVISION``.

``huggingface_hub`` keeps files in its cache (``HF_HOME``). An interrupted download resumes.
``HF_TOKEN`` gives access to private and gated repositories. With ``HF_HUB_OFFLINE=1`` only the
cache is read.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtimes.errors import UserError, first_line
from runtimes.installation import install_command

_HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w.][\w./-]*))?")


@dataclass(frozen=True)
class HubId:
    """A repository, and a branch, tag or commit of it; None is the main branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str | Path) -> HubId | None:
        """Read ``ORG/NAME`` or ``ORG/NAME@REVISION``; None where the text has another form."""
        match = _HUB_ID.fullmatch(str(text))
        return cls(match["repository"], match["revision"]) if match else None

    def __str__(self) -> str:
        """Return the form that ``parse`` reads."""
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one commit."""

    folder: Path
    commit: str


def download(hub_id: HubId, allow: Sequence[str] = ("*",), ignore: Sequence[str] = ()) -> Snapshot:
    """Download the files of a repository into the hub's cache, with progress bars on stderr.

    Args:
        hub_id: the repository and revision.
        allow: patterns of the files to download, as in ``fnmatch``.
        ignore: patterns of files to leave out.

    Raises:
        UserError: ``huggingface_hub`` is not installed, there is no such repository or revision or
            no access to it, the hub cannot be reached and the files are not in the cache, or the
            disk is full.
    """
    with hub_errors(hub_id):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            hub_id.repository,
            revision=hub_id.revision,
            allow_patterns=list(allow),
            ignore_patterns=list(ignore) or None,
        )
    return Snapshot(Path(folder), Path(folder).name)


@contextmanager
def hub_errors(hub_id: HubId) -> Iterator[None]:
    """Turn what ``huggingface_hub`` raises into one sentence.

    Raises:
        UserError: any call of it failed.
    """
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"The hub's {hub_id} needs huggingface_hub; run: {install_command('huggingface_hub')}."
        ) from error
    except Exception as error:  # network, authorization and hub errors share no base class
        raise UserError(_sentence(hub_id, error)) from error


def _sentence(hub_id: HubId, error: Exception) -> str:
    from huggingface_hub import constants, errors

    repository = hub_id.repository
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is gated; accept its terms on the hub's page, and set HF_TOKEN to your token."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"The hub has no repository {repository}, or it is private; check the name, or set HF_TOKEN to a"
            " token with access."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {hub_id.revision!r}; give a branch, a tag or a commit."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"The disk is full ({constants.HF_HUB_CACHE}); free some space and run the same command again:"
            " the download resumes."
        )
    unreachable = type(error).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout")
    if unreachable or isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        place = f"{hub_id} is not complete in its cache ({constants.HF_HUB_CACHE})"
        if constants.HF_HUB_OFFLINE:
            return f"HF_HUB_OFFLINE is set, so that the hub is not asked, and {place}."
        return (
            f"The hub ({constants.ENDPOINT}) cannot be reached, and {place}; check the network and run the"
            " same command again."
        )
    return f"The hub did not give {hub_id}: {first_line(error)}."
