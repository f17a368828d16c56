"""Arguments of the clients' methods, checked and made into the inputs of the served models."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ._exceptions import InvalidImage, InvalidRequest, bad_argument, shown
from ._images import ImageLike, encode_image, encode_small, image_sizes, is_one_image
from ._url import ServerURL
from ._wire import Array, text_array

# A message of gRPC cannot have 2 GiB; this leaves room for the image.
MAX_PROPOSALS = 3 * 2**29
MAX_PARTS = 16  # of a search: texts, images and ids
EXAMPLE_WEIGHT = 0.5  # of a label's examples beside its text
CALIBRATED = "calibrated"  # the least score that the release was exported with


def label_inputs(
    labels: Sequence[str] | None, label_set: str | None, templates: Sequence[str] | None
) -> dict[str, Array]:
    """What an image's pixels or the image itself are to be called: `labels` or `label_set`, and
    `templates`.
    """
    if labels is not None and label_set is not None:
        raise bad_argument("give labels or a label_set, not both")
    inputs = text_inputs(label_set=label_set)
    if label_set is None:
        names = (
            [] if labels is None else [utf8("labels", label) for label in as_list("labels", labels)]
        )
        if not names:
            raise InvalidRequest(
                'no labels: give labels=["a cat", "a dog"] or label_set="NAME"', code="no_labels"
            )
        inputs["labels"] = text_array(names)
    if templates is not None:
        texts = [utf8("templates", template) for template in as_list("templates", templates)]
        if not texts:
            raise bad_argument(
                'no templates: give some, such as "a photo of a {}.", or None for the'
                " release's own"
            )
        inputs["templates"] = text_array(texts)
    return inputs


def example_inputs(
    labels: Sequence[str],
    examples: Mapping[str, ImageLike | Sequence[ImageLike]],
    weight: float | Mapping[str, float] | None,
    shrink_to: int | None,
) -> dict[str, Array]:
    """Images that show some of the labels.

    Args:
        labels: of the request.
        examples: of each label that has some, by its name in `labels`.
        weight: of examples beside texts, in [0, 1], for all labels or by label; None, and for a
            label that has none, the server's own.
        shrink_to: as of `encode_small`.
    """
    if not isinstance(examples, Mapping):
        raise bad_argument(
            f'examples is {shown(examples)}; give images by label, such as {{"a mug": ["mug.jpg"]}}'
        )
    images: list[bytes] = []
    places: list[int] = []
    for name, given in examples.items():
        if name not in labels:
            raise bad_argument(f"examples has {shown(name)}, which is not among the labels")
        items: list[Any] = [given] if is_one_image(given) else as_list("examples", given)
        try:
            images += [encode_small(item, shrink_to) for item in items]
        except InvalidImage as error:
            raise bad_argument(f"an example of {shown(name)}: {error}") from error
        places += [labels.index(name)] * len(items)
    if not images:
        raise bad_argument('no examples: give some, such as {"a mug": ["mug.jpg"]}, or None')
    inputs = {"examples": text_array(images), "example_labels": np.array(places, np.int32)}
    if isinstance(weight, Mapping):
        return inputs | {"example_weight": _weights_by_label(weight, labels, examples)}
    return inputs | fraction_inputs(example_weight=weight)


def _weights_by_label(
    weights: Mapping[str, float], labels: Sequence[str], examples: Mapping[str, Any]
) -> Array:
    """A weight for each label."""
    for name in weights:
        if name not in examples:
            raise bad_argument(f"example_weight has {shown(name)}, which has no examples")
    return np.array(
        [_fraction("example_weight", weights.get(name, EXAMPLE_WEIGHT)) for name in labels],
        np.float32,
    )


def fraction_inputs(**given: float | None) -> dict[str, Array]:
    """Those that are not None of numbers in [0, 1]."""
    return {
        name: np.array([_fraction(name, value)], np.float32)
        for name, value in given.items()
        if value is not None
    }


def count_inputs(least: int = 1, **given: int | None) -> dict[str, Array]:
    """Those that are not None of whole numbers from `least`."""
    return {
        name: np.array([count(name, value, least)], np.int32)
        for name, value in given.items()
        if value is not None
    }


def text_inputs(**given: str | None) -> dict[str, Array]:
    """Those that are not None of texts."""
    return {
        name: text_array([utf8(name, value)]) for name, value in given.items() if value is not None
    }


def proposal_inputs(
    image: ImageLike, proposals: Any, scores: Any, weight: float | None
) -> dict[str, Array]:
    """One image's proposals in the types that `segment` takes; none where there are no
    proposals.
    """
    if proposals is None:
        for name, value in (("proposal_scores", scores), ("proposal_weight", weight)):
            if value is not None:
                raise bad_argument(f"{name} without proposals")
        return {}
    inputs = {"proposals": _masks(proposals, image_sizes(image))}
    if scores is not None:
        inputs["proposal_scores"] = table = _array("proposal_scores", scores).astype(np.float32)
        many = len(inputs["proposals"])
        if table.ndim != 2 or len(table) != many:
            why = (
                f"proposal_scores have the shape {list(table.shape)}; needed are [{many}, C]: a row"
                " for each proposal"
            )
            raise bad_argument(f"{why} and a column for each of the C labels")
    return inputs | fraction_inputs(proposal_weight=weight)


def search_inputs(
    text: str | Sequence[str] | None,
    image: ImageLike | Sequence[ImageLike] | None,
    id: str | Sequence[str] | None,
    weights: Sequence[float] | None,
) -> tuple[dict[str, Array], list[ImageLike]]:
    """The inputs of `retrieve` that say what to search for, and the images that go with them."""
    texts = _one_or_more("text", text)
    ids = _one_or_more("id", id)
    given: Any = [] if image is None else image
    images: list[ImageLike] = [given] if is_one_image(given) else as_list("image", given)
    many = len(texts) + len(images) + len(ids)
    if not many:
        raise bad_argument('give a text to search for, image="FILE" or id="ID", one or more')
    if many > MAX_PARTS:
        raise bad_argument(f"{many} texts, images and ids; at most {MAX_PARTS} are allowed")
    inputs = {name: text_array(values) for name, values in (("text", texts), ("id", ids)) if values}
    if weights is not None:
        inputs["weight"] = _weights(weights, many)
    return inputs, images


def _one_or_more(name: str, value: str | Sequence[str] | None) -> list[bytes]:
    if value is None:
        return []
    values = [value] if isinstance(value, str) else as_list(name, value)
    return [utf8(name, one) for one in values]


def _weights(weights: Sequence[float], many: int) -> Array:
    with np.errstate(over="ignore"):  # what is too large is refused below
        values = _array("weights", as_list("weights", weights)).astype(np.float32)
    if values.shape != (many,):
        raise bad_argument(
            f"weights has the shape {list(values.shape)}; [{many}] is needed: one for each text,"
            " image and id, in this order"
        )
    if not np.isfinite(values).all():
        raise bad_argument(f"weights are {list(weights)}; allowed are finite numbers")
    return values


def result_inputs(
    index: str,
    top_k: int,
    where: str | None,
    min_score: float | str | None,
    offset: int | None,
    index_version: str | None,
) -> dict[str, Array]:
    """The inputs of `retrieve` that say where to search, and what to give back."""
    inputs = {
        "index": text_array([utf8("index", index)]),
        "top_k": np.array([count("top_k", top_k)], np.int32),
    }
    inputs |= text_inputs(where=where, index_version=index_version)
    inputs |= count_inputs(0, offset=offset)
    if isinstance(min_score, str) and min_score == CALIBRATED:
        return inputs | {"calibrated": np.array([True])}
    if min_score is not None:
        inputs["min_score"] = np.array([_cosine(min_score)], np.float32)
    return inputs


def _cosine(value: float | str) -> float:
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not -1 <= float(value) <= 1:
        raise bad_argument(
            f"min_score is {shown(value)}; allowed are numbers from -1 to 1, and {CALIBRATED!r}"
        )
    return float(value)


def image_input(image: ImageLike) -> Array:
    """An image for a model without batches."""
    return text_array([encode_image(image)])


def for_each(name: str, value: Any, images: int | None) -> list[Any]:
    """An argument of one image as a list of one; that of a list of images must be a list as long.

    Args:
        images: how many; None for one image that is not in a list.
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
        why = (
            f"{len(masks)} proposals of {width} x {height} pixels are {masks.size / 2**30:.1f} GiB"
        )
        raise bad_argument(f"{why}; a request holds {MAX_PROPOSALS / 2**30:g}: send fewer")
    if masks.dtype == np.bool_:
        return np.asarray(masks.view(np.uint8) * np.uint8(255))
    if masks.dtype.kind == "f" and masks.min() >= 0 and masks.max() <= 1:
        return np.asarray(np.rint(masks * np.float32(255)), np.uint8)
    if masks.dtype != np.uint8:
        found = (
            f"from {masks.min():g} to {masks.max():g}" if masks.dtype.kind in "fiu" else "values"
        )
        raise bad_argument(f"proposals of {masks.dtype} {found}; allowed: {allowed}")
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
    """A list of many; one alone would otherwise fall apart into letters or rows."""
    if is_one_image(items) or not isinstance(items, Iterable):
        raise bad_argument(f"{name} takes a list, not one {type(items).__name__}")
    return list(items)


def utf8(name: str, text: str) -> bytes:
    if not isinstance(text, str):
        raise bad_argument(f"{name} takes texts, not {shown(text)}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise bad_argument(f"{name} has a text that is not Unicode: {shown(text)}") from error


def count(name: str, value: int, least: int = 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not least <= number < 2**31 or isinstance(value, bool):
        raise bad_argument(f"{name} is {shown(value)}; allowed are whole numbers from {least}")
    return number


def seconds(value: float) -> float:
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


def _fraction(name: str, value: float) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, np.floating))
        or not 0 <= value <= 1
    ):
        raise bad_argument(f"{name} is {shown(value)}; allowed are numbers from 0 to 1")
    return float(value)
