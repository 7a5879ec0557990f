"""The structural audit: each file of a bundle against what the checkpoint and the plan make of it."""

from dsvl_export.audit.bundle import audit, audit_written
from dsvl_export.audit.result import Audit, AuditedPart, Difference

__all__ = ["Audit", "AuditedPart", "Difference", "audit", "audit_written"]
