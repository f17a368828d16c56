"""Arguments of the clients' methods as plain values by the names of a task's inputs.

What can't be sent is refused here, such as a number where a text belongs. Ranges, and what goes
with what, are the server's to check. Of an image, a file's bytes are sent as they are, and pixels
as PNG, which keeps them and their mode to the bit. No image is turned: its EXIF orientation travels
with the pixels, and the server turns them as its release says.
"""

from __future__ import annotations

import contextlib
import io
import math
import operator
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, Union

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ._wire import Array, ServerURL
from .failures import InvalidImage, InvalidRequest, bad_argument, bad_image, shown

ImageLike: TypeAlias = Union[str, "os.PathLike[str]", bytes, Image.Image, "npt.NDArray[Any]"]

# The modes that PNG gives back as they were. CLIP resizes in the image's own mode and converts to
# RGB after, so an image converted here would not get what the same image gets from open_clip
# locally.
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")
ALLOWED = "a path, the bytes of an image file, a PIL image or a uint8 array [H, W, 3] or [H, W]"
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
# A message of gRPC cannot have 2 GiB; this leaves room for the image.
MAX_PROPOSALS = 3 * 2**29
EXAMPLE_WEIGHT = 0.5  # of a label's examples; the rest is its text's
CALIBRATED = "calibrated"  # the least score that the release was exported with
# What Pillow raises of a broken or a hostile file.
_BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


# Images


def list_images(folder: str | os.PathLike[str]) -> list[str]:
    """The JPEG, PNG and WebP files in a folder and in all folders in it, in the order of their
    names.

    Raises:
        RAdapterClientError: there is no such folder, or no image in it.

    Example: `client.classify(list_images("photos"), ["a cat", "a dog"])`
    """
    if not Path(folder).is_dir():
        raise bad_argument(f"there is no folder {folder}")
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    images = [str(path) for path in files if path.suffix.lower() in SUFFIXES]
    if not images:
        raise bad_argument(f"there is no JPEG, PNG or WebP file in the folder {folder}")
    return images


def is_one_image(images: object) -> bool:
    """Whether this is one image, and not several of them."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    return isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image))


def encode_image(image: ImageLike) -> bytes:
    """The bytes of a JPEG, PNG or WebP file for an image; raises `InvalidImage` where it can't be
    read, or is none.
    """
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        if path.is_dir():
            raise bad_image(
                f"{path} is a folder; give the images in it: list_images({str(path)!r})"
            )
        try:
            data = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise bad_image(f"cannot read the image {path}: {reason}") from error
        if not data:
            raise bad_image(f"the image {path} is an empty file")
        return data
    if isinstance(image, (bytes, bytearray, memoryview)):
        if not len(image):
            raise bad_image("an image of zero bytes")
        return bytes(image)
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise bad_image(f"not an image: {type(image).__name__}; allowed are {ALLOWED}")

    # Pixels, as PNG
    if image.mode not in MODES:
        raise bad_image(
            f"a PIL image of mode {image.mode} cannot be sent without changing it; allowed are"
            f" {', '.join(MODES)}; send the file's path or bytes, or image.convert('RGB')"
        )
    if 0 in image.size:
        raise bad_image(f"an image of {image.width} x {image.height} pixels")
    file = io.BytesIO()
    try:
        if image.mode == "P" and np.asarray(image).max() >= len(image.getpalette() or ()) // 3:
            # PNG packs by the palette's length and would change them.
            raise bad_image(
                "a PIL image of mode P has pixels beyond its palette; send image.convert('RGB')"
            )
        _save_png(image, file, orientation(image))
    except (OSError, ValueError, SyntaxError) as error:
        # An image opened from a broken file fails only now.
        raise bad_image(f"cannot read the PIL image: {error}") from error
    return file.getvalue()


def encode_small(image: ImageLike, shrink_to: int | None) -> bytes:
    """As `encode_image`, but photos whose shorter side has more than `shrink_to` pixels are made so
    small first.

    An image that can't be read here is sent as it is, for the server to say what is wrong with it;
    so are palettes and other modes that photos don't have.
    """
    if shrink_to is None:
        return encode_image(image)
    try:
        opened = _opened(image)
        ratio = shrink_to / min(opened.size)
        if ratio >= 1 or opened.mode not in ("RGB", "L", "RGBA", "LA"):
            return encode_image(image)
        width, height = (max(1, round(side * ratio)) for side in opened.size)
        turned = orientation(opened)
        if opened is not image and opened.format == "JPEG":
            # Decoded at a smaller scale, for good: twice as large, so that the filter still has
            # something to average.
            opened.draft(None, (2 * width, 2 * height))
        small = opened.resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        if small.mode in ("RGB", "L"):
            small.save(file, "JPEG", quality=95, subsampling=0, exif=_exif(turned))
        else:
            _save_png(small, file, turned)
        return file.getvalue()
    except _BROKEN:
        return encode_image(image)


def _save_png(image: Image.Image, file: io.BytesIO, turned: int) -> None:
    # A colour profile is as large as a small image, and is never read.
    image.save(file, "PNG", compress_level=1, icc_profile=None, exif=_exif(turned))


def _exif(turned: int) -> Image.Exif:
    """EXIF data with an orientation alone."""
    exif = Image.Exif()
    if turned != 1:
        exif[ExifTags.Base.Orientation] = turned
    return exif


def read_image(image: ImageLike, *, exif_orientation: bool = True) -> Image.Image:
    """The image as RGB, turned as its EXIF orientation says or left as it is stored."""
    try:
        opened = _opened(image)
        if exif_orientation and orientation(opened) != 1:
            opened.load()  # a broken image is an error, a broken EXIF is none
            with contextlib.suppress(Exception):
                opened = ImageOps.exif_transpose(opened)
        if "transparency" in opened.info:  # a palette's would be lost with a warning
            opened = opened.convert("RGBA")
        return opened.convert("RGB")
    except UnidentifiedImageError as error:  # its text names an object of Python's
        raise bad_image("cannot read the image: these are no bytes of an image file") from error
    except _BROKEN as error:
        raise bad_image(f"cannot read the image: {error}") from error


def orientation(image: ImageLike) -> int:
    """The EXIF orientation from 1 (upright) to 8; 1 where there is none or it can't be read."""
    try:
        value = _opened(image).getexif().get(ExifTags.Base.Orientation, 1)
        return value if value in range(1, 9) else 1
    except Exception:  # Pillow raises anything on broken EXIF
        return 1


