"""The crop of a segment: how training and serving alike show one mask of an image to the image
encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.contract.errors import IMAGE_TOO_LARGE, TaskError, invalid
from radapter_serve.contract.preprocess import MAX_PIXELS


@dataclass(frozen=True)
class MaskCrop:
    """A segment alone: the image cropped to the mask's box, everything outside the mask filled
    (OVSeg's masked crop).
    """

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
