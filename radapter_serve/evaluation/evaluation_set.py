"""What an evaluation needs from a data set, and what data sets share."""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.contract.labels import mean_embeddings, split_label
from radapter_serve.contract.preprocess import decode, oriented
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.embedder import Embedder
from radapter_serve.evaluation.metrics import Floats, check_finite, shares
from radapter_serve.evaluation.row import Bin, ClassFigures, Measured, SetFacts, Setup
from radapter_serve.evaluation.suite import Entry
from radapter_serve.files import digest_of

MOST_CONFUSED = 50  # classes of a confusion matrix that a row keeps and a picture can show
_READERS = 8  # files that are read at once
_OF_PNG = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
EmbedTexts = Callable[[Sequence[str]], Floats]
# Of a model, by templates: of each class its embedding [D], or of all classes of a set at once [C,
# D].
Known = dict[tuple[tuple[str, ...], "str | tuple[str, ...]"], Floats]


class Scorer(Protocol):
    """Takes all images of a set, in order, and measures one model on them.

    Attributes:
        nearest: of the images that were taken so far, the best of the nouns that were asked for;
            nothing where none were.
    """

    nearest: list[NDArray[np.int64]]

    def add(self, items: Sequence[Any]) -> Floats | None:
        """Take images, from `prepare`, to the model that is selected.

        Returns:
            Their cosines with each class, float32 [N, C]; None where the set has no classes of
            whole images.
        """

    def measured(self) -> Measured:
        """The figures over all images that were taken."""


@dataclass(frozen=True)
class EvaluationSet(ABC):
    """A data set.

    Attributes:
        entry: what the suite says.
        images: not decoded; `name` is what to call one in an error.
        task: as CLIP_benchmark names it.
        most: images in memory at once; None leaves it to the caller.
    """

    entry: Entry
    images: Sequence[Any]

    task: ClassVar[str]
    most: ClassVar[int | None] = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def nouns(self) -> Sequence[str]:
        """Nouns beside the set's classes that its images can be asked for, too; none where it has
        no classes of whole images.
        """
        return ()

    @property
    @abstractmethod
    def facts(self) -> SetFacts:
        """What a row says about the set."""

    @property
    @abstractmethod
    def contents(self) -> list[str]:
        """A digest of each image, and of its masks where it has some."""

    @abstractmethod
    def setup(self, embedder: Embedder) -> Setup:
        """How these models are evaluated on the set."""

    @abstractmethod
    def prepare(self, embedder: Embedder, number: int) -> Any:
        """Read and decode an image; thread-safe."""

    @abstractmethod
    def scorer(self, embedder: Embedder, known: Known, *, ask_nouns: bool = False) -> Scorer:
        """Measures the model that is selected; embeds the texts first, except those in `known`.

        Args:
            embedder: holds the model.
            known: of that model.
            ask_nouns: find the best of `nouns` for each image as well.
        """


def class_embeds(
    embed_texts: EmbedTexts,
    classes: Sequence[str],
    templates: Sequence[str],
    known: Known | None = None,
) -> Floats:
    """One unit-length embedding a class: the mean over its names and all templates.

    Args:
        embed_texts: texts to unit-length embeddings [N, D].
        classes: class names, synonyms after commas.
        templates: prompt templates with `{}`.
        known: of the same model, by templates and class, or by templates and all classes; takes the
            new ones.

    Returns:
        float32 [C, D].

    Raises:
        RAdapterError: no template, or embeddings that are not finite.
    """
    if not templates:
        raise RAdapterError("no prompt template; give one or more, such as 'a photo of a {}.'")
    known = {} if known is None else known
    key = tuple(templates)
    if (whole := known.get((key, tuple(classes)))) is not None:
        return whole
    new = [line for line in dict.fromkeys(classes) if (key, line) not in known]
    if new:
        embeds = check_finite(mean_embeddings(embed_texts, new, templates))
        known.update({(key, line): embed for line, embed in zip(new, embeds, strict=True)})
    return np.stack([known[key, line] for line in classes])


def first_names(classes: Sequence[str]) -> list[str]:
    """The names to show: of each class the first of its synonyms."""
    return [split_label(line)[0] for line in classes]


def by_class(
    classes: Sequence[str],
    n: NDArray[Any],
    recall: NDArray[np.float64],
    iou: NDArray[np.float64] | None = None,
    average_precision: NDArray[np.float64] | None = None,
) -> list[ClassFigures]:
    """`per_class` of a row, by first name, from the cases and values of each class; NaN becomes
    None.
    """
    columns = [
        [None] * len(classes) if values is None else _rounded(values)
        for values in (recall, iou, average_precision)
    ]
    names = first_names(classes)
    return [ClassFigures(*of) for of in zip(names, n.tolist(), *columns, strict=True)]


def by_bin(sums: NDArray[np.float64]) -> list[Bin]:
    """`calibration` of a row, from `calibration_sums`."""
    confidence = _rounded(shares(sums[1], sums[0]))
    accuracy = _rounded(shares(sums[2], sums[0]))
    return [Bin(int(n), confidence[i], accuracy[i]) for i, n in enumerate(sums[0].tolist())]


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]


def confused(counts: NDArray[np.int64]) -> list[list[int]] | None:
    """`confusion` of a row, from `metrics.confusion`; None where there are too many classes to look
    at.
    """
    return counts.tolist() if len(counts) <= MOST_CONFUSED else None


def as_seen(data: bytes, entry: Entry, embedder: Embedder) -> bytes:
    """An image file that looks to these models as the suite asks, whether or not they turn images
    by EXIF.
    """
    if entry.exif_orientation == embedder.exif_orientation:
        return data
    stored = decode(data, exif_orientation=False)
    turned = oriented(stored)
    if turned is stored:
        return data
    return png_of(turned if entry.exif_orientation else stored)


def png_of(image: Image.Image) -> bytes:
    """An image as a PNG file that has no EXIF."""
    out = io.BytesIO()
    (image if image.mode in _OF_PNG else image.convert("RGB")).save(out, "PNG", exif=b"")
    return out.getvalue()


def drawn(count: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Which of `count` images are used: all, or `limit` drawn by the seed; ascending."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def contents(name: str, parts: Sequence[Callable[[], Iterable[bytes | NDArray[Any]]]]) -> list[str]:
    """Digests of images and their masks, each read once.

    Args:
        name: of the data set.
        parts: for each image, a function that reads its file and its masks.

    Raises:
        RAdapterError: one can't be read.
    """

    def of(read: Callable[[], Iterable[bytes | NDArray[Any]]]) -> str:
        whole = hashlib.sha256()
        for part in read():
            whole.update(
                part
                if isinstance(part, bytes)
                else f"{part.dtype}{part.shape}".encode() + part.tobytes()
            )
        return whole.hexdigest()

    try:
        with ThreadPoolExecutor(_READERS, thread_name_prefix="digest") as pool:
            return list(pool.map(of, parts))
    except RAdapterError as error:
        raise RAdapterError(f"data set {name!r}: {error}") from error


def digest(*parts: Sequence[Any]) -> str:
    """`sha256:` over lists of texts and numbers."""
    return digest_of(json.dumps([list(part) for part in parts], ensure_ascii=False).encode())
