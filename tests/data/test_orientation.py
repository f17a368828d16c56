"""Photos that a camera stored turned or mirrored stand upright wherever a model sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.contract.preprocess import MaskCrop, Preprocess
from radapter_serve.data.masks import Masked, list_segments, load_masked
from radapter_serve.data.source import DataSource
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.run import open_set
from radapter_serve.evaluation.suite import Entry, Suite

UPRIGHT = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
MASK = np.random.default_rng(1).integers(0, 2, (6, 9), dtype=np.uint8) + 1
# The way a camera stores an upright picture, by EXIF's orientation (CIPA DC-008, tag 274).
STORED: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def stored(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    return np.ascontiguousarray(STORED[orientation](pixels))


def save(path: Path, pixels: NDArray[Any], orientation: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(path, exif=exif if orientation != 1 else b"")


def masked(folder: Path, mask: NDArray[Any], orientation: int) -> str:
    save(folder / "images" / "a.png", stored(UPRIGHT, orientation), orientation)
    save(folder / "masks" / "a.png", mask, 1)
    (folder / "classes.json").write_text('{"1": "cat", "2": "dog"}')
    return f"masks:{folder}"


def check(image: Any, expected: NDArray[Any], pixels: NDArray[Any]) -> None:
    np.testing.assert_array_equal(image.mask(), expected - 1)
    for label, inside in image.segments():
        np.testing.assert_array_equal(inside, expected == label + 1)
    crop = MaskCrop.filled_with((0.5, 0.5, 0.5))
    data = list_segments(Masked([image], ["cat", "dog"]), min_area=1)
    segments = replace(data, crop=crop)
    for row in segments.rows:
        shown = crop(Image.fromarray(pixels), expected == row[2] + 1)
        np.testing.assert_array_equal(np.asarray(segments.image(row)), np.asarray(shown))


# A mask that is upright is known by its size.
@pytest.mark.parametrize(
    ("orientation", "upright"), [*((number, False) for number in STORED), (5, True), (8, True)]
)
def test_a_mask_turns_with_its_image(orientation: int, upright: bool, tmp_path: Path) -> None:
    mask = MASK if upright else stored(MASK, orientation)
    spec = masked(tmp_path, mask, orientation)
    check(load_masked(DataSource(spec)).images[0], MASK, UPRIGHT)
    (raw,) = load_masked(DataSource(spec, exif_orientation=False)).images
    if upright:
        with pytest.raises(RAdapterError, match="or turn both with EXIF"):
            raw.mask()
    else:
        check(raw, mask, stored(UPRIGHT, orientation))


def opened(folder: Path, data: str, **fields: Any) -> Any:
    entry = Entry(data, name="set", **fields)
    return open_set(Suite("suite", (entry,), data_root=folder), entry)


def model_of(size: Any, turns: bool) -> Any:
    """A model for images of a size, which it would turn itself, or not."""
    preprocess = Preprocess(size, resize_mode="squash", exif_orientation=turns)
    return SimpleNamespace(loaded=SimpleNamespace(preprocess=preprocess))


@pytest.mark.parametrize("model_turns", [True, False])
@pytest.mark.parametrize(("orientation", "border"), [(1, 1), (3, 0), (6, 2), (7, 0), (8, 1)])
def test_a_suite_decides_what_every_model_sees(
    orientation: int, border: int, model_turns: bool, tmp_path: Path
) -> None:
    save(tmp_path / "set" / "cat" / "a.png", stored(UPRIGHT, orientation), orientation)
    save(tmp_path / "set" / "dog" / "b.png", UPRIGHT, 1)
    for wanted, expected in ((True, UPRIGHT), (False, stored(UPRIGHT, orientation))):
        data = opened(tmp_path, "imagefolder:set", exif_orientation=wanted, border=border)
        height, width = expected.shape[:2]
        inside = expected[border : height - border, border : width - border]
        seen = data.prepare(model_of(inside.shape[:2], model_turns), 0)
        np.testing.assert_array_equal(seen, inside)


def test_a_suite_of_masks_and_of_those_of_a_network(tmp_path: Path) -> None:
    masked(tmp_path / "set", stored(MASK, 6), 6)
    (tmp_path / "found").mkdir()
    fields = {"task": "segmentation", "dense": "proposals"}
    for wanted, pixels, mask in (
        (True, UPRIGHT, MASK),
        (False, stored(UPRIGHT, 6), stored(MASK, 6)),
    ):
        data = opened(tmp_path, "masks:set", exif_orientation=wanted, **fields)
        for model_turns in (True, False):
            item = data.prepare(model_of((6, 9), model_turns), 0)
            np.testing.assert_array_equal(np.asarray(item.image), pixels)
            np.testing.assert_array_equal(item.truth, mask - 1)
            np.testing.assert_array_equal(item.masks > 0, [mask == label for label in (1, 2)])

        # A network's masks are those of the image as it is seen; the second is empty.
        inside = np.stack([mask == 2, mask == 0, mask == 1])
        np.savez(tmp_path / "found" / "a.npz", masks=inside)
        upright, lying = (
            opened(tmp_path, "masks:set", exif_orientation=turned, proposals="found", **fields)
            for turned in (wanted, not wanted)
        )
        model = model_of((6, 9), turns=True)
        np.testing.assert_array_equal(upright.prepare(model, 0).masks, inside[[0, 2]] * 255)
        with pytest.raises(RAdapterError, match="write them at the image's size"):
            lying.prepare(model, 0)
