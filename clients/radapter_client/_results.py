"""The results of the client's methods."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ._images import ImageLike, read_image
from ._pictures import add_legend, paint
from .failures import ServerError, bad_argument, shown


class _Brief(reprlib.Repr):
    """Shortens long lists, and shows four digits of a number."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxdict = 2
        self.maxstring = self.maxother = 24

    def repr_float(self, number: float, level: int) -> str:
        return f"{number:.4g}"


class _OneLine:
    """A dataclass whose repr is one short line."""

    def __repr__(self) -> str:
        shown = [part for part in fields(self) if part.repr]  # type: ignore[arg-type]
        brief = _Brief()
        values = [f"{part.name}={brief.repr(getattr(self, part.name))}" for part in shown]
        return f"{type(self).__name__}({', '.join(values)})"


@dataclass(frozen=True)
class Receipt:
    """What an answer was computed with, as the server says; the client has compared it with what
    was asked.

    Args:
        release: version of the release.
        adapter: name of the adapter beside the release; None for the release itself.
        alpha: of the adapter if there is one, else of the release, in [0, 1].
        mapped: recall@10 of an index that was mapped from another image tower (`radapter-index
            map`), in [0, 1]; None of any other index and task.
        adapter_digest: 12 digits that tell an adapter from one that has replaced it under its name;
            None without an adapter, or of an older server.

    Example: `client.classify("cat.jpg", ["a cat"], adapter="anna").receipt.adapter`
    """

    release: int
    adapter: str | None
    alpha: float
    mapped: float | None = None
    adapter_digest: str | None = None

    @classmethod
    def read(cls, text: str) -> Receipt:
        """Read a receipt in JSON."""
        facts = json.loads(text)
        adapter = facts["adapter"]
        if not (adapter is None or (isinstance(adapter, str) and adapter)):
            raise ValueError(f"the receipt names the adapter {adapter!r:.80}")
        mapped = facts.get("mapped")
        digest = facts.get("adapter_digest")
        if not (digest is None or isinstance(digest, str)):
            raise ValueError(f"the receipt has the digest {digest!r:.80}")
        return cls(
            int(facts["release"]),
            adapter,
            float(facts["alpha"]),
            None if mapped is None else float(mapped),
            digest,
        )


