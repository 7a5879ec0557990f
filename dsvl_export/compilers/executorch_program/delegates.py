"""The ExecuTorch delegates of the vision encoder and the adaptor; XNNPACK runs the decoder."""

from __future__ import annotations

from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

from runtimes.errors import UserError
from runtimes.installation import install_command


def encoder_partitioner(delegate: str, dtype: torch.dtype) -> Any:
    """Create the partitioner of a delegate for a program in a float dtype.

    Args:
        delegate: ``xnnpack``, ``coreml`` or ``vulkan``.
        dtype: dtype of the program.

    Raises:
        UserError: coremltools is not installed.
    """
    if delegate == "coreml":
        return _coreml(dtype)
    if delegate == "vulkan":
        # Deferred, like Core ML's below: only the chosen delegate is imported.
        from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

        return VulkanPartitioner()
    return XnnpackPartitioner()


def _coreml(dtype: torch.dtype) -> Any:
    try:
        import coremltools as ct
    except ImportError as error:
        raise UserError(
            f"ExecuTorch's delegate coreml needs coremltools; run: {install_command('coremltools')}."
        ) from error
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    precision = ct.precision.FLOAT16 if dtype == torch.float16 else ct.precision.FLOAT32
    specs = CoreMLBackend.generate_compile_specs(
        compute_precision=precision, minimum_deployment_target=ct.target.iOS18
    )
    return CoreMLPartitioner(compile_specs=specs)
