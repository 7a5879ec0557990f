"""The backends of this package as export formats of transformers (``transformers.exporters``)."""

from dsvl_export.transformers_exporters.bundle_exporter import BundleConfig, register

__all__ = ["BundleConfig", "register"]
