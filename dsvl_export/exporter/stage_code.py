"""The code that each kind of stage computes with; a change of it makes the stage's files anew.

Paths are relative to the folder of the packages; a folder stands for everything below it. Commands,
reports, the server, generation and the pipeline are in no list: what they do changes no file of an
export.
"""

from __future__ import annotations

# The fp32 reference, the goldens' format, and what both take from the runtime.
REFERENCE = (
    "reference/checkpoint",
    "reference/families",
    "reference/goldens",
    "reference/model",
    "reference/session.py",
    "reference/settings.py",
    "reference/taps.py",
    "reference/trace.py",
    "runtimes/bundle",
    "runtimes/cache.py",
    "runtimes/chain.py",
    "runtimes/decode_call.py",
    "runtimes/embedding.py",
    "runtimes/errors.py",
    "runtimes/goldens",
    "runtimes/images.py",
    "runtimes/prefix.py",
    "runtimes/preprocess.py",
    "runtimes/session.py",
    "runtimes/text",
)
RECORDING = (*REFERENCE, "dsvl_export/exporter/reference_stages.py")
CALIBRATION = (
    *REFERENCE,
    "calibration",
    "dsvl_export/exporter/artifact_stages.py",
    "dsvl_export/quantization/calibrate.py",
)
QUANTIZATION_ERROR = (
    *RECORDING,
    "calibration",
    "dsvl_export/parity_check/goldens.py",
    "dsvl_export/parity_check/metrics.py",
    "dsvl_export/parity_check/quantization_error.py",
    "dsvl_export/parity_check/stage_tensors.py",
)
LAYERS = (*QUANTIZATION_ERROR, "dsvl_export/parity_check/layers.py")
ARTIFACTS = (
    *REFERENCE,
    "calibration",
    "dsvl_export/audit",
    "dsvl_export/compilers",
    "dsvl_export/exporter/artifact_stages.py",
    "dsvl_export/lint",
    "dsvl_export/planning/workload.py",
    "dsvl_export/targets",
    "runtimes/backends",
)
PREFIX = (*RECORDING, "calibration")
ADAPTERS = (
    *REFERENCE,
    "calibration",
    "runtimes/backends/onnxruntime_adapters.py",
)
