"""The audit: each file of a bundle, compared with what the checkpoint and its plan give."""

from dsvl_export.audit.bundle import audit, audit_written
from dsvl_export.audit.result import Audit, AuditedPart, Difference

__all__ = ["Audit", "AuditedPart", "Difference", "audit", "audit_written"]
