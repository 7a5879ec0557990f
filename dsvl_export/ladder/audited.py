"""Whether a bundle's artifacts are the files that export compared with the checkpoint."""

from __future__ import annotations

from dsvl_export.ladder.result import ParityResult
from runtimes.bundle import Bundle

RUNG = "audit"


def judge_audit(bundle: Bundle, result: ParityResult) -> None:
    """Fill the result's rung of the audit; where export compared nothing, it says how to do that.

    What single requests cannot tell from rounding, export saw when it compared each weight: a file that was
    changed afterwards is not the one that it judged.
    """
    rung, manifest = result.rung(RUNG), bundle.manifest
    artifacts = [
        item
        for item in manifest.artifacts
        if (item.backend, item.precision) == (result.backend, result.precision)
    ]
    for artifact in artifacts:
        for path, digest in artifact.audited.items():
            if path not in manifest.files or manifest.files[path].sha256 != digest:
                rung.fail(f"{path} is not the file that export compared with the checkpoint; export it again")
    unknown = [artifact.component for artifact in artifacts if not artifact.audited]
    if not unknown:
        rung.passed()
    elif rung.state != "failed":
        rung.detail = f"export did not compare the {unknown[0]} with the checkpoint; see verify --weights"
