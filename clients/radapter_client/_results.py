"""The results of the client's methods."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ._exceptions import ModelNotFound, ServerError, bad_argument, shown
from ._images import ImageLike, read_image
from ._wire import Array


class _Brief(reprlib.Repr):
    """Shows some entries of long lists, and four digits of a number."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxdict = 2
        self.maxstring = self.maxother = 24

    def repr_float(self, number: float, level: int) -> str:
        return f"{number:.4g}"


class _OneLine:
    """A dataclass that shows itself in a line, however much it holds."""

    def __repr__(self) -> str:
        shown = [part for part in fields(self) if part.repr]  # type: ignore[arg-type]
        brief = _Brief()
        values = [f"{part.name}={brief.repr(getattr(self, part.name))}" for part in shown]
        return f"{type(self).__name__}({', '.join(values)})"


@dataclass(frozen=True, repr=False)
class Classification(_OneLine):
    """The best labels of one image.

    Args:
        labels: best first; none where no label of `multi_label` reached the threshold.
        scores: of these labels, in [0, 1]; over all labels of the request they sum to 1, unless the
            model was trained with a sigmoid or the labels are scored on their own (`multi_label`).
        release: the version of the release that answered.

    Example: `client.classify("cat.jpg", ["a cat", "a dog"]).top` is "a cat".
    """

    labels: list[str]
    scores: list[float]
    release: int

    @property
    def top(self) -> str:
        """The best label; an empty text where there is none."""
        return self.labels[0] if self.labels else ""


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation(_OneLine):
    """Which label each pixel of one image has.

    Args:
        mask: uint16 [H, W], index into `labels`; H and W are the image's own, turned by its EXIF
            orientation unless the release says otherwise.
        labels: the request's labels, followed by "background" where a threshold or proposals were
            given.
        scores: of each label, in [0, 1]: the mean probability over its pixels, 0 where it has none.
        release: the version of the release that answered.
        background: index of the background, or None without a threshold and proposals.
        image: what was segmented, for `overlay`.
        exif_orientation: whether the release turns images as their EXIF orientation says.

    Example: `client.segment("street.jpg", ["road", "car", "sky"]).overlay().save("overlay.png")`
    """

    mask: npt.NDArray[np.uint16] = field(repr=False)
    labels: list[str]
    scores: list[float]
    release: int
    background: int | None = None
    image: ImageLike | None = field(default=None, repr=False)
    exif_orientation: bool = True

    @cached_property
    def shares(self) -> list[float]:
        """Each label's share of the pixels, in [0, 1], in the order of `labels`."""
        pixels = np.bincount(self.mask.ravel(), minlength=len(self.labels))
        return [float(share) for share in pixels / self.mask.size]

    def overlay(
        self,
        image: ImageLike | None = None,
        *,
        opacity: float = 0.5,
        legend: bool = True,
        font: str | os.PathLike[str] | None = None,
    ) -> Image.Image:
        """The image with its labels in colour; a label has the same colour in every image, the
        background none.

        Args:
            image: to draw on, of the mask's size; None for the one that was segmented.
            opacity: of the colours, in [0, 1]; outlines are always opaque.
            legend: below the image, the labels that occur with their share of the pixels; a small
                image is enlarged to fit it. Without it, the answer has the mask's size.
            font: TrueType or OpenType file for labels beyond the Latin alphabet, which are
                otherwise spelled out in code points.

        Raises:
            InvalidImage: the image cannot be read, or no longer.
            InvalidRequest: an image of another size, or a font that cannot be read.
        """
        from ._overlay import add_legend, paint

        chosen = self.image if image is None else image
        if chosen is None:
            raise bad_argument("no image to draw on: give overlay(image)")
        if not 0 <= opacity <= 1:
            raise bad_argument(f"opacity is {shown(opacity)}; allowed are numbers from 0 to 1")
        picture = read_image(chosen, exif_orientation=self.exif_orientation)
        height, width = self.mask.shape
        if picture.size != (width, height):
            raise bad_argument(
                f"an image of {picture.width} x {picture.height} pixels for a mask of {width} x"
                f" {height}"
            )
        painted = paint(picture, self.mask, self.background, opacity, enlarge=legend)
        if not legend:
            return painted
        return add_legend(painted, self.labels, self.shares, self.background, font)


