"""Arguments of the client's methods as plain values, keyed by the names of a task's inputs.

Values that cannot be sent, such as a number instead of a text, are refused here. The server
checks ranges and combinations of arguments.
"""

from __future__ import annotations

import math
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ._images import ImageLike, encode_small, is_one_image
from ._wire import ServerURL
from .failures import InvalidImage, bad_argument, shown
from .tensors import Array

EXAMPLE_WEIGHT = 0.5  # of the examples of a label that a mapping of weights leaves out


def text(name: str, value: Any) -> str:
    """Check a text: a `str` that can be encoded as UTF-8."""
    if not isinstance(value, str):
        raise bad_argument(f"{name} takes texts, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise bad_argument(f"{name} has a text that is not Unicode: {shown(value)}") from error
    return value


def adapter_name(name: str, value: Any) -> str:
    """Check the name of an adapter; an empty one would ask for the release itself."""
    adapter = text(name, value)
    if not adapter:
        raise bad_argument(f"{name} is empty; give a name, or None for the release itself")
    return adapter


def count(name: str, value: Any, least: int = 0) -> int:
    """Check a whole number of at least `least`."""
    try:
        whole = operator.index(value)
    except TypeError:
        whole = -1
    if not least <= whole < 2**31 or isinstance(value, bool):
        raise bad_argument(f"{name} is {shown(value)}; allowed are whole numbers from {least}")
    return whole


def number(name: str, value: Any) -> float:
    """Check a number, and round it to float32 as it is sent."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise bad_argument(f"{name} is {shown(value)}; allowed are numbers")
    with np.errstate(over="ignore"):  # the server refuses infinity
        return float(np.float32(value))


def several(name: str, items: Any) -> list[Any]:
    """Check a list; refuses a text or an array, which would fall apart into letters or rows."""
    if is_one_image(items) or not isinstance(items, Iterable):
        raise bad_argument(f"{name} takes a list, not one {type(items).__name__}")
    return list(items)


def several_images(name: str, images: Any) -> list[Any]:
    """List the images; one image becomes a list of one."""
    return [images] if is_one_image(images) else several(name, images)


def several_texts(name: str, items: Any) -> list[str]:
    """Check a list of texts."""
    return [text(name, item) for item in several(name, items)]


_KINDS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("label_set", "index", "where", "index_version"), text),
    **dict.fromkeys(("labels", "templates", "text", "id"), several_texts),
    "adapter": adapter_name,
    **dict.fromkeys(("alpha", "threshold", "unknown", "proposal_weight", "min_score"), number),
    **dict.fromkeys(
        ("weight", "example_weight"),
        lambda name, items: [number(name, item) for item in several(name, items)],
    ),
    **dict.fromkeys(("top_k", "short_side", "stride", "refine", "offset"), count),
    **dict.fromkeys(("multi_label", "calibrated"), lambda _, value: bool(value)),
}


def checked(**values: Any) -> dict[str, Any]:
    """Check each value by the type of its input; values that are None are left out."""
    return {name: _KINDS[name](name, value) for name, value in values.items() if value is not None}


def example_values(
    labels: Sequence[str],
    examples: Mapping[str, ImageLike | Sequence[ImageLike]],
    weight: float | Mapping[str, float] | None,
    shrink_to: int | None,
) -> dict[str, Any]:
    """Build the inputs for images that show some of the labels, with their weights."""
    if not isinstance(examples, Mapping):
        raise bad_argument(
            f'examples is {shown(examples)}; give images by label, such as {{"a mug": ["mug.jpg"]}}'
        )
    weights = weight if isinstance(weight, Mapping) else {}
    for name in {**examples, **weights}:
        if name not in labels:
            raise bad_argument(f"examples have {shown(name)}, which is not among the labels")
    images: list[bytes] = []
    places: list[int] = []
    for name, images_of_label in examples.items():
        items = several_images("examples", images_of_label)
        try:
            images += [encode_small(item, shrink_to) for item in items]
        except InvalidImage as error:
            raise bad_argument(f"an example of {shown(name)}: {error}") from error
        places += [labels.index(name)] * len(items)
    if not images:
        raise bad_argument('no examples: give some, such as {"a mug": ["mug.jpg"]}, or None')
    each: list[Any] | None = None if weight is None else [weight]
    if isinstance(weight, Mapping):
        each = [weight.get(name, EXAMPLE_WEIGHT) for name in labels]
    return {"examples": images, "example_labels": places, **checked(example_weight=each)}


def proposal_values(proposals: Any, scores: Any) -> dict[str, Any]:
    """Convert an image's proposals to what `segment` takes: uint8 [N, H, W], 255 inside."""
    values: dict[str, Any] = {}
    if scores is not None:
        values["proposal_scores"] = _array("proposal_scores", scores).astype(np.float32)
    if proposals is not None:
        masks = _array("proposals", proposals)
        if masks.dtype == np.bool_:
            masks = masks.view(np.uint8) * np.uint8(255)
        elif masks.dtype.kind == "f" and masks.size and masks.min() >= 0 and masks.max() <= 1:
            masks = np.asarray(np.rint(masks * np.float32(255)), np.uint8)
        elif masks.dtype != np.uint8:
            raise bad_argument(
                f"proposals of {masks.dtype}; allowed: bool, uint8 from 0 to 255, or float from 0"
                " to 1, [N, H, W]"
            )
        values["proposals"] = masks
    return values


def one_each(name: str, value: Any, images: int | None) -> list[Any]:
    """Split an argument with an entry for each image of a list; `images` None is a lone image."""
    if images is None:
        return [value]
    if value is None:
        return [None] * images
    items = several(name, value)
    if len(items) != images:
        raise bad_argument(
            f"{name} has {len(items)} entries for {images} images; a list of images needs one for"
            " each, or None"
        )
    return items


def _array(name: str, value: Any) -> Array:
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "bfiu":
            raise ValueError(f"values of type {array.dtype}")
    except (ValueError, TypeError, RuntimeError) as error:  # a ragged list; a tensor on a GPU
        raise bad_argument(f"{name} is not an array of numbers: {error}") from error
    return array


def check_seconds(value: float) -> float:
    """Check a time-out in seconds."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not 0 < value < math.inf:
        raise bad_argument(f"timeout is {shown(value)}; allowed are seconds above 0")
    return float(value)


def check_key(key: str, url: ServerURL) -> None:
    """Check that an API key fits in a header; warns where it would travel unencrypted."""
    if not isinstance(key, str) or not re.fullmatch("[!-~]+", key):
        raise bad_argument(
            "api_key is not a key: a key has letters, digits and signs of ASCII, and no white space"
        )
    if not url.secure and not url.loopback:
        kind = "grpcs" if url.protocol == "grpc" else "https"
        warnings.warn(f"the API key travels to {url} in the clear; use {kind}://", stacklevel=3)
