"""Images on their way out: a file's bytes as they are, pixels as PNG, which keeps them and their
mode to the bit.

Nothing is turned here: the EXIF orientation travels with the pixels, and the server turns them as
its release says.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, Union

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ._exceptions import bad_argument, bad_image

ImageLike: TypeAlias = Union[str, "os.PathLike[str]", bytes, Image.Image, "npt.NDArray[Any]"]

# The modes that PNG gives back as they were. CLIP resizes in the image's own mode and converts to
# RGB after, so an image converted here would not get what the same image gets from open_clip
# locally.
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")
_PHOTOS = ("RGB", "L", "RGBA", "LA")
ALLOWED = "a path, the bytes of an image file, a PIL image or a uint8 array [H, W, 3] or [H, W]"


SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


def list_images(folder: str | os.PathLike[str]) -> list[str]:
    """The JPEG, PNG and WebP files in a folder and in all folders in it, in the order of their
    names.

    Raises:
        RAdapterClientError: there is no such folder, or no image in it.

    Example: `client.classify(list_images("photos"), ["a cat", "a dog"])`
    """
    if not Path(folder).is_dir():
        raise bad_argument(f"there is no folder {folder}")
    images = [str(path) for path in sorted(Path(folder).rglob("*")) if is_image_file(path)]
    if not images:
        raise bad_argument(f"there is no JPEG, PNG or WebP file in the folder {folder}")
    return images


def is_image_file(path: Path) -> bool:
    """Whether this is a file whose name ends as that of an image."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


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
        return _read(Path(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        if not len(image):
            raise bad_image("an image of zero bytes")
        return bytes(image)
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise bad_image(f"not an image: {type(image).__name__}; allowed are {ALLOWED}")
    return _png(image)


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
        if ratio < 1 and opened.mode in _PHOTOS:
            return _shrunk(opened, ratio, may_change=opened is not image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        pass
    return encode_image(image)


def _shrunk(image: Image.Image, ratio: float, *, may_change: bool) -> bytes:
    """The bytes of an image, smaller; one that was opened here may change."""
    size = tuple(max(1, round(side * ratio)) for side in image.size)
    turned = orientation(image)
    if may_change and image.format == "JPEG":
        # Decoded at a smaller scale, for good: twice as large, so that the filter still has
        # something to average.
        image.draft(None, (2 * size[0], 2 * size[1]))
    small = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if turned != 1:
        exif[ExifTags.Base.Orientation] = turned
    file = io.BytesIO()
    if small.mode in ("RGB", "L"):
        small.save(file, "JPEG", quality=95, subsampling=0, exif=exif)
    else:
        small.save(file, "PNG", compress_level=1, exif=exif, icc_profile=None)
    return file.getvalue()


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
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
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
    return (
        _from_array(image)
        if isinstance(image, np.ndarray)
        else Image.open(io.BytesIO(encode_image(image)))
    )


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


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise bad_image(f"{path} is a folder; give the images in it: list_images({str(path)!r})")
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise bad_image(f"cannot read the image {path}: {reason}") from error
    if not data:
        raise bad_image(f"the image {path} is an empty file")
    return data


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not shaped or 0 in array.shape:
        why = f"an array of {array.dtype} {list(array.shape)} is not an image"
        raise bad_image(f"{why}; allowed are uint8 [H, W, 3] (RGB) and uint8 [H, W] (grey)")
    return Image.fromarray(np.ascontiguousarray(array))


def _png(image: Image.Image) -> bytes:
    if image.mode not in MODES:
        why = (
            f"a PIL image of mode {image.mode} cannot be sent without changing it; allowed are"
            f" {', '.join(MODES)}"
        )
        raise bad_image(f"{why}; send the file's path or bytes, or image.convert('RGB')")
    if 0 in image.size:
        raise bad_image(f"an image of {image.width} x {image.height} pixels")
    file = io.BytesIO()
    # A colour profile is as large as a small image, and is never read.
    options: dict[str, Any] = {"compress_level": 1, "icc_profile": None}
    try:
        if (turned := orientation(image)) != 1:
            options["exif"] = Image.Exif()
            options["exif"][ExifTags.Base.Orientation] = turned
        if image.mode == "P" and np.asarray(image).max() >= len(image.getpalette() or ()) // 3:
            # PNG packs by the palette's length and would change them.
            raise bad_image(
                "a PIL image of mode P has pixels beyond its palette; send image.convert('RGB')"
            )
        image.save(file, "PNG", **options)
    except (OSError, ValueError, SyntaxError) as error:
        # An image opened from a broken file fails only now.
        raise bad_image(f"cannot read the PIL image: {error}") from error
    return file.getvalue()