@dataclass(frozen=True, repr=False)
class Hit(_OneLine):
    """An image of an index that a search found.

    Args:
        id: its name in the index.
        score: cosine with the query, in [-1, 1].
        metadata: what the index knows of it.
        thumbnail: a JPEG file's bytes, where the search asked for thumbnails and the index has one.

    Example: `[(hit.id, hit.score) for hit in client.search("a red bicycle", index="photos")]`
    """

    id: str
    score: float
    metadata: dict[str, Any]
    thumbnail: bytes | None = field(default=None, repr=False)

    @property
    def about(self) -> dict[str, Any]:
        """The metadata that people read: without the path, which is the id, and the file's
        digest.
        """
        return {
            name: value for name, value in self.metadata.items() if name not in ("path", "digest")
        }


class Hits(list[Hit]):
    """The hits of a search, best first: a list of `Hit`.

    Attributes:
        index_version: of the index that was searched, for the pages that follow; None where the
            search had neither `offset` nor `index_version`.

    Example: `client.search("a cat", index="photos", offset=0).index_version`
    """

    index_version: str | None = None

    def __repr__(self) -> str:
        best = f", best {self[0].id!r:.60} {self[0].score:.4f}" if self else ""
        return f"<{len(self)} hits{best}>"


@dataclass(frozen=True, repr=False)
class Release(_OneLine):
    """The facts of one served version.

    Args:
        version: integer that all models of the release share.
        alpha: the adapter's weight in it, in [0, 1]; 0 is the untouched base.
        dynamic_alpha: whether requests may bring another.
        embed_dim: width D of its embeddings.
        logit_scale: factor on the cosine before the softmax.
        templates: the prompt templates used where a request brings none.
        label_sets: name to facts of each label set that `classify` knows by name.
        facts: the whole of its release.json.

    Example: `client.release().alpha`
    """

    version: int
    alpha: float
    dynamic_alpha: bool
    architecture: str
    precision: str
    embed_dim: int = field(repr=False)
    logit_scale: float = field(repr=False)
    templates: list[str] = field(repr=False)
    label_sets: dict[str, Any] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)

    @property
    def exif_orientation(self) -> bool:
        """Whether it turns images as their EXIF orientation says, before it looks at them."""
        return bool(self.facts.get("preprocess", {}).get("exif_orientation", True))

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Release:
        try:
            return cls(
                version=int(facts["version"]),
                alpha=float(facts["alpha"]),
                dynamic_alpha=bool(facts.get("dynamic_alpha", False)),
                architecture=facts["architecture"],
                precision=facts["precision"],
                embed_dim=int(facts["embed_dim"]),
                logit_scale=float(facts["logit_scale"]),
                templates=list(facts["templates"]),
                label_sets=dict(facts["label_sets"]),
                facts=facts,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(
                f"the server describes its release in a way unknown to this client: {error!r}"
            ) from error


def read_hits(
    ids: Sequence[str],
    scores: Array,
    metadata: Sequence[str],
    thumbnails: Iterable[bytes] | None = None,
) -> Hits:
    """The outputs of `retrieve`, best first."""
    pictures = [b""] * len(ids) if thumbnails is None else list(thumbnails)
    try:
        return Hits(
            Hit(name, score, json.loads(facts), bytes(picture) or None)
            for name, score, facts, picture in zip(
                ids, scores.tolist(), metadata, pictures, strict=True
            )
        )
    except ValueError as error:
        raise ServerError(f"the server's hits cannot be read: {error}") from error


def read_releases(config: Mapping[str, Any]) -> list[Release]:
    """The releases that a model's configuration names in its parameters, oldest first."""
    texts = {
        key: value.get("string_value", "") for key, value in config.get("parameters", {}).items()
    }
    keys = [key for key in texts if key.startswith("release.")] or [
        key for key in texts if key == "release"
    ]
    if not keys:
        raise ServerError(
            "the server says nothing of its release: its models were not written by radapter-export"
        )
    try:
        facts = [json.loads(texts[key]) for key in keys]
    except ValueError as error:
        raise ServerError(f"the server's release description is not JSON: {error}") from error
    return sorted((Release.from_facts(fact) for fact in facts), key=lambda release: release.version)


def pick_release(releases: list[Release], version: int | None) -> Release:
    """The release of this version, or the newest."""
    if version is None:
        return releases[-1]
    for release in releases:
        if release.version == version:
            return release
    served = ", ".join(str(release.version) for release in releases)
    raise ModelNotFound(f"the server does not serve release {version}; it serves {served}")
