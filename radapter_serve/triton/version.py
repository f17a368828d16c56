"""A release whose encoders are models of the same server; importable only inside one of Triton's
processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb
from numpy.typing import NDArray

from radapter_client._failures import read_failure
from radapter_serve.contract.alpha import Alpha
from radapter_serve.contract.errors import (
    ENCODER_FAILED,
    OVERLOADED,
    RESTARTING,
    SERVER_STOPPING,
    Cancelled,
    TaskError,
    redact,
)
from radapter_serve.environment import INDEXES
from radapter_serve.release.release import FILE, Release
from radapter_serve.tasks.version import Version
from radapter_serve.triton.responses import trace_of_request

if TYPE_CHECKING:
    from radapter_serve.tasks.retrieve import Embedder

# What a caller is told where another model cannot answer now.
_RETRYABLE = {
    SERVER_STOPPING: "the server is stopping; ask again when it is back",
    RESTARTING: "{} is being started again; ask again in a few seconds",
    OVERLOADED: (
        "{} has more to do than it can take on; ask again in a moment, with fewer requests at once"
    ),
}


class TritonVersion(Version):
    """One version of a task model, whose encoders are the server's models of the same version.

    Args:
        arguments: what Triton gives to `initialize`.
    """

    def __init__(self, arguments: dict[str, str]) -> None:
        folder = Path(arguments["model_repository"]) / arguments["model_version"]
        self._number = int(arguments["model_version"])
        # The server's folder has links to the files of the model repository.
        repository = (folder / FILE).resolve().parents[2]
        indexes = Path(os.environ.get(INDEXES, "indexes"))
        super().__init__(Release.load(folder), folder, indexes, f"{repository}@{self._number}")

    def encode_images(
        self, pixels: NDArray[np.uint8], alpha: Alpha | None = None
    ) -> NDArray[np.float32]:
        return self._call("image_encoder", "image", pixels, alpha, "image_embeds")

    def encode_patches(
        self, pixels: NDArray[np.uint8], alpha: Alpha | None = None
    ) -> NDArray[np.float32]:
        return self._call("patch_encoder", "image", pixels, alpha, "patch_embeds")

    def encode_tokens(
        self, tokens: NDArray[np.int32], alpha: Alpha | None = None
    ) -> NDArray[np.float32]:
        return self._call("text_encoder", "tokens", tokens, alpha, "text_embeds")

    def embedder(self) -> Embedder:
        from radapter_serve.tasks.retrieve import Embedder  # here: for `retrieve` alone

        return Embedder(self.release, partial(self._query, "text"), partial(self._query, "image"))

    def others(self) -> Iterator[Embedder]:
        """Older releases, which stay for the indexes that they made."""
        from radapter_serve.release.repository import (
            CONFIG,
            read_config,
        )  # here: few need it, and it takes a while

        folder = self.folder.parent.parent / "embed_text"
        served = read_config(folder / CONFIG).version_policy.specific.versions
        for version in served:
            if version != self._number:
                arguments = {"model_repository": str(folder), "model_version": str(version)}
                yield TritonVersion(arguments).embedder()

    def _query(
        self,
        kind: str,
        value: bytes,
        alpha: Alpha | None = None,
        cancelled: Cancelled | None = None,
    ) -> NDArray[np.float32]:
        """A text (UTF-8) or an encoded image -> float32 [D] by `embed_text` or `embed_image`, which
        Triton does not tell that the caller left: `retrieve` asks before each.
        """
        array = np.array([[value]], object)
        return self._call(f"embed_{kind}", kind, array, alpha, f"{kind}_embeds").ravel()

    def _call(
        self, model: str, source: str, array: NDArray[Any], alpha: Alpha | None, target: str
    ) -> NDArray[np.float32]:
        response = pb.InferenceRequest(
            model_name=model,
            model_version=self._number,
            inputs=[
                pb.Tensor(source, array),
                *([] if alpha is None else [pb.Tensor("alpha", alpha)]),
            ],
            requested_output_names=[target],
            preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU, 0),
            **trace_of_request(),
        ).exec()
        if response.has_error():
            message = response.error().message()
            failure = read_failure(message)
            if failure.code is not None:
                sentence = (
                    failure.message if failure.by_task else _RETRYABLE[failure.code].format(model)
                )
                raise TaskError(failure.code, sentence)
            print(f"{model} version {self._number} failed: {message}", file=sys.stderr)
            raise TaskError(
                ENCODER_FAILED, f"{model} version {self._number} failed: {redact(message)}"
            )
        return np.array(pb.get_output_tensor_by_name(response, target).as_numpy(), np.float32)
