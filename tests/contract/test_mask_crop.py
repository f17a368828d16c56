"""The crop of a segment, against a canvas filled pixel by pixel."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.preprocess import MaskCrop

FILL = (123, 117, 104)


def numbered(height: int, width: int) -> NDArray[np.uint8]:
    """[H, W, 3] whose every pixel tells its place: (row, column, 255); none is the fill."""
    rows, columns = np.mgrid[:height, :width]
    return np.dstack([rows, columns, np.full_like(rows, 255)]).astype(np.uint8)


def places(crop: Image.Image) -> NDArray[np.int64]:
    """(row, column) in the image of every pixel of a crop that is not filled."""
    pixels = np.asarray(crop)
    return pixels[pixels[..., 2] == 255][:, :2].astype(np.int64)


@st.composite
def masks(draw: st.DrawFn) -> NDArray[np.bool_]:
    height = draw(st.integers(1, 40))
    width = draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    share = draw(st.floats(0, 1))
    mask = np.random.default_rng(seed).random((height, width)) < share
    mask[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = True
    return mask


@settings(deadline=None)
@given(masks(), st.floats(0, 1))
def test_a_square_crop_holds_each_pixel_of_the_mask_once_in_place_and_no_other(
    mask: NDArray[np.bool_], padding: float
) -> None:
    crop = MaskCrop(padding)(Image.fromarray(numbered(*mask.shape)), mask)
    found = places(crop)
    assert crop.mode == "RGB" and crop.width == crop.height
    np.testing.assert_array_equal(found, np.argwhere(mask))  # both by row, then column
    filled = np.asarray(crop)[np.asarray(crop)[..., 2] != 255]
    assert (filled == FILL).all() and len(filled) == crop.width**2 - mask.sum()
    where = np.argwhere(np.asarray(crop)[..., 2] == 255)
    assert len(np.unique(where - found, axis=0)) == 1  # moved, not distorted
    longest = int(np.ptp(found, axis=0).max()) + 1
    border = round(padding * longest)
    top, left = where.min(0)
    assert crop.width == longest + 2 * border
    bottom, right = crop.width - 1 - where.max(0)
    assert abs(top - bottom) <= 1 and abs(left - right) <= 1
    assert min(top, left, bottom, right) >= border


@settings(deadline=None)
@given(masks(), st.floats(0, 1))
def test_a_squashed_crop_is_square_and_nothing_of_the_outside_survives(
    mask: NDArray[np.bool_], padding: float
) -> None:
    pixels = np.where(mask[..., None], np.array(FILL, np.uint8), np.array((255, 0, 0), np.uint8))
    crop = MaskCrop(padding, square=False)(Image.fromarray(pixels), mask)
    assert crop.width == crop.height
    np.testing.assert_array_equal(
        np.asarray(crop), np.broadcast_to(np.array(FILL, np.uint8), (*crop.size, 3))
    )


def test_a_squashed_crop_stretches_the_box_alone() -> None:
    pixels = numbered(30, 40)
    mask = np.zeros((30, 40), bool)
    mask[5:9, 10:30] = True
    crop = MaskCrop(square=False)(Image.fromarray(pixels), mask)
    box = Image.fromarray(pixels[5:9, 10:30])
    np.testing.assert_array_equal(
        np.asarray(crop), np.asarray(box.resize((20, 20), Image.Resampling.BICUBIC))
    )


def test_padding_is_a_share_of_the_longer_side_on_each_side() -> None:
    mask = np.ones((10, 4), bool)
    crop = np.asarray(MaskCrop(0.2)(Image.fromarray(numbered(10, 4)), mask))
    assert crop.shape == (14, 14, 3)
    expected = np.full((14, 14, 3), FILL, np.uint8)
    expected[2:12, 5:9] = numbered(10, 4)
    np.testing.assert_array_equal(crop, expected)


@pytest.mark.parametrize("mode", ["LA", "P", "CMYK", "1", "I;16"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(numbered(6, 8)).convert("L" if mode == "I;16" else "RGB").convert(mode)
    crop = MaskCrop()(image, np.ones((6, 8), bool))
    assert crop.mode == "RGB" and crop.size == (8, 8)


def test_what_does_not_fit_is_refused() -> None:
    image = Image.new("RGB", (8, 6))
    with pytest.raises(
        TaskError, match=r"\[invalid_argument\] a mask of 6 x 8 pixels does not fit .* 8 x 6"
    ):
        MaskCrop()(image, np.ones((8, 6), bool))
    with pytest.raises(TaskError, match="empty"):
        MaskCrop()(image, np.zeros((6, 8), bool))
    with pytest.raises(TaskError, match=r"\[image_too_large\] .* 9000 x 9000"):
        MaskCrop()(Image.new("L", (9000, 1)), np.ones((1, 9000), bool))


def test_its_rules_travel_as_plain_values() -> None:
    crop = MaskCrop(0.1, square=False, fill=(1, 2, 3))
    assert MaskCrop.from_dict(json.loads(json.dumps(crop.to_dict()))) == crop
    assert MaskCrop.filled_with([0.48145466, 0.4578275, 0.40821073]) == MaskCrop(fill=FILL)
    filled = MaskCrop.filled_with([0.5, 0.5, 0.0], padding=0.1, square=False)
    assert filled == MaskCrop(0.1, False, (128, 128, 0))
