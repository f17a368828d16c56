"""What the task models share of Triton's Python backend; importable only inside one of its
processes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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
    TaskError,
    public,
)
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.release.release import FILE, Release
from radapter_serve.tasks.classify import EmbedImages
from radapter_serve.tasks.label_embeddings import LabelEmbedder
from radapter_serve.threads import decoders
from radapter_serve.triton import surplus

# What a caller is told where another model cannot answer now.
_RETRYABLE = {
    SERVER_STOPPING: "the server is stopping; ask again when it is back",
    RESTARTING: "{} is being started again; ask again in a few seconds",
    OVERLOADED: (
        "{} has more to do than it can take on; ask again in a moment, with fewer requests at once"
    ),
}


class Version:
    """One version of a task model: its folder, its release, and the encoders of the same release.

    Args:
        arguments: what Triton gives to `initialize`.

    Attributes:
        origin: the model repository and the number of the release, as `DIR@N`.
    """

    def __init__(self, arguments: dict[str, str]) -> None:
        self.folder = Path(arguments["model_repository"]) / arguments["model_version"]
        self.release = Release.load(self.folder)
        self._number = int(arguments["model_version"])
        # The server's folder has links to the files of the model repository.
        repository = (self.folder / FILE).resolve().parents[2]
        self.origin = f"{repository}@{self._number}"
        if (
            "model_name" in arguments
        ):  # of this process, and none of the other versions that it looks at
            surplus.of_this_process.heed(arguments["model_name"])

    def encode_images(
        self, pixels: NDArray[np.uint8], alpha: Alpha | None = None
    ) -> NDArray[np.float32]:
        """uint8 [B, S, S, 3] -> float32 [B, D] by `image_encoder`; here and below with α where that
        is an input.
        """
        return self._call("image_encoder", "image", pixels, alpha, "image_embeds")

    def encode_patches(
        self, pixels: NDArray[np.uint8], alpha: Alpha | None = None
    ) -> NDArray[np.float32]:
        """uint8 [B, S, S, 3] -> float32 [B, g, g, D] by `patch_encoder`."""
        return self._call("patch_encoder", "image", pixels, alpha, "patch_embeds")

    def encode_tokens(
        self, tokens: NDArray[np.int32], alpha: Alpha | None = None
    ) -> NDArray[np.float32]:
        """int32 [B, L] -> float32 [B, D] by `text_encoder`."""
        return self._call("text_encoder", "tokens", tokens, alpha, "text_embeds")

    def embed_images(self) -> EmbedImages:
        """The task that embeds images with this version's encoder."""
        return EmbedImages(self.release, self.encode_images, threads=decoders())

    def tokenizer(self) -> Tokenizer:
        """This version's tokenizer."""
        return Tokenizer.load(self.folder / "tokenizer.json", self.release.tokenizer)

    def embed_text(self, text: bytes, alpha: Alpha | None = None) -> NDArray[np.float32]:
        """Text in UTF-8 -> float32 [D] by `embed_text`."""
        return self._call(
            "embed_text", "text", np.array([[text]], object), alpha, "text_embeds"
        ).ravel()

    def embed_image(self, image: bytes, alpha: Alpha | None = None) -> NDArray[np.float32]:
        """Encoded image -> float32 [D] by `embed_image`."""
        return self._call(
            "embed_image", "image", np.array([[image]], object), alpha, "image_embeds"
        ).ravel()

    def others(self, model: str) -> list[Version]:
        """The other versions that the server has of a task."""
        from radapter_serve.release.repository import (
            CONFIG,
            read_config,
        )  # here: few need it, and it takes a while

        folder = self.folder.parent.parent / model
        served = read_config(folder / CONFIG).version_policy.specific.versions
        return [
            Version({"model_repository": str(folder), "model_version": str(version)})
            for version in served
            if version != self._number
        ]

    def embed_labels(self) -> LabelEmbedder:
        """What embeds the labels of a request with this version's text encoder."""
        return LabelEmbedder(
            self.tokenizer(), self.encode_tokens, max_batch_size=self.release.max_batch_size
        )

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
                ENCODER_FAILED, f"{model} version {self._number} failed: {public(message)}"
            )
        return np.array(pb.get_output_tensor_by_name(response, target).as_numpy(), np.float32)
