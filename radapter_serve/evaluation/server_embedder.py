"""A live server, through the client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_client import RAdapterClientError
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.embedder import SegmentImage, SegmentQuery, Variant, exported_way, release_variants
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.inputs.mask_crop import MaskCrop
from radapter_serve.inputs.preprocess import Preprocess
from radapter_serve.release.release import Release
from radapter_serve.runtimes.served_release import connect


class ServerEmbedder:
    """A live server, through the client, pinned to its newest release.

    Args:
        url: `grpc://HOST:PORT` or `http://HOST:PORT`.
        alphas: re-scalings in [0, 1] to evaluate; the release's own if none.

    Raises:
        RAdapterError: nobody answers there, or the release lacks an α.
    """

    def __init__(self, url: str, alphas: Sequence[float] = ()) -> None:
        self._client, served = connect(url)
        self._release = release = Release.from_dict(served.facts)
        self.templates = release.templates
        preprocess = Preprocess.from_dict(release.preprocess)
        self.size, self.crop = preprocess.size[0], MaskCrop.from_dict(release.crop)
        self.exif_orientation = preprocess.exif_orientation
        self.variants = release_variants("server", release, alphas)
        self._alpha: float | None = None

    def select(self, variant: Variant) -> None:
        self._alpha = self._release.request_alpha.one(variant.alpha)

    def prepare(self, data: bytes) -> Any:
        return data

    def embed_images(self, items: Sequence[Any]) -> Floats:
        try:
            return np.asarray(self._client.embed_images(list(items), alpha=self._alpha), np.float32)
        except RAdapterClientError as error:
            raise RAdapterError(f"the server failed: {error}") from error

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        try:
            return np.asarray(self._client.embed_texts(list(texts), alpha=self._alpha), np.float32)
        except RAdapterClientError as error:
            raise RAdapterError(f"the server failed: {error}") from error

    def way(self, dense: str | None) -> str:
        return exported_way(self._release, dense)

    def segmenter(self, query: SegmentQuery, known: dict[Any, Floats]) -> SegmentImage:
        options = query.options

        def segment(data: bytes, masks: NDArray[np.uint8] | None) -> NDArray[np.uint16]:
            windows: dict[str, Any] = {} if masks is not None else {
                "short_side": options.short_side, "stride": options.stride, "refine": options.refine
            }  # fmt: skip
            try:
                answer = self._client.segment(
                    data,
                    list(query.labels),
                    templates=list(query.templates),
                    alpha=self._alpha,
                    threshold=options.threshold,
                    proposals=masks,
                    **windows,
                )
            except RAdapterClientError as error:
                raise RAdapterError(f"the server failed: {error}") from error
            return np.asarray(answer.mask, np.uint16)

        return segment

    def close(self) -> None:
        self._client.close()
