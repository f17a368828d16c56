"""Images without labels, from a folder or a table."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from radapter_serve.data.rows import open_images
from radapter_serve.errors import RAdapterError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images, one of them in a folder inside, and a text."""
    folder = tmp_path / "photos"
    (folder / "b").mkdir(parents=True)
    for number, name in enumerate(("a.png", "c.png", "b/d.png")):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "few.csv").write_text("image,year\na.png,1999\nb/d.png,2001\n")
    return folder


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("{}", ["a.png", "c.png", "b/d.png"]),
        ("imagefolder:{}", ["a.png", "c.png", "b/d.png"]),
        ("csv:{}/few.csv", ["a.png", "b/d.png"]),
    ],
)
def test_images_are_found(photos: Path, source: str, names: list[str]) -> None:
    images = open_images(source.format(photos), "--calibration")
    found = [images.data(row) for row in images.rows]
    assert found == [(photos / name).read_bytes() for name in names]
    assert Path(photos, images.name(images.rows[0])) == photos / "a.png"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/none", "is no folder; give --calibration a folder of images"),
        ("{}/empty", "holds no image; allowed are .jpg"),
        ("csv:{}/other.csv", "has no column 'image'; its columns: path; see --calibration"),
    ],
)
def test_what_holds_no_images_is_refused(photos: Path, source: str, message: str) -> None:
    (photos / "empty").mkdir()
    (photos / "other.csv").write_text("path\na.png\n")
    with pytest.raises(RAdapterError, match=message):
        open_images(source.format(photos), "--calibration")
