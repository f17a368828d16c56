"""The tasks `embed_image` and `embed_text`: images or texts in, embeddings out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import Cancelled, invalid
from radapter_serve.contract.labels import check_length
from radapter_serve.contract.preprocess import ImageFile, check_request, read_headers
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.encoders.needs import Steps


@dataclass(frozen=True)
class EmbedImagesRequest:
    """Encoded images to embed, at an α or the release's own."""

    images: Sequence[bytes | ImageFile]
    alpha: float | None = None


@dataclass(frozen=True)
class EmbedTextsRequest:
    """Texts to embed, at an α or the release's own; raises a `TaskError` for a text that is empty
    or too long.
    """

    texts: Sequence[str]
    alpha: float | None = None

    def __post_init__(self) -> None:
        for number, text in enumerate(self.texts, 1):
            if not text.strip():
                raise invalid(
                    f"text {number} of {len(self.texts)} is empty; give at least one word"
                )
            check_length(text)


def embed_images(
    loaded: LoadedRelease, request: EmbedImagesRequest, cancelled: Cancelled | None = None
) -> Steps[NDArray[np.float32]]:
    """Embed images, float32 [N, D]; a `TaskError` names the first bad image."""
    alpha = loaded.request_alpha(request.alpha)
    files = checked_headers(loaded, request.images)
    pixels = yield from loaded.decoded(files, cancelled)
    return (yield from loaded.encoded("images", pixels, alpha, cancelled))


def embed_texts(
    loaded: LoadedRelease, request: EmbedTextsRequest, cancelled: Cancelled | None = None
) -> Steps[NDArray[np.float32]]:
    """Embed texts, float32 [N, D]; too long ones are cut as open_clip cuts them."""
    alpha = loaded.request_alpha(request.alpha)
    rows = loaded.tokenizer.encode(request.texts)
    return (yield from loaded.encoded("tokens", rows, alpha, cancelled))


def checked_headers(
    loaded: LoadedRelease,
    images: Sequence[bytes | ImageFile],
    others: Sequence[ImageFile] = (),
) -> list[ImageFile]:
    """The headers of a request's images, which are checked, with `others` of the same request,
    before one is decoded; raises the `TaskError` of the first bad one, or for too many pixels.
    """
    files = read_headers(images)
    for file in files:
        loaded.preprocess.check(file.width, file.height)
    check_request([*files, *others])
    return files
