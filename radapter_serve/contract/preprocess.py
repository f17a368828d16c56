"""From an image to the uint8 square that the image encoder takes: the whole image, as open_clip
makes it, to the bit; one mask of it; and the images of requests, in a few threads.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
)
from radapter_serve.contract.images import (
    ADVICE,
    LARGE_PIXELS,
    MAX_PIXELS,
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
    # "shortest" (shorter side to `size`, centre crop), "squash" (both sides, the aspect ratio
    # changes) or "longest" (longer side to `size`, padded with `fill_color`).
    resize_mode: str = "shortest"
    fill_color: int = 0  # of the padding, 0 to 255
    exif_orientation: bool = True  # turn images as their EXIF says, which open_clip does not

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Preprocess:
        """Read the `preprocess` entry of a release (or of open_clip's own configuration); unknown
        keys are ignored.
        """
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
        """Resize, crop or pad, and only then convert to RGB, the order of open_clip: an image as
        `decode` gives it to uint8 [H, W, 3], in `out` if given.
        """
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
        """The first step alone, mode not converted. An image so long and thin that resizing its
        short side would make it huge is refused.
        """
        resample = _FILTERS[self.interpolation]
        if self.resize_mode == "shortest" and self.size[0] != self.size[1]:
            resample = Image.Resampling.BICUBIC  # open_clip passes no interpolation on here
        target = self.resized(*image.size)
        return image if target == image.size else image.resize(target, resample)

    def check(self, width: int, height: int) -> None:
        """Raise what `resize` would raise of an image, whether it is turned or not."""
        try:
            self.resized(width, height)
        except TaskError as error:
            try:
                self.resized(height, width)
            except TaskError:
                raise error from None

    def resized(self, image_width: int, image_height: int) -> tuple[int, int]:
        """The width and the height that `resize` gives an image."""
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
            # Where rounding leaves nothing of a thin side, open_clip fails; one pixel is the
            # nearest that works.
            target = (max(1, round(image_width / ratio)), max(1, round(image_height / ratio)))
        check_pixels(*target, LARGE_PIXELS, f"an image of {image_width} x {image_height}, resized,")
        return target


def decode_into(
    data: bytes | ImageFile,
    preprocess: Preprocess,
    out: NDArray[np.uint8],
    cancelled: Cancelled | None = None,
) -> None:
    """`decode` and `preprocess` into `out`, for several threads: of large images one at a time is
    in memory, and those who wait have turns.
    """
    try:
        file = read_header(data)
        preprocess.check(file.width, file.height)
        with turn(file, cancelled):
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
    """Images to the pixels that an encoder takes; small ones in threads."""

    def __init__(self, preprocess: Preprocess, threads: int) -> None:
        self._preprocess = preprocess
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def start(
        self, files: Sequence[ImageFile], cancelled: Cancelled | None = None
    ) -> Callable[[], NDArray[np.uint8]]:
        """Begin to decode the images of a request; the function that is returned waits for them,
        and gives uint8 [N, S, S, 3]. It raises the `TaskError` of the first bad image, which it
        names where there are several, or of a caller who gave up.
        """
        pixels = np.empty((len(files), *self._preprocess.size, 3), np.uint8)

        def fill(number: int) -> None:
            decode_into(files[number], self._preprocess, pixels[number], cancelled)

        # The threads take the small ones. A large one may wait for others, so this thread decodes
        # it, and it keeps no thread from the images of other callers.
        small = [number for number, file in enumerate(files) if not file.is_large]
        results: dict[int, Future[None]] = {number: Future() for number in small}
        waiting = deque(small)

        def take() -> None:
            with contextlib.suppress(IndexError):  # all are taken
                number = waiting.popleft()
                try:
                    fill(number)
                    results[number].set_result(None)
                except BaseException as error:
                    results[number].set_exception(error)
            # After the images of other callers, so that all have turns.
            if waiting:
                self._submit(take)

        def finish() -> NDArray[np.uint8]:
            try:
                for number in range(len(files)):
                    try:
                        if number in results:
                            results[number].result()
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
            self._submit(take)
        return finish

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _submit(self, work: Callable[[], None]) -> None:
        try:
            self._pool.submit(work)
        except RuntimeError:  # the release is closed, and what is under way ends as it began
            work()


@dataclass(frozen=True)
class MaskCrop:
    """An image cropped to the box of a mask, and filled outside it (OVSeg's crop)."""

    padding: float = 0.0  # border around the box on each side, as a share of its longer side
    # Make the box square about its centre, which keeps the aspect ratio; else it is squashed.
    square: bool = True
    # Outside the mask and beyond the image: the mean that the encoder subtracts, so that the
    # filling is zero to it.
    fill: tuple[int, int, int] = (123, 117, 104)

    @classmethod
    def filled_with(
        cls, mean: Sequence[float], *, padding: float = 0.0, square: bool = True
    ) -> MaskCrop:
        """A crop that is filled with the mean that an encoder subtracts, RGB in [0, 1]."""
        red, green, blue = (round(255 * value) for value in mean)
        return cls(padding, square, (red, green, blue))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MaskCrop:
        """Read what `to_dict` gave; unknown keys are ignored."""
        red, green, blue = values["fill"]
        return cls(
            float(values["padding"]), bool(values["square"]), (int(red), int(green), int(blue))
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a release holds them."""
        return {**asdict(self), "fill": list(self.fill)}

    def side(self, longer: int) -> int:
        """The side of the crop of a box, from the longer side of that, in pixels."""
        return longer + 2 * round(self.padding * longer)

    def box(self, mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
        """The first column and row of a mask, and those behind its last."""
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
        """Crop an image of any mode to a mask of its size, bool [H, W].

        The crop is RGB and square: of the box's own pixels where `square`, else its shorter side is
        stretched to the longer.
        """
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
