"""The stage ``audit``: the artifacts are the files that ``export`` compared with the checkpoint."""

from __future__ import annotations

from dsvl_export.parity_check.result import ParityResult
from runtimes.bundle.bundle import Bundle

STAGE = "audit"


def judge_audit(bundle: Bundle, result: ParityResult) -> None:
    """Fill in the stage ``audit``: ``export`` must have audited every file of the artifacts.

    Requests cannot tell a small fault from rounding; the audit compares every weight. A file that
    ``export`` cannot audit, such as an engine, leaves the stage at ``not run``.
    """
    stage, manifest = result.stage(STAGE), bundle.manifest
    not_audited = []
    for artifact in bundle.artifacts(result.backend, result.precision).values():
        for path in artifact.files:
            if path not in artifact.audited:
                not_audited.append(path)
            elif manifest.files[path].sha256 != artifact.audited[path]:
                stage.fail(f"{path} is not the file that the export audited; export the bundle again")
    if not not_audited:
        stage.passed()
    elif stage.state != "failed":
        stage.detail = f"the export did not audit {not_audited[0]}; run verify --weights CHECKPOINT"
