"""Labels by example: images that a request brings for its labels, alone or beside their texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radapter_serve.contract.alpha import Alpha, single
from radapter_serve.contract.errors import (
    IMAGE_TOO_LARGE,
    INVALID_IMAGE,
    Cancelled,
    TaskError,
    check_cancelled,
    invalid,
)
from radapter_serve.contract.preprocess import ImageFile, read_header
from radapter_serve.tasks.label_embeddings import (
    DEFAULT_WEIGHT,
    MAX_EXAMPLES,
    Examples,
    LabelSet,
)
from radapter_serve.tasks.label_store import LabelStore
from radapter_serve.tasks.outcome import Outcome


@dataclass(frozen=True)
class ImageRows:
    """The images of a request that are to be embedded.

    Args:
        images: encoded.
        alpha: of each, [B, 1], as `RequestAlpha` gives it; None where it is no input.
        cancelled: whether the caller has given up; None where that is unknown.
    """

    images: Sequence[bytes | ImageFile]
    alpha: Alpha | None = None
    cancelled: Cancelled | None = None


# The images of several requests to the embeddings of each.
EmbedAt = Callable[[Sequence[ImageRows]], Sequence[Outcome[NDArray[np.float32]]]]
MAX_ENCODED = 256  # of a request, each at each α that it asks for
_PART = 16  # images, after which their embeddings are kept, even if the caller gives up
_CANCELLED = 1e-6  # length below which a sum of unit vectors points nowhere


def read_examples(
    images: Sequence[Sequence[bytes]] | None,
    labels: Sequence[Sequence[int]] | None,
    weights: Sequence[ArrayLike] | None,
) -> list[Examples] | None:
    """The examples of each image of a request; None where it brings none.

    Args:
        images: of each image its examples; where all are empty, those of the image before.
        labels: of each image, the places of its examples' labels.
        weights: of each image, one for all labels or one for each; None for half.

    Raises:
        TaskError: one of them without the others; numbers that differ; too many examples; a weight
            that is not in [0, 1].
    """
    if images is None and labels is None and weights is None:
        return None
    if images is None or labels is None:
        raise invalid("examples and example_labels belong together, and example_weight to them")
    found: list[Examples] = []
    shares = [DEFAULT_WEIGHT] * len(images) if weights is None else weights
    for own, places, share in zip(images, labels, shares, strict=True):
        given = tuple(image if isinstance(image, bytes) else image.encode() for image in own)
        if found and not any(given):
            given = found[-1].images
        if not given:
            raise invalid("no examples; give at least one, or leave example_labels out")
        if len(given) != len(places):
            raise invalid(
                f"{len(given)} examples and {len(places)} example_labels; each example has one"
            )
        found.append(Examples(given, tuple(map(int, places)), _checked_weights(share)))
    count = len({image for examples in found for image in examples.images})
    if count > MAX_EXAMPLES:
        raise invalid(f"{count} examples in a request; at most {MAX_EXAMPLES} are allowed")
    return found


def check_encoded(asked: Iterable[tuple[Examples, float | None]]) -> None:
    """Refuse a request that has more examples at more α than are encoded for one.

    Args:
        asked: the examples of each row, and its α.

    Raises:
        TaskError: there are too many.
    """
    unique = {(image, alpha) for examples, alpha in set(asked) for image in examples.images}
    if len(unique) > MAX_ENCODED:
        count = len({alpha for _, alpha in unique})
        raise invalid(
            f"examples at {count} α are {len(unique)} images to encode for their labels; at most"
            f" {MAX_ENCODED} are allowed in a request, so send fewer α or examples in each"
        )


def read_shown(found: Iterable[Examples]) -> list[ImageFile]:
    """The headers of the images that show labels, each once.

    Raises:
        TaskError: one is no image, or too large.
    """
    files = {}
    for examples in set(found):
        for place, image in enumerate(examples.images):
            try:
                files[image] = read_header(image)
            except TaskError as error:
                raise _of_example(error, examples, place) from None
    return list(files.values())


def check_places(examples: Examples, count: int) -> None:
    """Refuse examples that don't fit their labels.

    Args:
        examples: of an image.
        count: of its labels.

    Raises:
        TaskError: one is of a label that there is not; weights for more or fewer labels.
    """
    for place in examples.labels:
        if not 0 <= place < count:
            raise invalid(f"example_labels has {place}; there are labels 0 to {count - 1}")
    if len(examples.weights) not in (1, count):
        raise invalid(
            f"example_weight has {len(examples.weights)} numbers for {count} labels; give one"
            " for all, or one for each"
        )


def _of_example(error: TaskError, examples: Examples, place: int) -> TaskError:
    """The error of an example; the image that is classified is not at fault."""
    if error.code not in (INVALID_IMAGE, IMAGE_TOO_LARGE):
        return error
    return invalid(f"example {place + 1} of {len(examples.images)}: {error.message}")


def _checked_weights(given: ArrayLike) -> tuple[float, ...]:
    weights = tuple(np.ravel(given).tolist())
    wrong = [weight for weight in weights if not 0 <= weight <= 1]
    if wrong or not weights:
        shown = f"{wrong[0]:g}" if wrong else "empty"
        raise invalid(
            f"example_weight is {shown}; numbers from 0 (the text alone) to 1 (the examples alone)"
            " are allowed, one for all labels or one for each"
        )
    return weights


class ByExample:
    """Label sets with the embeddings of examples mixed in.

    Args:
        embed_images: the images of several requests at a checked α, as `EmbedImages.at` does it.
        store: keeps the embeddings of examples, so that callers may send them again and again.
        release: tells its releases apart.
    """

    def __init__(self, embed_images: EmbedAt, store: LabelStore, release: str) -> None:
        self._embed_images = embed_images
        self._store = store
        self._release = release

    def __call__(
        self,
        label_set: LabelSet,
        examples: Examples,
        alpha: Alpha | None,
        cancelled: Cancelled | None = None,
    ) -> LabelSet:
        """The labels, those with examples by the mean of these, made unit length, and their text.

        Args:
            label_set: of the texts.
            examples: for some of its labels, or for all.
            alpha: of the image, [1, 1], as `RequestAlpha` gives it.
            cancelled: asked between some examples and the next.

        Raises:
            TaskError: a label that there is not; an example that is no image; a text and examples
                that cancel out; cancelled.
        """
        count = len(label_set.labels)
        check_places(examples, count)
        weights = np.broadcast_to(np.array(examples.weights, np.float32), count)
        embeds = self._embed(examples, alpha, cancelled)
        mixed = label_set.embeds.copy()
        places = np.array(examples.labels)
        for place in np.unique(places):
            shown = _unit(embeds[places == place].mean(0), label_set.labels[place])
            both = (1 - weights[place]) * label_set.embeds[place] + weights[place] * shown
            mixed[place] = _unit(both, label_set.labels[place])
        return replace(label_set, embeds=mixed)

    def _embed(
        self, examples: Examples, alpha: Alpha | None, cancelled: Cancelled | None
    ) -> NDArray[np.float32]:
        at = single(alpha)
        images = examples.images
        keys = {
            image: self._key(digest, at)
            for image, digest in zip(images, examples.digests, strict=True)
        }
        known = self._store.get(list(keys.values()))
        new = [image for image, key in keys.items() if key not in known]
        for start in range(0, len(new), _PART):
            check_cancelled(cancelled)
            part = new[start : start + _PART]
            rows = [ImageRows([image], alpha, cancelled) for image in part]
            outcomes = self._embed_images(rows)
            made: dict[bytes, NDArray[np.float32]] = {}
            for image, outcome in zip(part, outcomes, strict=True):
                if outcome.error is not None:
                    raise _of_example(outcome.error, examples, images.index(image))
                made[keys[image]] = outcome.unwrap()[0]
            self._store.put(made)
            known.update(made)
        return np.stack([known[keys[image]] for image in images])

    def _key(self, digest: bytes, alpha: float | None) -> bytes:
        return hashlib.sha256(repr((self._release, "example", alpha, digest)).encode()).digest()


def _unit(vector: NDArray[np.float32], label: str) -> NDArray[np.float32]:
    length = np.linalg.norm(vector)
    if not length > _CANCELLED:
        raise invalid(f"the examples of {label!r:.80}, or they and its text, cancel out")
    return np.asarray(vector / length, np.float32)
