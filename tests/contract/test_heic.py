"""A phone's photos: with the extra `heic` they are converted where they lie, and nowhere else."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_client import RAdapterClientError
from radapter_client._images import encode_image, encode_small, list_images, read_image, size_bound
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import decode, read_header, without_heic
from radapter_serve.data.masks import LabelMap
from radapter_serve.data.rows import BrokenImage, ImageColumn
from radapter_serve.encoders.loaded import load_release
from radapter_serve.index.build import build
from tests.helpers.small_release import write_release
from tests.hostile.images import saved

pytestmark = pytest.mark.integration
pillow_heif = pytest.importorskip("pillow_heif")


def heic(width: int, height: int, *, mode: str = "RGB", **options: Any) -> bytes:
    ramp = np.linspace(0, 65_535, width * height).reshape(height, width)
    pixels = np.stack([ramp, 65_535 - ramp, ramp.T.reshape(height, width)], 2)
    data = pixels.astype(np.uint16).tobytes()
    if mode == "RGB":
        data = (pixels / 257).astype(np.uint8).tobytes()
    file = io.BytesIO()
    heif = pillow_heif.from_bytes(mode, (width, height), data)
    heif.save(file, quality=90, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGB;16"])
def test_a_photo_is_converted_where_it_lies(tmp_path: Path, mode: str) -> None:
    # EXIF says to turn it, and so do boxes of the file, by which libheif turns.
    exif = Image.Exif()
    exif[0x0112] = 6
    data = heic(120, 80, mode=mode, exif=exif.tobytes())
    file = tmp_path / "1.HEIC"
    file.write_bytes(data)
    theirs = np.asarray(pillow_heif.open_heif(file, convert_hdr_to_8bit=True)).astype(float)

    assert list_images(tmp_path) == [str(file)]
    column = SimpleNamespace(image_column="image", folder=tmp_path, name=lambda row: row["image"])
    files = {
        "client": encode_image(file),
        "shrinking client": encode_small(file, 448),
        "training": ImageColumn.data(column, {"image": "1.HEIC"}),  # type: ignore[arg-type]
        "training on bytes": ImageColumn.data(column, {"image": data}),  # type: ignore[arg-type]
        "evaluation": LabelMap(file, file, np.zeros(1, np.int32)).data(),
        "examples": without_heic(data),
    }
    for place, converted in files.items():
        image = decode(converted)
        assert (image.format, image.size) == ("JPEG", theirs.shape[1::-1]), place
        assert abs(np.asarray(image) - theirs).mean() < 2, place
    assert len(files["client"]) < size_bound(file)
    assert read_image(file).size == theirs.shape[1::-1]


def test_an_index_is_built_of_photos(tmp_path: Path) -> None:
    write_release(tmp_path / "models", 1, seed=1)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.heic").write_bytes(heic(120, 80))
    built = build(str(tmp_path / "photos"), tmp_path / "index", load_release(tmp_path / "models"))
    assert built.embedded == 1


def test_bytes_of_callers_are_not_converted() -> None:
    data = heic(64, 64)
    for call in (read_header, decode):
        with pytest.raises(TaskError, match=r"\[invalid_image\] HEIC files are not read; convert"):
            call(data)
    assert encode_image(data) == data


def test_a_broken_or_a_large_photo_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "1.heic"
    file.write_bytes(heic(64, 64)[:-200])
    with pytest.raises(RAdapterClientError, match=r"1\.heic: the HEIC file cannot be read: "):
        encode_image(file)
    with pytest.raises(BrokenImage, match=r"1\.heic can't be read: the HEIC file cannot be read: "):
        LabelMap(file, file, np.zeros(1, np.int32)).data()
    monkeypatch.setattr("radapter_client.heic.MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(TaskError, match="it has 64 x 64 pixels; at most 4095 are allowed"):
        without_heic(heic(64, 64))
    assert without_heic(jpeg := saved(Image.new("L", (8, 8)), "JPEG")) == jpeg
