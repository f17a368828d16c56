"""Images as the client takes and sends them: of a file its bytes as they are, and pixels as PNG,
which keeps them and their mode to the bit. No image is turned: its EXIF orientation travels with
it, and the server turns it as its release says.
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

from .failures import bad_argument, bad_image

ImageLike: TypeAlias = Union[str, "os.PathLike[str]", bytes, Image.Image, "npt.NDArray[Any]"]

# The modes that PNG gives back as they were. CLIP resizes in the image's own mode and converts to
# RGB after, so an image converted here would not get what the same image gets from open_clip
# locally.
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")
ALLOWED = "a path, the bytes of an image file, a PIL image or a uint8 array [H, W, 3] or [H, W]"
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
# What Pillow raises of a broken or a hostile file.
_BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


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
    return isinstance(images, (str, os.PathLike, bytes, Image.Image))


def encode_image(image: ImageLike) -> bytes:
    """The bytes of a JPEG, PNG or WebP file for an image; raises `InvalidImage` where it can't be
    read.
    """
    if isinstance(image, (str, os.PathLike)):
        try:
            return Path(image).read_bytes()
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise bad_image(f"cannot read the image {image}: {reason}") from error
    if isinstance(image, bytes):
        return image
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


def _opened(image: ImageLike) -> Image.Image:
    """The image, of which only the header has been read where it is a file."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return _from_array(image)
    return Image.open(io.BytesIO(encode_image(image)))


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not shaped or 0 in array.shape:
        why = f"an array of {array.dtype} {list(array.shape)} is not an image"
        raise bad_image(f"{why}; allowed are uint8 [H, W, 3] (RGB) and uint8 [H, W] (grey)")
    return Image.fromarray(np.ascontiguousarray(array))


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
    return len(image) if isinstance(image, bytes) else 0


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
