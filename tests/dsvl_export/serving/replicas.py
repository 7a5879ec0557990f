"""Replicas for tests, which import them in processes of their own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from dsvl_export.serving.replicas import Replica
from runtimes.errors import UserError

STEP_SECONDS = 0.005


class SlowReplica(Replica):
    """Takes its time for each step, and says what it is doing."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        (self.model,) = self.service.models.open_models
        chain = self.model.pipeline.chain
        plain = chain.decode

        def slowly(*inputs: Any) -> np.ndarray:
            time.sleep(STEP_SECONDS)
            return plain(*inputs)

        chain.decode = slowly  # type: ignore[method-assign]

    async def busy(self) -> int:
        return self.model.scheduler.running + self.model.scheduler.waiting


class OnlyOneReplica(Replica):
    """Of two, the second cannot start."""

    def __init__(self, folder: str, *given: Any) -> None:
        try:
            (Path(folder) / "started").touch(exist_ok=False)
        except FileExistsError:
            time.sleep(5)  # the first one runs by then
            raise UserError("There is no place for a second one.") from None
        super().__init__(folder, *given)
