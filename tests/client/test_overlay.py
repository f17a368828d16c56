"""The picture of a segmentation: its pixels, its legend, and images and labels of every kind."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

import radapter_client
from radapter_client import Segmentation, _pictures

# The first of Okabe and Ito's, which people with any colour vision tell apart.
FIRST = ((86, 180, 233), (230, 159, 0))


def segmentation(
    mask: np.ndarray, labels: list[str], image, background: int | None = None
) -> Segmentation:
    return Segmentation(mask.astype(np.uint16), labels, [0.5] * len(labels), 1, background, image)


def halves(height: int, width: int) -> np.ndarray:
    """Label 0 on the left, 1 on the right."""
    return np.broadcast_to(np.arange(width) >= width // 2, (height, width))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def colours(count: int) -> list[tuple[int, ...]]:
    """The colours that `count` labels are painted in."""
    names = [f"{index}" for index in range(count)]
    painted = segmentation(np.arange(count)[None], names, np.zeros((1, count, 3), np.uint8))
    return list(map(tuple, np.asarray(painted.overlay(opacity=1, legend=False))[0].tolist()))


def test_labels_have_colours_of_their_own():
    palette = colours(300)
    assert len(set(palette)) == 256 and palette[:2] == [*FIRST]
    # A label keeps its colour.
    assert colours(10) == palette[:10] and palette[256:] == palette[:44]


def test_the_distance_of_colours_is_that_of_lab():
    """The values of sRGB's colours under D65, as Lindbloom publishes them."""
    published = {
        (255, 0, 0): (53.24, 80.09, 67.2),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.3, 79.19, -107.86),
        (255, 255, 255): (100, 0, 0),
        (5, 5, 5): (1.37, 0, 0),
    }
    lab = _pictures._lab(np.array([*published], float))
    np.testing.assert_allclose(lab, [*published.values()], atol=0.1)


def test_pixels():
    image = noise(10, 40)
    segmented = segmentation(halves(10, 40), ["a", "b"], image)
    picture = np.asarray(segmented.overlay(opacity=0.25, legend=False)).astype(int)
    assert picture.shape == (10, 40, 3)
    for label, where in enumerate((np.s_[:, :18], np.s_[:, 22:])):
        np.testing.assert_allclose(
            picture[where], 0.75 * image[where] + 0.25 * np.array(FIRST[label]), atol=1
        )
    assert (picture[:, 19] == FIRST[0]).all() and (picture[:, 20] == FIRST[1]).all()  # the outline
    clear = np.asarray(segmented.overlay(opacity=0, legend=False))
    assert np.array_equal(clear[:, :18], image[:, :18])
    segmented = segmentation(halves(10, 40), ["a", "background"], image, 1)
    assert np.array_equal(np.asarray(segmented.overlay(legend=False))[:, 20:], image[:, 20:])


@pytest.mark.parametrize("shape", [(1, 1), (96, 64), (40, 2000), (2000, 7)])
def test_legend_stands_below_the_image(shape: tuple[int, int]):
    segmented = segmentation(halves(*shape), ["left", "right"], noise(*shape))
    picture = segmented.overlay()
    bare = segmented.overlay(legend=False)
    assert bare.size == shape[::-1]
    assert picture.width >= bare.width and picture.height > bare.height
    assert max(picture.size) >= 512
    painted = bare.height * -(-512 // max(bare.size))  # it is enlarged
    swatches = np.asarray(picture)[painted:].reshape(-1, 3)
    for share, colour in zip(segmented.shares, FIRST, strict=False):
        assert (swatches == colour).all(-1).any() == (share > 0)


def test_shares_and_legend_of_many_labels():
    mask = np.arange(100).reshape(10, 10)
    segmented = segmentation(mask, [f"label {index}" for index in range(200)], noise(10, 10))
    assert segmented.shares == [0.01] * 100 + [0] * 100
    assert segmented.overlay().height < 3000


@pytest.mark.parametrize("value", [1, 3, 5, 6])
def test_photograph_is_turned_as_its_mask_is(value: int, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray(noise(20, 30)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        for turns, wanted in (
            (True, np.asarray(ImageOps.exif_transpose(opened))),
            (False, noise(20, 30)),
        ):
            for image in (tmp_path / "turned.png", opened):
                segmented = segmentation(np.zeros(wanted.shape[:2]), ["a"], image)
                segmented = dataclasses.replace(segmented, exif_orientation=turns)
                assert np.array_equal(
                    np.asarray(segmented.overlay(opacity=0, legend=False)), wanted
                )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "transparent"])
def test_image_of_any_mode(mode: str):
    image = Image.fromarray(noise(20, 30))
    image = image.quantize(16) if mode == "transparent" else image.convert(mode)
    if mode == "transparent":
        image.info["transparency"] = bytes(range(16))
    file = io.BytesIO()
    image.save(file, "PNG")
    for kind in (image, file.getvalue()):
        assert segmentation(halves(20, 30), ["a", "b"], kind).overlay(legend=False).mode == "RGB"
    assert image.size == (30, 20)


def legend(label: str) -> bytes:
    """The picture of one label, with its legend."""
    return segmentation(np.zeros((1, 512)), [label], noise(1, 512)).overlay().tobytes()


def test_the_letters_of_a_legend_are_nearly_as_high_as_its_swatches():
    for width in (512, 2000):
        picture = segmentation(np.zeros((1, width)), ["OOO"], noise(1, width)).overlay()
        rows = np.asarray(picture)[1:].astype(int)
        swatch = (rows == FIRST[0]).all(-1).any(1).sum()
        letters = (rows.sum(-1) < 200).any(1).sum()  # none else is as dark
        assert 0.6 * swatch < letters < swatch


def test_labels_are_spelled():
    assert legend("猫") == legend("\\u732b") and legend("🦊 fox") == legend("\\U0001f98a fox")
    assert legend("") == legend("   ") == legend("(no name)")
    assert legend("line\nbreak") == legend("line break")
    # Long, invisible and right-to-left labels differ, too.
    labels = ["a" * 1000, "Größe", "مرحبا", "\x00\x07", "\ufeff", "e\u0301"]
    assert len(set(map(legend, labels))) == len(labels)


def test_what_cannot_be_drawn(tmp_path: Path):
    gone = tmp_path / "gone.png"
    segmented = segmentation(halves(20, 30), ["猫", "b"], gone)
    with pytest.raises(radapter_client.InvalidImage, match=r"gone.png: No such file"):
        segmented.overlay()
    gone.write_bytes(b"no image")
    with pytest.raises(radapter_client.InvalidImage, match="cannot read the image"):
        segmented.overlay()
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (noise(30, 20), {}, "of 20 x 30 pixels for a mask of 30 x 20"),
        (noise(20, 30), {"opacity": 2}, "opacity is 2"),
        (noise(20, 30), {"font": gone}, f"cannot read the font {gone}"),
        (noise(20, 30), {"font": tmp_path / "absent.ttf"}, "cannot read the font .*absent.ttf"),
    ]
    for image, options, message in wrong:
        with pytest.raises(radapter_client.InvalidRequest, match=message):
            segmented.overlay(image, **options)
    with pytest.raises(radapter_client.InvalidRequest, match="no image to draw on"):
        segmentation(halves(20, 30), ["a", "b"], None).overlay()