@dataclass(frozen=True, repr=False)
class Classification(_OneLine):
    """The best labels of one image.

    Args:
        labels: best first; empty if no label of `multi_label` reached the threshold.
        scores: of these labels, in [0, 1]; over all labels of the request they sum to 1, unless the
            model was trained with a sigmoid or `multi_label` scores each label alone.
        release: version of the release that answered.
        receipt: release, adapter and alpha; None of a server that is older than adapters.

    Example: `client.classify("cat.jpg", ["a cat", "a dog"]).top` is "a cat".
    """

    labels: list[str]
    scores: list[float]
    release: int
    receipt: Receipt | None = field(default=None, repr=False)

    @property
    def top(self) -> str:
        """The best label; "" if there is none."""
        return self.labels[0] if self.labels else ""


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation(_OneLine):
    """The labels of one image's pixels.

    Args:
        mask: uint16 [H, W], index into `labels`; H and W are the image's own, turned according
            to its EXIF orientation unless the release says otherwise.
        labels: the request's labels, followed by "background" where a threshold or proposals were
            given.
        scores: of each label, in [0, 1]: the mean probability over its pixels, 0 where it has none.
        release: version of the release that answered.
        background: index of the background in `labels`; None without a threshold and proposals.
        image: the segmented image, for `overlay`.
        exif_orientation: True if the release turns images according to their EXIF orientation.
        receipt: as of a `Classification`.

    Example: `client.segment("street.jpg", ["road", "car", "sky"]).overlay().save("overlay.png")`
    """

    mask: npt.NDArray[np.uint16] = field(repr=False)
    labels: list[str]
    scores: list[float]
    release: int
    background: int | None = None
    image: ImageLike | None = field(default=None, repr=False)
    exif_orientation: bool = True
    receipt: Receipt | None = field(default=None, repr=False)

    @cached_property
    def shares(self) -> list[float]:
        """Share of the pixels with each label, in [0, 1], in the order of `labels`."""
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
        """Draw the labels over the image in colour; a label has the same colour in every image, and
        the background has no colour.

        Args:
            image: to draw on, of the mask's size; None for the segmented image.
            opacity: of the colours, in [0, 1]; outlines are always opaque.
            legend: list the labels that occur, with their fraction of the pixels, below the image;
                a small image is enlarged to fit. Without a legend, the result has the mask's size.
            font: TrueType or OpenType file for labels beyond the Latin alphabet, which are
                otherwise written as code points.

        Raises:
            InvalidImage: the image cannot be read, or no longer.
            InvalidRequest: the image has another size, the opacity is outside [0, 1], or the font
                cannot be read.
        """
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
        metadata: the index's columns for this image, by name.
        thumbnail: bytes of a JPEG file, if the search asked for thumbnails and the index has one.

    Example: `[(hit.id, hit.score) for hit in client.search("a red bicycle", index="photos")]`
    """

    id: str
    score: float
    metadata: dict[str, Any]
    thumbnail: bytes | None = field(default=None, repr=False)

    @property
    def about(self) -> dict[str, Any]:
        """The metadata worth showing: without empty values, the path, which equals the id, and the
        file's digest.
        """
        return {
            name: value
            for name, value in self.metadata.items()
            if name not in ("path", "digest") and value is not None
        }


class Hits(list[Hit]):
    """The hits of a search, best first: a list of `Hit`.

    Attributes:
        index_version: version of the searched index, for the next pages; None if the search gave
            neither `offset` nor `index_version`.
        receipt: as of a `Classification`.

    Example: `client.search("a cat", index="photos", offset=0).index_version`
    """

    index_version: str | None = None
    receipt: Receipt | None = None

    def __repr__(self) -> str:
        best = f", best {self[0].id!r:.60} {self[0].score:.4f}" if self else ""
        return f"<{len(self)} hits{best}>"


@dataclass(frozen=True, repr=False)
class Release(_OneLine):
    """The facts of a served release.

    Args:
        version: integer that all models of the release share.
        alpha: the adapter's weight, in [0, 1]; 0 is the untouched base.
        dynamic_alpha: True if requests may give another alpha.
        embed_dim: width D of the embeddings.
        logit_scale: factor on the cosine before the softmax.
        templates: the prompt templates for requests without any.
        label_sets: facts of each label set that `classify` knows, by name.
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
        """True if the release turns images according to their EXIF orientation before it embeds
        them.
        """
        preprocess = self.facts.get("preprocess")
        return not isinstance(preprocess, dict) or bool(preprocess.get("exif_orientation", True))


def read_releases(config: Mapping[str, Any]) -> list[Release]:
    """Read the releases in the parameters of a model's configuration, oldest first."""
    texts = {
        key: value.get("string_value", "") for key, value in config.get("parameters", {}).items()
    }
    keys = [key for key in texts if key.startswith("release.")]
    if not keys:
        raise ServerError(
            "the server says nothing of its release: its models were not written by radapter-export"
        )
    releases = []
    for key in keys:
        facts = json.loads(texts[key])
        release = Release(
            version=int(facts["version"]),
            alpha=float(facts["alpha"]),
            dynamic_alpha=bool(facts.get("dynamic_alpha", False)),
            architecture=str(facts["architecture"]),
            precision=str(facts["precision"]),
            embed_dim=int(facts["embed_dim"]),
            logit_scale=float(facts["logit_scale"]),
            templates=[str(template) for template in facts["templates"]],
            label_sets=dict(facts["label_sets"]),
            facts=facts,
        )
        releases.append(release)
    return sorted(releases, key=lambda release: release.version)
