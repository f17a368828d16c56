"""Triton model `retrieve`: a text or an image to the nearest images of an index."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radapter_serve.environment import INDEXES
from radapter_serve.tasks.retrieve import Embedder, Retrieve, Retrieved, RetrieveRequest
from radapter_serve.triton.responses import answer, each, need, read
from radapter_serve.triton.version import Version


class TritonPythonModel:
    """Embeds the query by `embed_text` or `embed_image` of the same release, and searches the
    index.
    """

    def initialize(self, args: dict[str, str]) -> None:
        version = Version(args)
        folder = Path(os.environ.get(INDEXES, "indexes"))
        self._task = Retrieve(
            version.release,
            folder,
            version.embed_text,
            version.embed_image,
            lambda: _others(version),
            origin=version.origin,
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(requests, _request, each(self._task), _outputs)


def _others(version: Version) -> Iterator[Embedder]:
    """Older releases, which stay for the indexes that they made."""
    return (
        Embedder(one.release, one.embed_text, one.embed_image)
        for one in version.others("embed_text")
    )


def _request(request: Any) -> RetrieveRequest:
    values = {name: read(request, name) for name in ("text", "image", "top_k", "where")}
    one = {name: None if value is None else value.ravel()[0] for name, value in values.items()}
    return RetrieveRequest(
        need(request, "index").ravel()[0],
        **one,
        thumbnails="thumbnail" in request.requested_output_names(),
    )


def _outputs(found: Retrieved) -> dict[str, Any]:
    outputs: dict[str, Any] = {"id": found.ids, "score": found.scores, "metadata": found.metadata}
    return outputs if found.thumbnails is None else {**outputs, "thumbnail": found.thumbnails}
