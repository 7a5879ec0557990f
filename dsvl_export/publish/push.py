"""Uploading a bundle to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from dsvl_export.parity_check.report.record import REPORTS
from dsvl_export.publish.model_card import CARD, CardOptions, model_card
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.locks import refuse_link
from runtimes.bundle.manifest import MANIFEST
from runtimes.errors import UserError
from runtimes.hub import HubId, hub_errors


def push(
    bundle: Bundle,
    hub_id: HubId,
    options: CardOptions,
    *,
    private: bool = False,
    message: str = "Upload with dsvl-export",
) -> str:
    """Check a bundle's files against their hashes and upload them with a model card.

    The files that the manifest names, the manifest and the parity reports are uploaded in one
    commit, so that the hub never shows half a bundle. The card replaces the repository's README.md.

    Args:
        bundle: the bundle.
        hub_id: the repository, which is created if it is missing; its revision must be a branch.
        options: base model and license for the card.
        private: whether a new repository is private.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        UserError: the bundle is damaged, a package is missing, or the hub refuses the upload.
    """
    names = files_to_publish(bundle)
    card = model_card(bundle, hub_id.repository, options)
    with hub_errors(hub_id):
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(library_name="dsvl-export")
        existed = api.repo_exists(hub_id.repository)
        api.create_repo(hub_id.repository, private=private, exist_ok=True)
        files = [CommitOperationAdd(name, bundle.folder / name) for name in names]
    try:
        with hub_errors(hub_id):
            commit = api.create_commit(
                hub_id.repository,
                [CommitOperationAdd(CARD, card.encode()), *files],
                commit_message=message,
                revision=hub_id.revision,
            )
    except UserError as error:
        if existed:
            raise
        raise UserError(
            f"{error} The repository {hub_id.repository} was created and is empty: run the same command"
            " again, or delete it on the hub's page."
        ) from error
    return str(commit.commit_url)


def files_to_publish(bundle: Bundle) -> list[str]:
    """Check a bundle's files, and return the paths of those to upload, relative to its folder.

    Raises:
        UserError: a file is damaged, or the folder of the reports is a link.
    """
    bundle.check(sorted(bundle.manifest.files))
    refuse_link(bundle.folder, REPORTS)
    reports = [Path(verdict["report"]) for verdict in bundle.manifest.parity.values()]
    reports += [report.with_suffix(".html") for report in reports]
    there = [str(report) for report in reports if _is_own_file(bundle.folder / report)]
    return [*bundle.manifest.files, MANIFEST, *there]


def _is_own_file(file: Path) -> bool:
    """Return whether a report is a file of the bundle; it has no hash, so no link is followed."""
    return file.is_file() and not file.is_symlink()


def parse_repository(text: str) -> HubId:
    """Read the name of a repository.

    Raises:
        UserError: the text is not ``ORG/NAME`` or ``ORG/NAME@BRANCH``.
    """
    hub_id = HubId.parse(text)
    if hub_id is None:
        raise UserError(f"{text!r} is not the name of a repository; give ORG/NAME or ORG/NAME@BRANCH.")
    return hub_id
