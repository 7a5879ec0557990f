"""Whether a bundle's artifacts are the files that export compared with the checkpoint."""

from __future__ import annotations

from dsvl_export.parity_check.result import ParityResult
from runtimes.bundle.bundle import Bundle

RUNG = "audit"


def judge_audit(bundle: Bundle, result: ParityResult) -> None:
    """Fill the result's stage ``audit``: every file of the artifacts must be one that export compared.

    Requests cannot tell a small fault from rounding; export compares every weight. A file that export did not
    compare, as an engine, leaves the stage at ``not run``.
    """
    stage, manifest = result.rung(RUNG), bundle.manifest
    pair, unknown = (result.backend, result.precision), []
    for artifact in manifest.artifacts:
        if (artifact.backend, artifact.precision) != pair:
            continue
        for path in artifact.files:
            if path not in artifact.audited:
                unknown.append(path)
            elif manifest.files[path].sha256 != artifact.audited[path]:
                stage.fail(f"{path} is not what export compared with the checkpoint; export it again")
    if not unknown:
        stage.passed()
    elif stage.state != "failed":
        stage.detail = f"export did not compare {unknown[0]} with the checkpoint; see verify --weights"
