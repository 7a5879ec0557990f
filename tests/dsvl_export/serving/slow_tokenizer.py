"""A tokenizer for tests that takes long for some texts; ``serve`` starts it in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsvl_export.serving import text


class SlowTokenizer(text.TokenizerAsset):
    """Sleeps at texts that say ``slow``, and ends its process at those that say ``exit``."""

    def call(self, function: str, inputs: Mapping[str, Any], state: None = None) -> dict[str, np.ndarray]:
        if "slow " in inputs["text"]:
            time.sleep(60)
        if "exit " in inputs["text"]:
            os._exit(3)
        return super().call(function, inputs, state)
