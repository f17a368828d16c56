"""The encoders of the same server; importable only inside one of Triton's processes."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import triton_python_backend_utils as pb
from numpy.typing import NDArray

from radapter_client.failures import read_failure
from radapter_serve.contract.alpha import Alpha
from radapter_serve.contract.errors import (
    ENCODER_FAILED,
    OVERLOADED,
    RESTARTING,
    SERVER_STOPPING,
    TaskError,
    redact,
)
from radapter_serve.triton.responses import trace_of_request

# Message to a caller if another model cannot answer now.
_RETRYABLE = {
    SERVER_STOPPING: "the server is stopping; ask again when it is back",
    RESTARTING: "{} is being started again; ask again in a few seconds",
    OVERLOADED: (
        "{} has more to do than it can take on; ask again in a moment, with fewer requests at once"
    ),
}


class TritonEncoder:
    """The encoders of one release, asked by another model of the same server."""

    def __init__(self, version: int) -> None:
        self._version = version

    def images(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> NDArray[np.float32]:
        return self._call("image_encoder", "image", pixels, alpha, "image_embeds")

    def patches(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> NDArray[np.float32]:
        return self._call("patch_encoder", "image", pixels, alpha, "patch_embeds")

    def tokens(self, tokens: NDArray[np.int32], alpha: Alpha | None = None) -> NDArray[np.float32]:
        return self._call("text_encoder", "tokens", tokens, alpha, "text_embeds")

    def close(self) -> None:
        """Nothing to close: the server holds the encoders."""

    def _call(
        self, model: str, source: str, array: NDArray[Any], alpha: Alpha | None, target: str
    ) -> NDArray[np.float32]:
        inputs = [pb.Tensor(source, array)]
        if alpha is not None:
            inputs.append(pb.Tensor("alpha", alpha))
        response = pb.InferenceRequest(
            model_name=model,
            model_version=self._version,
            inputs=inputs,
            requested_output_names=[target],
            preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU, 0),
            **trace_of_request(),
        ).exec()
        if not response.has_error():
            return np.array(pb.get_output_tensor_by_name(response, target).as_numpy(), np.float32)

        message = response.error().message()
        failure = read_failure(message)
        if failure.code is None:
            print(f"{model} version {self._version} failed: {message}", file=sys.stderr)
            raise TaskError(
                ENCODER_FAILED, f"{model} version {self._version} failed: {redact(message)}"
            )
        if failure.by_task:
            raise TaskError(failure.code, failure.message)
        raise TaskError(failure.code, _RETRYABLE[failure.code].format(model))
