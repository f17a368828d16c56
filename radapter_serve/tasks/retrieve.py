"""The task `retrieve`: texts and images in, the nearest images of an index out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.embeddings import DEFAULT_POINT, Point, weighted_sum
from radapter_serve.contract.errors import (
    INDEX_REPLACED,
    NOT_CALIBRATED,
    Cancelled,
    TaskError,
    invalid,
)
from radapter_serve.contract.images import ImageFile
from radapter_serve.encoders.loaded import Answered, LoadedRelease, Place, TaskSteps
from radapter_serve.index.facts import DEFAULT_TOP_K, Hit, Index
from radapter_serve.index.index import Indexes
from radapter_serve.release.release import HOW_TO_CALIBRATE
from radapter_serve.tasks.embed import (
    EmbedImagesRequest,
    EmbedTextsRequest,
    embed_images,
    embed_texts,
)

MAX_PARTS = 16


@dataclass(frozen=True)
class Query:
    """Texts, image files and ids of an index's images, with weights in this order."""

    texts: Sequence[str] = ()
    images: Sequence[bytes | ImageFile] = ()
    ids: Sequence[str] = ()
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        count = len(self)
        if not count:
            raise invalid("nothing to search for; give text, image or id, one or more")
        if count > MAX_PARTS:
            raise invalid(f"{count} texts, images and ids; at most {MAX_PARTS} are allowed")
        if len(self.factors) != count:
            raise invalid(
                f"{len(self.factors)} weights for {count} texts, images and ids; give one for each,"
                " or none"
            )
        for weight in self.factors:
            if not np.isfinite(weight):
                raise invalid(f"a weight is {weight}; allowed are finite numbers")

    def __len__(self) -> int:
        return len(self.texts) + len(self.images) + len(self.ids)

    @property
    def factors(self) -> list[float]:
        """The weight of each part; 1 if the query has no weights."""
        return [1.0] * len(self) if self.weights is None else [float(w) for w in self.weights]


@dataclass(frozen=True)
class RetrieveRequest:
    """A search of an index; raises a `TaskError` for values that exclude each other."""

    index: str
    query: Query
    top_k: int | None = None  # None: 10
    where: str | None = None  # a condition in SQL on columns of the metadata
    thumbnails: bool = False
    offset: int | None = None  # images to skip; None: no pages
    index_version: str | None = None  # from an earlier answer; None: any version
    min_score: float | None = None  # least cosine, in [-1, 1], of an image to return
    calibrated: bool = False  # use the release's calibrated min_score; for one text
    point: Point = DEFAULT_POINT  # of the texts

    def __post_init__(self) -> None:
        if self.calibrated and self.min_score is not None:
            raise invalid("give min_score or calibrated, not both")
        query = self.query
        is_one_text = len(query) == len(query.texts) == 1 and query.factors == [1.0]
        if self.calibrated and not is_one_text:
            raise invalid("calibrated is for a search with one text; give a number as min_score")


@dataclass(frozen=True)
class Retrieved:
    """The images that a search found, best first, with thumbnails if they were asked for."""

    hits: Sequence[Hit]
    index_version: str
    thumbnails: bool


def retrieve(
    indexes: Indexes, request: RetrieveRequest, cancelled: Cancelled | None = None
) -> TaskSteps[Answered[Retrieved]]:
    """Search an index for the images nearest to a query, at the place of its texts; raises a
    `TaskError` on failure.
    """
    index, loaded = indexes.get(request.index, cancelled)
    if request.index_version not in (None, index.generation):
        raise TaskError(
            INDEX_REPLACED,
            f"the index {index.name!r} has another version than the page before;"
            " search again from offset 0",
        )
    place, images_at = _places(index, loaded, request.point)
    min_score = request.min_score
    if request.calibrated:
        min_score = loaded.confidence(place).min_score
        if min_score is None:
            raise TaskError(
                NOT_CALIBRATED,
                f"this release has no calibrated least score; {HOW_TO_CALIBRATE}",
            )

    # Embed each part of the query.
    query = request.query
    vectors: list[NDArray[np.float32]] = []
    if query.texts:
        texts = EmbedTextsRequest(query.texts, place)
        vectors += list((yield from embed_texts(loaded, texts, cancelled)))
    if query.images:
        images = EmbedImagesRequest(query.images, images_at)
        vectors += list((yield from embed_images(loaded, images, cancelled)))
    if query.ids:
        vectors += list(index.embeddings(list(query.ids), cancelled))

    # Take their weighted sum, scaled to unit length, unless they cancel out.
    wanted = vectors[0]
    if query.factors != [1.0]:
        total = weighted_sum(vectors, query.factors)
        if total is None:
            shown = ", ".join(f"{weight:g}" for weight in query.factors)
            raise invalid(
                f"the weights {shown} cancel to nothing; change one, so that a direction is left"
            )
        wanted = total

    hits = index.search(
        wanted,
        DEFAULT_TOP_K if request.top_k is None else request.top_k,
        request.where,
        thumbnails=request.thumbnails,
        offset=request.offset,
        min_score=min_score,
        cancelled=cancelled,
    )
    mapped = index.facts.mapped
    recall = None if mapped is None else mapped.recall
    return Answered(Retrieved(hits, index.generation, request.thumbnails), place, recall)


def _places(index: Index, loaded: LoadedRelease, point: Point) -> tuple[Place, Place]:
    """The places of the texts and of the images of a query: images are embedded at the α of the
    index, and so are texts, unless the request moves them.
    """
    changes_images = loaded.release.image_tower.change is not None
    images_at = loaded.place()
    if changes_images:
        images_at = loaded.place(Point(alpha=index.facts.plan.release.alpha))
    place = images_at if point == DEFAULT_POINT else loaded.place(point)
    if changes_images and place.encoder_alpha != images_at.encoder_alpha:
        raise invalid(
            f"alpha is {place.encoder_alpha:g}, and the images of the index {index.name!r} are at"
            f" alpha {images_at.alpha:g}; leave alpha out"
        )
    return place, images_at
