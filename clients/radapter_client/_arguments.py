"""Arguments of the clients' methods, checked, as plain values by the names of a task's inputs."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ._exceptions import InvalidImage, InvalidRequest, bad_argument, shown
from ._images import ImageLike, encode_small, image_sizes, is_one_image
from ._url import ServerURL
from ._wire import Array

# A message of gRPC cannot have 2 GiB; this leaves room for the image.
MAX_PROPOSALS = 3 * 2**29
MAX_PARTS = 16  # of a search: texts, images and ids
EXAMPLE_WEIGHT = 0.5  # of a label's examples beside its text
CALIBRATED = "calibrated"  # the least score that the release was exported with


def label_values(
    labels: Sequence[str] | None, label_set: str | None, templates: Sequence[str] | None
) -> dict[str, Any]:
    """What an image's pixels or the image itself are to be called."""
    if labels is not None and label_set is not None:
        raise bad_argument("give labels or a label_set, not both")
    values: dict[str, Any] = texts(label_set=label_set)
    if label_set is None:
        names = [] if labels is None else several_texts("labels", labels)
        if not names:
            raise InvalidRequest(
                'no labels: give labels=["a cat", "a dog"] or label_set="NAME"', code="no_labels"
            )
        values["labels"] = names
    if templates is not None:
        values["templates"] = several_texts("templates", templates)
        if not values["templates"]:
            raise bad_argument(
                'no templates: give some, such as "a photo of a {}.", or None for the'
                " release's own"
            )
    return values


def example_values(
    labels: Sequence[str],
    examples: Mapping[str, ImageLike | Sequence[ImageLike]],
    weight: float | Mapping[str, float] | None,
    shrink_to: int | None,
) -> dict[str, Any]:
    """Images that show some of the labels, and their weight beside texts."""
    if not isinstance(examples, Mapping):
        raise bad_argument(
            f'examples is {shown(examples)}; give images by label, such as {{"a mug": ["mug.jpg"]}}'
        )
    images: list[bytes] = []
    places: list[int] = []
    for name, images_of_label in examples.items():
        if name not in labels:
            raise bad_argument(f"examples has {shown(name)}, which is not among the labels")
        items = several_images("examples", images_of_label)
        try:
            images += [encode_small(item, shrink_to) for item in items]
        except InvalidImage as error:
            raise bad_argument(f"an example of {shown(name)}: {error}") from error
        places += [labels.index(name)] * len(items)
    if not images:
        raise bad_argument('no examples: give some, such as {"a mug": ["mug.jpg"]}, or None')
    values: dict[str, Any] = {"examples": images, "example_labels": places}
    if isinstance(weight, Mapping):
        for name in weight:
            if name not in examples:
                raise bad_argument(f"example_weight has {shown(name)}, which has no examples")
        weights = [weight.get(name, EXAMPLE_WEIGHT) for name in labels]
        values["example_weight"] = [fraction("example_weight", value) for value in weights]
    elif weight is not None:
        values["example_weight"] = [fraction("example_weight", weight)]
    return values


def fractions(**values: float | None) -> dict[str, float]:
    """Those that are not None of numbers in [0, 1]."""
    return {name: fraction(name, value) for name, value in values.items() if value is not None}


def counts(least: int = 1, **values: int | None) -> dict[str, int]:
    """Those that are not None of whole numbers from `least`."""
    return {name: count(name, value, least) for name, value in values.items() if value is not None}


def texts(**values: str | None) -> dict[str, str]:
    """Those that are not None of texts."""
    return {name: text(name, value) for name, value in values.items() if value is not None}


def proposal_values(
    image: ImageLike, proposals: Any, scores: Any, weight: float | None
) -> dict[str, Any]:
    """One image's proposals in the types that `segment` takes; empty where there are none."""
    if proposals is None:
        for name, value in (("proposal_scores", scores), ("proposal_weight", weight)):
            if value is not None:
                raise bad_argument(f"{name} without proposals")
        return {}
    values: dict[str, Any] = {"proposals": _masks(proposals, image_sizes(image))}
    if scores is not None:
        values["proposal_scores"] = table = _array("proposal_scores", scores).astype(np.float32)
        rows = len(values["proposals"])
        if table.ndim != 2 or len(table) != rows:
            raise bad_argument(
                f"proposal_scores have the shape {list(table.shape)}; needed are [{rows}, C]: a row"
                " for each proposal and a column for each of the C labels"
            )
    return values | fractions(proposal_weight=weight)


def query_values(
    text: str | Sequence[str] | None,
    image: ImageLike | Sequence[ImageLike] | None,
    id: str | Sequence[str] | None,
    weights: Sequence[float] | None,
) -> tuple[dict[str, Any], list[ImageLike]]:
    """What to search for: its texts, ids and weights, and the images that go with them."""
    parts = {
        name: several_texts(name, [value] if isinstance(value, str) else value)
        for name, value in (("text", text), ("id", id))
        if value is not None
    }
    values: dict[str, Any] = {name: items for name, items in parts.items() if items}
    images = [] if image is None else several_images("image", image)
    total = sum(map(len, values.values())) + len(images)
    if not total:
        raise bad_argument('give a text to search for, image="FILE" or id="ID", one or more')
    if total > MAX_PARTS:
        raise bad_argument(f"{total} texts, images and ids; at most {MAX_PARTS} are allowed")
    if weights is not None:
        with np.errstate(over="ignore"):  # what is too large is refused below
            factors = _array("weights", as_list("weights", weights)).astype(np.float32)
        if factors.shape != (total,):
            raise bad_argument(
                f"weights has the shape {list(factors.shape)}; [{total}] is needed: one for each"
                " text, image and id, in this order"
            )
        if not np.isfinite(factors).all():
            raise bad_argument(f"weights are {list(weights)}; allowed are finite numbers")
        values["weight"] = factors.tolist()
    return values, images


