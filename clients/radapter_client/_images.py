"""Encoding of images for requests: files are sent unchanged, but a phone's photos as JPEG, and
pixels as PNG, which keeps their values and mode exactly. The client turns no image: the EXIF
orientation is sent with it, and the server turns it as its release says.
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

from . import heic
from .failures import bad_argument, bad_image

ImageLike: TypeAlias = Union[str, "os.PathLike[str]", bytes, Image.Image, "npt.NDArray[Any]"]

# The modes that PNG preserves. CLIP resizes in the image's own mode and converts to RGB
# afterwards, so converting here would give other embeddings than open_clip does locally.
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")
ALLOWED = "a path, the bytes of an image file, a PIL image or a uint8 array [H, W, 3] or [H, W]"
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", *heic.readable_suffixes())
# Exceptions of Pillow on a broken or a hostile file.
_BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def list_images(folder: str | os.PathLike[str]) -> list[str]:
    """List the JPEG, PNG and WebP files in a folder and its subfolders, sorted by path; with the
    extra `heic` also HEIC.

    Raises:
        RAdapterClientError: the folder is missing, or has no image.

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
    """True for one image, False for several."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    return isinstance(images, (str, os.PathLike, bytes, Image.Image))


def encode_image(image: ImageLike) -> bytes:
    """Encode pixels as PNG, or read the bytes of an image file, of a HEIC as JPEG."""
    if isinstance(image, (str, os.PathLike)):
        try:
            return heic.without_heic(Path(image).read_bytes())
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise bad_image(f"cannot read the image {image}: {reason}") from error
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise bad_image(f"not an image: {type(image).__name__}; allowed are {ALLOWED}")

    # Encode pixels as PNG.
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
            # PNG packs by the palette's length, which would change these pixels.
            raise bad_image(
                "a PIL image of mode P has pixels beyond its palette; send image.convert('RGB')"
            )
        _save_png(image, file, orientation(image))
    except (OSError, ValueError, SyntaxError) as error:
        # An image opened from a broken file fails only now.
        raise bad_image(f"cannot read the PIL image: {error}") from error
    return file.getvalue()


def encode_small(image: ImageLike, shrink_to: int | None) -> bytes:
    """Encode an image; a photo whose shorter side has more than `shrink_to` pixels is reduced
    first. An image that cannot be read is sent unchanged, so that the server reports the error.
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
            # Let libjpeg decode at a smaller scale, but at twice the final size, so that the
            # filter still has something to average.
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
    # A colour profile is as large as a small image, and the server does not read it.
    image.save(file, "PNG", compress_level=1, icc_profile=None, exif=_exif(turned))


def _exif(turned: int) -> Image.Exif:
    """EXIF data that holds nothing but an orientation."""
    exif = Image.Exif()
    if turned != 1:
        exif[ExifTags.Base.Orientation] = turned
    return exif


def read_image(image: ImageLike, *, exif_orientation: bool = True) -> Image.Image:
    """Open an image as RGB, turned according to its EXIF orientation by default."""
    try:
        opened = _opened(image)
        if exif_orientation and orientation(opened) != 1:
            opened.load()  # raises if the image is broken; a broken EXIF is ignored below
            with contextlib.suppress(Exception):
                opened = ImageOps.exif_transpose(opened)
        if "transparency" in opened.info:  # else Pillow drops a palette's, with a warning
            opened = opened.convert("RGBA")
        return opened.convert("RGB")
    except UnidentifiedImageError as error:  # its message is the repr of a Python object
        raise bad_image(
            "cannot read the image: these are not the bytes of an image file"
        ) from error
    except _BROKEN as error:
        raise bad_image(f"cannot read the image: {error}") from error


def orientation(image: ImageLike) -> int:
    """Read the EXIF orientation, 1 (upright) to 8; 1 if it is missing or unreadable."""
    try:
        value = _opened(image).getexif().get(ExifTags.Base.Orientation, 1)
        return value if value in range(1, 9) else 1
    except Exception:  # Pillow raises anything on broken EXIF
        return 1


def _opened(image: ImageLike) -> Image.Image:
    """Open an image; only the header of a file is read."""
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
    """Approximate upper bound of the encoded image's size in bytes; 0 if unknown."""
    if isinstance(image, (str, os.PathLike)):
        try:
            size = Path(image).stat().st_size
            return 4 * size if Path(image).suffix.lower() in heic.SUFFIXES else size  # as JPEG
        except (OSError, ValueError):
            return 0
    if isinstance(image, np.ndarray):
        return image.nbytes
    if isinstance(image, Image.Image):
        return image.width * image.height * len(image.getbands())
    return len(image) if isinstance(image, bytes) else 0


def chunks(sizes: Sequence[int], max_rows: int, max_bytes: int) -> list[range]:
    """Split items of these sizes into runs of at most `max_rows` items and `max_bytes`."""
    runs: list[range] = []
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and (index - start >= max_rows or total + size > max_bytes):
            runs.append(range(start, index))
            start = index
            total = 0
        total += size
    return [*runs, range(start, len(sizes))] if len(sizes) else []
