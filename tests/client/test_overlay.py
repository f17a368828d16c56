"""The picture of a segmentation: its pixels, its legend, and images and labels of every kind."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import radapter_client
from radapter_client import Segmentation
from radapter_client._overlay import FIRST, _spelled, colours, read_font


def segmentation(mask: np.ndarray, labels: list[str], image, background: int | None = None) -> Segmentation:
    return Segmentation(mask.astype(np.uint16), labels, [0.5] * len(labels), 1, background, image)


def halves(height: int, width: int) -> np.ndarray:
    """Label 0 on the left, 1 on the right."""
    return np.broadcast_to(np.arange(width) >= width // 2, (height, width))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_colours_are_distinct_and_stay():
    table = colours(300)
    assert table.shape == (300, 3)
    assert np.array_equal(colours(10), table[:10])
    assert len(np.unique(table[:150], axis=0)) == 150
    distances = np.abs(table[:20, None].astype(int) - table[None, :20]).sum(-1) + 999 * np.eye(20, dtype=int)
    assert distances.min() > 40


def test_pixels():
    image = noise(10, 40)
    found = segmentation(halves(10, 40), ["a", "b"], image)
    picture = np.asarray(found.overlay(opacity=0.25, legend=False)).astype(int)
    assert picture.shape == (10, 40, 3)
    for label, where in enumerate((np.s_[:, :18], np.s_[:, 22:])):
        np.testing.assert_allclose(picture[where], 0.75 * image[where] + 0.25 * np.array(FIRST[label]), atol=1)
    assert (picture[:, 19] == FIRST[0]).all() and (picture[:, 20] == FIRST[1]).all()  # the outline
    clear = np.asarray(found.overlay(opacity=0, legend=False))
    assert np.array_equal(clear[:, :18], image[:, :18])


def test_background_is_left_as_it_is():
    image = noise(10, 40)
    picture = np.asarray(segmentation(halves(10, 40), ["a", "background"], image, 1).overlay(legend=False))
    assert np.array_equal(picture[:, 20:], image[:, 20:])
    assert not np.array_equal(picture[:, :20], image[:, :20])


def test_outlines_are_thicker_in_large_images():
    image = np.zeros((900, 3000, 3), np.uint8)
    picture = np.asarray(segmentation(halves(900, 3000), ["a", "b"], image).overlay(legend=False))
    assert (picture[450] == FIRST[0]).all(-1).sum() == (picture[450] == FIRST[1]).all(-1).sum() == 5


@pytest.mark.parametrize("shape", [(1, 1), (96, 64), (40, 2000), (2000, 7), (1200, 1000)])
def test_legend_stands_below_the_image(shape: tuple[int, int]):
    found = segmentation(halves(*shape), ["left", "right"], noise(*shape))
    picture = found.overlay()
    bare = found.overlay(legend=False)
    assert bare.size == shape[::-1]
    assert picture.width >= bare.width and picture.height > bare.height
    assert max(picture.size) >= 512
    swatches = np.asarray(picture)[-picture.height // 4 :].reshape(-1, 3)
    for share, colour in zip(found.shares, FIRST, strict=False):
        assert (swatches == colour).all(-1).any() == (share > 0)


def test_shares_and_legend_of_many_labels():
    mask = np.arange(100).reshape(10, 10)
    found = segmentation(mask, [f"label {index}" for index in range(200)], noise(10, 10))
    assert found.shares == [0.01] * 100 + [0] * 100
    assert found.overlay().height < 3000


def test_stored_image_is_not_turned(tmp_path: Path):
    """A photograph with an EXIF orientation: mask and overlay have the pixels as they lie in the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(20, 30)).save(tmp_path / "turned.png", exif=exif)
    found = segmentation(halves(20, 30), ["a", "b"], tmp_path / "turned.png")
    assert np.array_equal(np.asarray(found.overlay(opacity=0, legend=False))[:, :10], noise(20, 30)[:, :10])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "transparent"])
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


LABELS = ["猫", "🦊 fox", "", "   ", "line\nbreak", "a" * 1000, "Größe", "مرحبا", "\x00\x07", "\ufeff", "e\u0301"]


def test_labels_of_every_kind():
    mask = np.arange(11 * 11).reshape(11, 11) % 11
    assert segmentation(mask, LABELS, noise(11, 11)).overlay().width == 517
    font = read_font(None, 20)
    spelled = [_spelled(label, font) for label in LABELS]
    assert spelled[:5] == ["\\u732b", "\\U0001f98a fox", "(no name)", "(no name)", "line break"]
    assert spelled[6] in ("Größe", "Gro\\xdfe")  # as the font of the Pillow at hand has it
    assert len(set(spelled)) == len(LABELS) - 1


def test_font_of_the_user(tmp_path: Path):
    found = segmentation(halves(20, 30), ["猫", "犬"], noise(20, 30))
    (tmp_path / "font.ttf").write_bytes(b"no font")
    for path in (tmp_path / "font.ttf", tmp_path / "absent.ttf"):
        with pytest.raises(radapter_client.InvalidRequest, match=f"cannot read the font {path}"):
            found.overlay(font=path)


def test_what_cannot_be_drawn(tmp_path: Path):
    found = segmentation(halves(20, 30), ["a", "b"], tmp_path / "gone.png")
    with pytest.raises(radapter_client.InvalidImage, match=r"gone.png: No such file"):
        found.overlay()
    (tmp_path / "gone.png").write_bytes(b"no image")
    with pytest.raises(radapter_client.InvalidImage, match="cannot read the image"):
        found.overlay()
    with pytest.raises(radapter_client.InvalidRequest, match="of 20 x 30 pixels for a mask of 30 x 20"):
        found.overlay(noise(30, 20))
    with pytest.raises(radapter_client.InvalidRequest, match="opacity is 2"):
        found.overlay(noise(20, 30), opacity=2)
    with pytest.raises(radapter_client.InvalidRequest, match="no image to draw on"):
        segmentation(halves(20, 30), ["a", "b"], None).overlay()
