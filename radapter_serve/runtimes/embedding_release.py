"""A release that embeds images and texts, wherever it runs."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.preprocess import Preprocess, decode_pixels
from radapter_serve.release.release import Release


class EmbeddingRelease(ABC):
    """A release that embeds: one in a model repository, run in this process, or a live server's.

    Args:
        facts: of the release.
        origin: the flag of radapter-index that names it, `model_repository` or `url`, and its
            value.

    Attributes:
        facts: of the release, with the α that it embeds at.
        origin: as above.
        preprocess: what `prepare` does.
    """

    def __init__(self, facts: Release, origin: Mapping[str, str]) -> None:
        self.facts = facts
        self.origin = origin
        self.preprocess = Preprocess.from_dict(facts.preprocess)

    def set_alpha(self, alpha: float) -> None:
        """Embed at this α from now on.

        Raises:
            RAdapterError: the release does not have it.
        """
        self.facts = self.facts.at(alpha)

    def close(self) -> None:  # noqa: B027  # only a server's holds something
        """Let go of what it holds open."""

    def turn(self, exif_orientation: bool) -> None:
        """Turn images by their EXIF orientation from now on, or leave them as they are."""
        self.preprocess = dataclasses.replace(self.preprocess, exif_orientation=exif_orientation)

    def prepare(self, data: bytes) -> Any:
        """From the bytes of an image file to what `encode_images` takes, uint8 [S, S, 3].
        Thread-safe.

        Raises:
            TaskError: no image, broken, or too large.
        """
        return decode_pixels(data, self.preprocess)

    @abstractmethod
    def encode_images(self, images: Sequence[Any]) -> NDArray[np.float32]:
        """Prepared images to float32 [B, D] of unit length; any B."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts to float32 [N, D] of unit length."""
