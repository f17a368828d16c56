"""A live server, through the client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from radapter_client import Client, RAdapterClientError
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.embedder import Variant, release_facts
from radapter_serve.evaluation.metrics import Floats


class ServerEmbedder:
    """A live server, through the client, pinned to its newest release.

    Args:
        url: `grpc://HOST:PORT` or `http://HOST:PORT`.

    Raises:
        RAdapterError: nobody answers there.
    """

    def __init__(self, url: str) -> None:
        try:
            with Client(url) as client:
                release = client.release
            rows = min(16, int(release.facts.get("max_batch_size", 16)))  # a batch becomes some requests at once
            self._client = Client(url, release=release.version, batch_size=rows)
        except RAdapterClientError as error:
            raise RAdapterError(f"{url}: {error}") from error
        self.templates = release.templates
        self.variants: Sequence[Variant] = [Variant("server", release.alpha, release_facts(release.facts))]

    def select(self, variant: Variant) -> None:
        pass

    def prepare(self, data: bytes) -> Any:
        return data

    def embed_images(self, items: Sequence[Any]) -> Floats:
        try:
            return np.asarray(self._client.embed_images(list(items)), np.float32)
        except RAdapterClientError as error:
            raise RAdapterError(f"the server failed: {error}") from error

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        try:
            return np.asarray(self._client.embed_texts(list(texts)), np.float32)
        except RAdapterClientError as error:
            raise RAdapterError(f"the server failed: {error}") from error

    def close(self) -> None:
        self._client.close()
