"""The release of a live server, through the client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_client import Client, RAdapterClientError
from radapter_client import Release as Served
from radapter_serve.errors import RAdapterError
from radapter_serve.release.release import Release
from radapter_serve.runtimes.embedding_release import EmbeddingRelease


def connect(url: str) -> tuple[Client, Served]:
    """A client of a live server's newest release, which one that appears meanwhile does not change.

    Args:
        url: `grpc://HOST:PORT` or `http://HOST:PORT`.

    Raises:
        RAdapterError: nobody answers there.
    """
    try:
        with Client(url) as client:
            release = client.release()
        rows = min(
            16, int(release.facts.get("max_batch_size", 16))
        )  # a batch becomes some requests at once
        return Client(url, release=release.version, batch_size=rows), release
    except RAdapterClientError as error:
        raise RAdapterError(f"{url}: {error}") from error


class ServerRelease(EmbeddingRelease):
    """A live server's newest release; it takes images as `prepare` gives them, and as bytes of
    files.

    Args:
        url: `grpc://HOST:PORT` or `http://HOST:PORT`.

    Raises:
        RAdapterError: nobody answers there.

    Attributes:
        client: pinned to the release.
    """

    def __init__(self, url: str) -> None:
        self.client, served = connect(url)
        super().__init__(Release.from_dict(served.facts), {"url": url})

    def encode_images(self, images: Sequence[Any]) -> NDArray[np.float32]:
        return np.asarray(self.ask(self.client.embed_images, list(images)), np.float32)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.asarray(self.ask(self.client.embed_texts, list(texts)), np.float32)

    def ask(self, task: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The answer of one of the client's tasks, at the α that is set.

        Raises:
            RAdapterError: the server failed.
        """
        try:
            return task(*arguments, alpha=self.facts.request_alpha.one(None), **options)
        except RAdapterClientError as error:
            raise RAdapterError(f"{self.origin['url']}: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        self.client.close()
