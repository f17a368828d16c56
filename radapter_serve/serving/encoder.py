"""An exported graph in ONNX Runtime, in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError


class Encoder:
    """An ONNX file in ONNX Runtime, on the provider that was asked for and no other.

    Args:
        path: `model.onnx`.
        provider: an execution provider of ONNX Runtime.

    Raises:
        RAdapterError: ONNX Runtime cannot load the file, or fell back to another provider.
    """

    def __init__(self, path: Path, provider: str = "CPUExecutionProvider") -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise RAdapterError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path.name}: {error}") from error
        used = self._session.get_providers()[0]
        if used != provider:
            raise RAdapterError(f"ONNX Runtime uses {used} where {provider} was asked for; it is not installed here")
        self._input = self._session.get_inputs()[0].name

    def __call__(self, values: NDArray[np.generic]) -> NDArray[np.float32]:
        """One batch of images or tokens to embeddings, float32 [B, D] ([B, g, g, D] of a patch encoder)."""
        (embeds,) = self._session.run(None, {self._input: values})
        return np.asarray(embeds, dtype=np.float32)
