"""Triton model `embed_image`: encoded images to embeddings."""

from __future__ import annotations

from typing import Any

from radapter_serve.tasks.triton import Version, answer, read


class TritonPythonModel:
    """Decodes and resizes the images of all waiting requests together, then makes one call to `image_encoder`."""

    def initialize(self, args: dict[str, str]) -> None:
        self._task = Version(args).embed_images()

    def execute(self, requests: list[Any]) -> list[Any]:
        images = [read(request, "image").ravel() for request in requests]
        alphas = [read(request, "alpha") for request in requests]
        return answer(requests, lambda: self._task(images, alphas), lambda embeds: {"image_embeds": embeds})
