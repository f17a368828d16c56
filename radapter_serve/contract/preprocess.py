"""Preprocessing of images to the uint8 input of the image encoder: a whole image, equal to
open_clip's bit for bit; the crop of a mask; and the images of a request, in a few threads.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from radapter_serve.contract.errors import (
    IMAGE_TOO_LARGE,
    INVALID_IMAGE,
    Cancelled,
    TaskError,
    invalid,
    task_error,
)
from radapter_serve.contract.images import (
    ADVICE,
    LARGE_IMAGES,
    LARGE_PIXELS,
    MAX_PIXELS,
    FifoLimit,
    ImageFile,
    check_pixels,
    decode,
    read_header,
    turn,
)

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocess:
    """open_clip's evaluation transform without scaling to [0, 1] and normalising."""

    size: tuple[int, int]  # height and width of the encoder's input in pixels
    interpolation: str = "bicubic"  # or "bilinear"
    # "shortest" (shorter side to `size`, centre crop), "squash" (both sides to `size`, which
    # changes the aspect ratio) or "longest" (longer side to `size`, padded with `fill_color`).
    resize_mode: str = "shortest"
    fill_color: int = 0  # of the padding, 0 to 255
    exif_orientation: bool = True  # turn images according to their EXIF, unlike open_clip

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Preprocess:
        """Read open_clip's configuration or the fields of `PreprocessFacts`; ignores other keys."""
        size = config["size"]
        height, width = (size, size) if isinstance(size, int) else size
        # "random" is for training; open_clip takes bicubic for it in evaluation.
        interpolation = "bilinear" if config.get("interpolation") == "bilinear" else "bicubic"
        mode = config.get("resize_mode") or "shortest"
        if mode not in ("shortest", "squash", "longest"):
            raise ValueError(f"resize_mode is {mode!r}; allowed are shortest, squash, longest")
        fill = int(config.get("fill_color") or 0)
        turn = bool(config.get("exif_orientation", True))
        return cls((int(height), int(width)), interpolation, mode, fill, turn)

    def __call__(
        self, image: Image.Image, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Preprocess an image to uint8 [H, W, 3], in `out` if given, and convert to RGB last."""
        height, width = self.size
        image = self.resize(image)

        # Pad to the size, and crop to the middle, with torchvision's rounding.
        fill = self.fill_color if self.resize_mode == "longest" else 0
        down = max(0, height - image.height)
        right = max(0, width - image.width)
        if down or right:
            bands = len(image.getbands())
            palette = image.getpalette() if image.mode == "P" else None
            border = (right // 2, down // 2, (right + 1) // 2, (down + 1) // 2)
            image = ImageOps.expand(image, border, fill if bands == 1 else (fill,) * bands)
            if palette is not None:
                image.putpalette(palette)
        if image.size != (width, height):
            top = round((image.height - height) / 2)
            left = round((image.width - width) / 2)
            image = image.crop((left, top, left + width, top + height))

        pixels = np.asarray(image.convert("RGB"))
        if out is None:
            return pixels.copy()
        out[...] = pixels
        return out

    def resize(self, image: Image.Image) -> Image.Image:
        """Resize an image, whose mode is kept; refuses one so thin that it would become huge."""
        resample = _FILTERS[self.interpolation]
        if self.resize_mode == "shortest" and self.size[0] != self.size[1]:
            resample = Image.Resampling.BICUBIC  # open_clip passes no interpolation on here
        target = self.resized(*image.size)
        return image if target == image.size else image.resize(target, resample)

    def check(self, width: int, height: int) -> None:
        """Raise the error of `resize` if it refuses an image of this size, upright and turned."""
        try:
            self.resized(width, height)
        except TaskError as error:
            try:
                self.resized(height, width)
            except TaskError:
                raise error from None

    def resized(self, image_width: int, image_height: int) -> tuple[int, int]:
        """Width and height of an image after `resize`."""
        height, width = self.size
        if self.resize_mode == "squash":
            target = (width, height)
        elif self.resize_mode == "shortest" and height == width:
            sides = image_width, image_height
            long = int(height * max(sides) / min(sides))
            target = (height, long) if image_width <= image_height else (long, height)
        else:
            ratios = image_height / height, image_width / width
            ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
            # A thin side keeps at least one pixel; open_clip fails if it rounds to 0.
            target = (max(1, round(image_width / ratio)), max(1, round(image_height / ratio)))
        check_pixels(*target, LARGE_PIXELS, f"an image of {image_width} x {image_height}, resized,")
        return target


def decode_into(
    data: bytes | ImageFile,
    preprocess: Preprocess,
    out: NDArray[np.uint8],
    cancelled: Cancelled | None = None,
    limit: FifoLimit = LARGE_IMAGES,
) -> None:
    """Decode and preprocess an image into `out`; large images take turns."""
    try:
        file = read_header(data)
        preprocess.check(file.width, file.height)
        with turn(file, cancelled, limit):
            preprocess(decode(file, exif_orientation=preprocess.exif_orientation), out=out)
    except TaskError:
        raise
    except MemoryError:
        raise TaskError(
            IMAGE_TOO_LARGE, "the server has not enough memory for this image; send a smaller one"
        ) from None
    except Exception as error:
        raise TaskError(INVALID_IMAGE, f"the image cannot be resized ({error})", ADVICE) from None


def decode_pixels(data: bytes, preprocess: Preprocess) -> NDArray[np.uint8]:
    """`decode_into` a new array, uint8 [H, W, 3]."""
    pixels = np.empty((*preprocess.size, 3), np.uint8)
    decode_into(data, preprocess, pixels)
    return pixels


class Decoder:
    """Decodes images to the input of an encoder; small images in a pool of threads."""

    def __init__(self, preprocess: Preprocess, threads: int) -> None:
        self._preprocess = preprocess
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def start(
        self,
        files: Sequence[ImageFile],
        cancelled: Cancelled | None = None,
        limit: FifoLimit = LARGE_IMAGES,
    ) -> Callable[[], NDArray[np.uint8]]:
        """Start to decode the images of a request; returns a function that waits for them and
        returns uint8 [N, S, S, 3], or raises the `TaskError` of the first bad image.
        """
        pixels = np.empty((len(files), *self._preprocess.size, 3), np.uint8)

        def fill(number: int) -> None:
            decode_into(files[number], self._preprocess, pixels[number], cancelled, limit)

        # The pool decodes the small images. A large image may have to wait for its turn, so this
        # thread decodes it, and no thread of the pool is blocked.
        small = [number for number, file in enumerate(files) if not file.is_large]
        results: dict[int, Future[None]] = {number: Future() for number in small}
        waiting = deque(results.items())

        def finish() -> NDArray[np.uint8]:
            try:
                for number in range(len(files)):
                    try:
                        if number in results:
                            # An error holds this frame, which must not hold the error.
                            results.pop(number).result()
                        else:
                            fill(number)
                    except TaskError as error:
                        if len(files) == 1:
                            raise
                        which = f"image {number + 1} of {len(files)}"
                        raise TaskError(error.code, f"{which}: {error.message}") from None
            finally:
                waiting.clear()
            return pixels

        for _ in range(min(self._threads, len(small))):
            self._submit(self._take, waiting, fill)
        return finish

    def close(self) -> None:
        """Shut down the threads."""
        self._pool.shutdown()

    def _take(self, waiting: deque[tuple[int, Future[None]]], fill: Callable[[int], None]) -> None:
        """Decode the next image of a request; a function in `start` would refer to itself, and keep
        the pixels in that circle.
        """
        with contextlib.suppress(IndexError):  # all are taken
            number, result = waiting.popleft()
            try:
                fill(number)
                result.set_result(None)
            except Exception as error:  # without its frames, which hold the image and `result`
                result.set_exception(task_error(error))
        # Queue up behind the images of other callers, so that no request waits for a whole other
        # one.
        if waiting:
            self._submit(self._take, waiting, fill)

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            self._pool.submit(work, *arguments)
        except RuntimeError:  # the pool is closed: finish the request in this thread
            work(*arguments)


@dataclass(frozen=True)
class MaskCrop:
    """Crops an image to the box of a mask, and fills it outside the mask (OVSeg's crop)."""

    padding: float = 0.0  # border around the box on each side, as a fraction of its longer side
    # Extend the box to a square about its centre, which keeps the aspect ratio; else stretch it.
    square: bool = True
    # RGB outside the mask and the image: the mean that the encoder subtracts, so that the filling
    # becomes zero.
    fill: tuple[int, int, int] = (123, 117, 104)

    @classmethod
    def filled_with(
        cls, mean: Sequence[float], *, padding: float = 0.0, square: bool = True
    ) -> MaskCrop:
        """A crop filled with the mean that an encoder subtracts, RGB in [0, 1]."""
        red, green, blue = (round(255 * value) for value in mean)
        return cls(padding, square, (red, green, blue))

    def side(self, longer: int) -> int:
        """Side of the crop in pixels, from the longer side of the box."""
        return longer + 2 * round(self.padding * longer)

    def box(self, mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
        """Box of a mask: left, top, right and bottom in pixels, right and bottom excluded."""
        rows = np.flatnonzero(mask.any(1))
        columns = np.flatnonzero(mask.any(0))
        if not len(rows):
            raise invalid("a mask is empty; it needs at least one pixel")
        left = int(columns[0])
        right = int(columns[-1]) + 1
        top = int(rows[0])
        bottom = int(rows[-1]) + 1
        side = self.side(max(right - left, bottom - top))
        if side * side > MAX_PIXELS:  # of a long and thin image
            raise TaskError(
                IMAGE_TOO_LARGE,
                f"the square crop of a mask has {side} x {side} pixels; at most {MAX_PIXELS} fit",
            )
        return left, top, right, bottom

    def __call__(self, image: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
        """Crop an image of any mode to a mask of its size, bool [H, W], as a square in RGB."""
        mask = np.asarray(mask, bool)
        if mask.shape != (image.height, image.width):
            raise invalid(
                f"a mask of {' x '.join(map(str, mask.shape[::-1]))} pixels does not fit the image"
                f" of {image.width} x {image.height}; send it at the image's size"
            )
        left, top, right, bottom = self.box(mask)
        longer = max(right - left, bottom - top)
        border = (self.side(longer) - longer) // 2
        width = right - left + 2 * border
        height = bottom - top + 2 * border
        side = self.side(longer)
        if self.square:
            width = height = side
        inside = Image.fromarray(mask[top:bottom, left:right])
        segment = image.crop((left, top, right, bottom)).convert("RGB")
        crop = Image.new("RGB", (width, height), self.fill)
        crop.paste(
            segment, ((width - segment.width + 1) // 2, (height - segment.height + 1) // 2), inside
        )
        return crop if width == height else crop.resize((side, side), Image.Resampling.BICUBIC)
