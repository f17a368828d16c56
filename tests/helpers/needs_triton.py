"""A mark for tests that start a `TritonServer` or load its Python models."""

from __future__ import annotations

import numpy as np
import pytest

needs_triton = pytest.mark.skipif(
    int(np.__version__.split(".")[0]) >= 2, reason="Triton's Python models refuse numpy 2"
)