def result_values(
    index: str,
    top_k: int,
    where: str | None,
    min_score: float | str | None,
    offset: int | None,
    index_version: str | None,
) -> dict[str, Any]:
    """Where to search, and what to give back."""
    values: dict[str, Any] = {"index": text("index", index), "top_k": count("top_k", top_k)}
    values |= texts(where=where, index_version=index_version)
    values |= counts(0, offset=offset)
    if isinstance(min_score, str) and min_score == CALIBRATED:
        return values | {"calibrated": True}
    if min_score is not None:
        number = isinstance(min_score, (int, float, np.number)) and not isinstance(min_score, bool)
        if not number or not -1 <= float(min_score) <= 1:
            raise bad_argument(
                f"min_score is {shown(min_score)}; allowed are numbers from -1 to 1, and"
                f" {CALIBRATED!r}"
            )
        values["min_score"] = float(np.float32(min_score))
    return values


def for_each(name: str, value: Any, images: int | None) -> list[Any]:
    """An argument of each of several images, of which a list must have as many entries; `images`
    is None for one image that is not in a list.
    """
    if images is None:
        return [value]
    if value is None:
        return [None] * images
    items = as_list(name, value)
    if len(items) != images:
        raise bad_argument(
            f"{name} has {len(items)} entries for {images} images; a list of images needs one for"
            " each, or None"
        )
    return items


def _masks(proposals: Any, sizes: set[tuple[int, int]]) -> Array:
    """Proposals as uint8 [N, H, W], 255 inside."""
    masks = _array("proposals", proposals)
    allowed = "bool, uint8 from 0 to 255, or float from 0 to 1, [N, H, W]"
    if masks.ndim != 3 or 0 in masks.shape:
        raise bad_argument(f"proposals of shape {list(masks.shape)}; allowed: {allowed}")
    width, height = masks.shape[:0:-1]
    if sizes and (width, height) not in sizes:
        known = " or ".join(f"{wide} x {high}" for wide, high in sorted(sizes))
        raise bad_argument(
            f"proposals of {width} x {height} pixels (width x height) for an image of {known}"
        )
    if masks.size > MAX_PROPOSALS:
        raise bad_argument(
            f"{len(masks)} proposals of {width} x {height} pixels are {masks.size / 2**30:.1f} GiB;"
            f" a request holds {MAX_PROPOSALS / 2**30:g}: send fewer"
        )
    if masks.dtype == np.bool_:
        return np.asarray(masks.view(np.uint8) * np.uint8(255))
    if masks.dtype.kind == "f" and masks.min() >= 0 and masks.max() <= 1:
        return np.asarray(np.rint(masks * np.float32(255)), np.uint8)
    if masks.dtype != np.uint8:
        span = f"from {masks.min():g} to {masks.max():g}"
        raise bad_argument(f"proposals of {masks.dtype} {span}; allowed: {allowed}")
    if masks.max() == 1:
        raise bad_argument(
            "no value of the proposals is above 1 of 255; send proposals.astype(bool) if they are 0"
            " and 1"
        )
    return np.asarray(masks)


def _array(name: str, value: Any) -> Array:
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "bfiu":
            raise ValueError(f"values of type {array.dtype}")
    except (ValueError, TypeError, RuntimeError) as error:  # a ragged list; a tensor on a GPU
        raise bad_argument(f"{name} is no array of numbers: {error}") from error
    return array


def as_list(name: str, items: Any) -> list[Any]:
    """A list of several; a text or an array would otherwise fall apart into letters or rows."""
    if is_one_image(items) or not isinstance(items, Iterable):
        raise bad_argument(f"{name} takes a list, not one {type(items).__name__}")
    return list(items)


def several_images(name: str, images: Any) -> list[Any]:
    """The images of a list, or the one image."""
    return [images] if is_one_image(images) else as_list(name, images)


def several_texts(name: str, items: Any) -> list[str]:
    """The texts of a list."""
    return [text(name, item) for item in as_list(name, items)]


def text(name: str, value: str) -> str:
    """A text that can be sent."""
    if not isinstance(value, str):
        raise bad_argument(f"{name} takes texts, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise bad_argument(f"{name} has a text that is not Unicode: {shown(value)}") from error
    return value


def count(name: str, value: int, least: int = 1) -> int:
    """A whole number from `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not least <= number < 2**31 or isinstance(value, bool):
        raise bad_argument(f"{name} is {shown(value)}; allowed are whole numbers from {least}")
    return number


def fraction(name: str, value: float) -> float:
    """A number from 0 to 1, as precise as it is sent."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, np.floating))
        or not 0 <= value <= 1
    ):
        raise bad_argument(f"{name} is {shown(value)}; allowed are numbers from 0 to 1")
    return float(np.float32(value))


def seconds(value: float) -> float:
    """A time-out."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (math.isfinite(value) and value > 0)
    ):
        raise bad_argument(f"timeout is {shown(value)}; allowed are seconds above 0")
    return float(value)


def check_key(key: str, url: ServerURL) -> None:
    """An API key that fits in a header; warns where others could read it on the way."""
    if (
        not isinstance(key, str)
        or not key
        or not key.isascii()
        or not key.isprintable()
        or " " in key
    ):
        raise bad_argument(
            "api_key is no key: it has letters, digits and signs of ASCII, and no white space"
        )
    if not url.secure and not url.loopback:
        kind = "grpcs" if url.protocol == "grpc" else "https"
        warnings.warn(f"the API key travels to {url} in the clear; use {kind}://", stacklevel=3)
