"""What ExecuTorch hands the vision encoder and the adaptor to; the decoder is for XNNPACK."""

from __future__ import annotations

from typing import Any

import torch

from runtimes.errors import UserError


def xnnpack() -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return XnnpackPartitioner()


def encoder_partitioner(delegate: str, dtype: torch.dtype) -> Any:
    """The partitioner of ``xnnpack``, ``coreml`` or ``vulkan`` for a float program.

    Raises:
        UserError: what the delegate needs is not installed.
    """
    if delegate == "xnnpack":
        return xnnpack()
    try:
        return _coreml(dtype) if delegate == "coreml" else _vulkan()
    except ImportError as error:
        raise UserError(
            f"ExecuTorch's delegate {delegate} needs {error.name or error}; run: pip install"
            " 'dsvl-export[executorch,coreml]'."
        ) from error


def _coreml(dtype: torch.dtype) -> Any:
    import coremltools as ct
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    half = ct.precision.FLOAT16 if dtype == torch.float16 else ct.precision.FLOAT32
    specs = CoreMLBackend.generate_compile_specs(
        compute_precision=half, minimum_deployment_target=ct.target.iOS18
    )
    return CoreMLPartitioner(compile_specs=specs)


def _vulkan() -> Any:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return VulkanPartitioner()
