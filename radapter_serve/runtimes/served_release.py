"""The release of a live server, through the client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_client import Client, RAdapterClientError
from radapter_client import Release as Served
from radapter_serve.errors import RAdapterError
from radapter_serve.inputs.preprocess import Preprocess, decode_pixels
from radapter_serve.release.release import Release


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
        rows = min(16, int(release.facts.get("max_batch_size", 16)))  # a batch becomes some requests at once
        return Client(url, release=release.version, batch_size=rows), release
    except RAdapterClientError as error:
        raise RAdapterError(f"{url}: {error}") from error


class ServerRelease:
    """A live server's release, as an index is built with it.

    Args:
        client: pinned to the release.
        url: of the server.
        facts: of the release.

    Attributes:
        facts: these, with the α that it embeds at.
        origin, preprocess: as of `LocalRelease`.
    """

    def __init__(self, client: Client, url: str, facts: Release) -> None:
        self._client, self.facts, self.origin = client, facts, {"url": url}
        self.preprocess = Preprocess.from_dict(facts.preprocess)

    def set_alpha(self, alpha: float) -> None:
        """As `LocalRelease` does."""
        self.facts = self.facts.at(alpha)

    def prepare(self, data: bytes) -> NDArray[np.uint8]:
        """As `LocalRelease` does: the server leaves such an image as it is, and what is broken fails no batch."""
        return decode_pixels(data, self.preprocess)

    def encode_images(self, images: Sequence[Any]) -> NDArray[np.float32]:
        """Prepared images to float32 [B, D] of unit length."""
        return self._ask(self._client.embed_images, images)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts to float32 [N, D] of unit length."""
        return self._ask(self._client.embed_texts, texts)

    def _ask(self, embed: Callable[..., Any], items: Sequence[Any]) -> NDArray[np.float32]:
        try:
            return np.asarray(embed(list(items), alpha=self.facts.request_alpha.one(None)), np.float32)
        except RAdapterClientError as error:
            raise RAdapterError(f"{self.origin['url']}: {error}") from error
