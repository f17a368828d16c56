"""Triton model `embed_image`: encoded images to embeddings."""

from __future__ import annotations

from typing import Any

from radapter_serve.triton.responses import answer, need, read
from radapter_serve.triton.version import Version


class TritonPythonModel:
    """Decodes and resizes the images of all waiting requests together, then makes one call to
    `image_encoder`.
    """

    def initialize(self, args: dict[str, str]) -> None:
        self._task = Version(args).embed_images()

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(
            requests,
            _request,
            lambda some: self._task(*zip(*some, strict=True)),
            lambda e: {"image_embeds": e},
        )


def _request(request: Any) -> tuple[Any, Any]:
    return need(request, "image").ravel(), read(request, "alpha")