def image_sizes(image: ImageLike) -> set[tuple[int, int]]:
    """Width and height in pixels, as the image is stored and as it is turned; empty where they
    can't be read.
    """
    try:
        opened = _opened(image)
    except Exception:  # the server says what is wrong with it
        return set()
    return {opened.size, opened.size[::-1]} if orientation(opened) > 4 else {opened.size}


def _opened(image: ImageLike) -> Image.Image:
    """The image, of which only the header has been read where it is a file."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return _from_array(image)
    return Image.open(io.BytesIO(encode_image(image)))


def size_bound(image: ImageLike) -> int:
    """About how many bytes the encoded image has at most; 0 where that is unknown."""
    if isinstance(image, (str, os.PathLike)):
        try:
            return Path(image).stat().st_size
        except (OSError, ValueError):
            return 0
    if isinstance(image, np.ndarray):
        return image.nbytes
    if isinstance(image, Image.Image):
        return image.width * image.height * len(image.getbands())
    return len(image) if isinstance(image, (bytes, bytearray, memoryview)) else 0


def chunks(sizes: Sequence[int], max_rows: int, max_bytes: int) -> list[range]:
    """Splits items of these sizes, in order, into runs of at most max_rows and max_bytes, or of one
    item.
    """
    runs: list[range] = []
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and (index - start >= max_rows or total + size > max_bytes):
            runs.append(range(start, index))
            start = index
            total = 0
        total += size
    return [*runs, range(start, len(sizes))] if len(sizes) else []


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not shaped or 0 in array.shape:
        why = f"an array of {array.dtype} {list(array.shape)} is not an image"
        raise bad_image(f"{why}; allowed are uint8 [H, W, 3] (RGB) and uint8 [H, W] (grey)")
    return Image.fromarray(np.ascontiguousarray(array))


# The inputs of each task


def label_values(
    labels: Sequence[str] | None, label_set: str | None, templates: Sequence[str] | None
) -> dict[str, Any]:
    """The labels of an image or of its pixels."""
    values: dict[str, Any] = texts(label_set=label_set)
    lists = {"labels": labels, "templates": templates}
    values |= {
        name: several_texts(name, items) for name, items in lists.items() if items is not None
    }
    if not values.get("labels") and label_set is None:
        raise InvalidRequest(
            'no labels: give labels=["a cat", "a dog"] or label_set="NAME"', code="no_labels"
        )
    if [] in values.values():
        raise bad_argument("an empty list of labels or templates; give some, or None")
    return values


def example_values(
    labels: Sequence[str],
    examples: Mapping[str, ImageLike | Sequence[ImageLike]],
    weight: float | Mapping[str, float] | None,
    shrink_to: int | None,
) -> dict[str, Any]:
    """Images that show some of the labels, and their weight."""
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
        values["example_weight"] = [number("example_weight", value) for value in weights]
    return values


def numbers(**values: float | None) -> dict[str, float]:
    """Those that are not None of numbers."""
    return {name: number(name, value) for name, value in values.items() if value is not None}


def counts(least: int = 1, **values: int | None) -> dict[str, int]:
    """Those that are not None of whole numbers from `least`."""
    return {name: count(name, value, least) for name, value in values.items() if value is not None}


def texts(**values: str | None) -> dict[str, str]:
    """Those that are not None of texts."""
    return {name: text(name, value) for name, value in values.items() if value is not None}


def proposal_values(
    image: ImageLike, proposals: Any, scores: Any, weight: float | None
) -> dict[str, Any]:
    """One image's proposals in the types that `segment` takes: masks as uint8 [N, H, W], 255
    inside.
    """
    values: dict[str, Any] = numbers(proposal_weight=weight)
    if scores is not None:
        values["proposal_scores"] = _array("proposal_scores", scores).astype(np.float32)
    if proposals is None:
        return values
    masks = _array("proposals", proposals)
    allowed = "bool, uint8 from 0 to 255, or float from 0 to 1, [N, H, W]"
    if masks.ndim != 3 or 0 in masks.shape:
        raise bad_argument(f"proposals of shape {list(masks.shape)}; allowed: {allowed}")
    width, height = masks.shape[:0:-1]
    sizes = image_sizes(image)
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
        masks = masks.view(np.uint8) * np.uint8(255)
    elif masks.dtype.kind == "f" and masks.min() >= 0 and masks.max() <= 1:
        masks = np.asarray(np.rint(masks * np.float32(255)), np.uint8)
    elif masks.dtype != np.uint8:
        span = f"from {masks.min():g} to {masks.max():g}"
        raise bad_argument(f"proposals of {masks.dtype} {span}; allowed: {allowed}")
    return {**values, "proposals": masks}


def query_values(
    text: str | Sequence[str] | None,
    image: ImageLike | Sequence[ImageLike] | None,
    id: str | Sequence[str] | None,
    weights: Sequence[float] | None,
) -> tuple[dict[str, Any], list[ImageLike]]:
    """The texts, ids and weights of a query, and its images."""
    parts = {
        name: several_texts(name, [value] if isinstance(value, str) else value)
        for name, value in (("text", text), ("id", id))
        if value is not None
    }
    values: dict[str, Any] = {name: items for name, items in parts.items() if items}
    images = [] if image is None else several_images("image", image)
    if not values and not images:
        raise bad_argument('give a text to search for, image="FILE" or id="ID", one or more')
    if weights is not None:
        factors = [number("weights", weight) for weight in as_list("weights", weights)]
        if not factors:
            raise bad_argument("no weights; give one for each text, image and id, or None")
        values["weight"] = factors
    return values, images


def result_values(
    index: str,
    top_k: int,
    where: str | None,
    min_score: float | str | None,
    offset: int | None,
    index_version: str | None,
) -> dict[str, Any]:
    """The index to search, and the hits to give back."""
    values: dict[str, Any] = {"index": text("index", index), "top_k": count("top_k", top_k)}
    values |= texts(where=where, index_version=index_version)
    values |= counts(0, offset=offset)
    if isinstance(min_score, str) and min_score == CALIBRATED:
        return values | {"calibrated": True}
    if isinstance(min_score, str):
        raise bad_argument(
            f"min_score is {shown(min_score)}; allowed are numbers from -1 to 1, and {CALIBRATED!r}"
        )
    return values | numbers(min_score=min_score)


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
        whole = operator.index(value)
    except TypeError:
        whole = -1
    if not least <= whole < 2**31 or isinstance(value, bool):
        raise bad_argument(f"{name} is {shown(value)}; allowed are whole numbers from {least}")
    return whole


def number(name: str, value: float) -> float:
    """A number, as precise as it is sent."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise bad_argument(f"{name} is {shown(value)}; allowed are numbers")
    with np.errstate(over="ignore"):  # the server refuses infinity
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
