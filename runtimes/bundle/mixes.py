"""Mixes: components of several backends or precisions that run as one model.

A bundle's artifacts are named by a pair, their backend and precision. A mix is such a pair too: the
backend ``mixed``, and the name of the mix in the place of the precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from runtimes.errors import UserError

COMPONENTS = ("vision_encoder", "adaptor", "decoder")  # in the order in which they run
MIXED = "mixed"
Pair = tuple[str, str]  # backend and precision


@dataclass(frozen=True)
class Mix:
    """The backend and the precision of each component of a mix."""

    vision_encoder: Pair
    adaptor: Pair
    decoder: Pair

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Mix:
        """Build a mix from its JSON object, which the schema has checked."""
        return cls(**{component: (pair[0], pair[1]) for component, pair in raw.items()})

    @property
    def components(self) -> dict[str, Pair]:
        """The pairs by component, in the order in which the components run."""
        return {component: getattr(self, component) for component in COMPONENTS}

    @property
    def name(self) -> str:
        """Name such as ``openvino-int8+onnxruntime-8da4w``.

        An adaptor with the backend and precision of the vision encoder is not named.
        """
        pairs = [self.vision_encoder, self.adaptor, self.decoder]
        if self.adaptor == self.vision_encoder:
            del pairs[1]
        return "+".join(f"{backend}-{precision}" for backend, precision in pairs)

    def check_borders(self, dtypes: Mapping[str, str], where: str = "") -> None:
        """Check that each component reads what the one before it returns.

        Args:
            dtypes: component → dtype of its float inputs and outputs.
            where: start of the message, such as the name of a file.

        Raises:
            UserError: two neighbors have different dtypes.
        """
        pairs = self.components
        for first, second in pairwise(COMPONENTS):
            if dtypes[first] != dtypes[second]:
                raise UserError(
                    f"{where}The {first} ({':'.join(pairs[first])}) returns {dtypes[first]}, but the {second}"
                    f" ({':'.join(pairs[second])}) reads {dtypes[second]}; precisions based on fp16 fit each"
                    " other, as do those based on fp32 and bf16."
                )


def device_of(device: str | None, component: str) -> str | None:
    """Return the device of a component.

    Args:
        device: the device of all components, or some components with theirs, such as
            ``vision_encoder=gpu,decoder=cpu``; None is the default of each backend.
        component: the component.

    Raises:
        UserError: an item is not ``COMPONENT=DEVICE``.
    """
    if device is None or "=" not in device:
        return device
    pairs = [item.partition("=")[::2] for item in device.split(",")]
    devices = dict(pairs)
    if not set(devices) <= set(COMPONENTS) or not all(devices.values()) or len(devices) < len(pairs):
        raise UserError(
            f"The device {device!r} is not a device, or COMPONENT=DEVICE for some of"
            f" {', '.join(COMPONENTS)}, separated by commas."
        )
    return devices.get(component)


def joined_devices(devices: Mapping[str, str]) -> str:
    """Return the devices of components as one text, which ``device_of`` reads."""
    if len(set(devices.values())) == 1:
        return next(iter(devices.values()))
    return ",".join(f"{component}={device}" for component, device in devices.items())
