"""A phone's photos, which are read where the extra `heic` is installed."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_serve.contract import images
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import decode, list_images, read_header, verify
from tests.contract.test_memory import MEASURE
from tests.hostile import heic as hostile
from tests.hostile.images import saved

pytestmark = pytest.mark.integration
pillow_heif = pytest.importorskip("pillow_heif")


def heic(width: int, height: int, *, mode: str = "RGB", **options: Any) -> bytes:
    ramp = np.linspace(0, 255, width * height).reshape(height, width)
    pixels = np.stack([ramp, 255 - ramp, ramp.T.reshape(height, width), ramp], 2)
    pixels = pixels[..., : len(mode.partition(";")[0])]
    if mode == "RGB":
        return saved(Image.fromarray(pixels.astype(np.uint8)), "HEIF", quality=90, **options)
    deep = (pixels * 257).astype(np.uint16)
    file = io.BytesIO()
    pillow_heif.from_bytes(mode, (width, height), deep.tobytes()).save(file, quality=90, **options)
    return file.getvalue()


def declared(data: bytes, size: tuple[int, int], other: tuple[int, int]) -> bytes:
    """The file with another size in its header."""
    head = b"ispe" + bytes(4)
    place = head + struct.pack(">II", *size)
    assert place in data
    return data.replace(place, head + struct.pack(">II", *other))


@pytest.mark.parametrize("mode", ["RGB", "RGB;16"])
def test_a_photo_is_decoded_and_its_folder_is_listed(tmp_path: Path, mode: str) -> None:
    data = heic(120, 80, mode=mode)
    file = read_header(data)
    assert (file.width, file.height, file.is_large) == (120, 80, False)
    image = decode(data)
    assert (image.mode, image.size) == ("RGB", (120, 80))
    (tmp_path / "1.HEIC").write_bytes(data)
    assert list_images(tmp_path).images == [tmp_path / "1.HEIC"]
    theirs = np.asarray(pillow_heif.open_heif(tmp_path / "1.HEIC", convert_hdr_to_8bit=True))
    np.testing.assert_array_equal(np.asarray(image), theirs)
    verify(data)


@pytest.mark.parametrize("turned", [True, False])
def test_a_photo_is_not_turned_twice(turned: bool) -> None:
    # libheif turns by the file's own boxes; EXIF says it again.
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode(heic(120, 80, exif=exif), exif_orientation=turned)
    assert (image.size, images.orientation_of(image)) == ((120, 80), 1)


def test_no_more_is_decoded_than_the_header_says(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(640, 480)
    small = declared(data, (640, 480), (64, 64))
    assert read_header(small).width == 64
    for call in (decode, verify):
        with pytest.raises(TaskError, match=r"\[invalid_image\] the image is broken or truncated"):
            call(small)
    with pytest.raises(TaskError, match=r"\[image_too_large\] a picture in the HEIC file has 8000"):
        read_header(declared(data, (640, 480), (8000, 8000)))
    for cut in range(0, len(data), 97):
        with pytest.raises(TaskError, match="invalid_image"):
            decode(data[:cut])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        # 5 KB, 21 s
        (lambda: hostile.grid(16, 512, 64), "has tiles of 67108864 pixels for a smaller picture"),
        # 7 KB, more than 40 s at 5,000 x 5,000
        (lambda: hostile.turned(250, 64), "turns or crops a picture 250 times"),
        (lambda: hostile.derived(200, b"iden", 64), "of parts that no phone writes"),
        (lambda: hostile.derived(2, b"grid", 64), "has tiles of tiles"),
        # 1 MB, 1 GB of memory
        (lambda: hostile.noted(99, 2**20), "1048600 bytes of Exif, XMP and profiles for 99 pict"),
        (lambda: hostile.noted(9, 0, profile=2**20), "bytes of Exif, XMP and profiles for 9 pictu"),
        (lambda: hostile.noted(1, 2**20, 16), "has items of more bytes than the file"),
        (lambda: hostile.noted(1, 1, 33), "has an item in 33 pieces"),
        (lambda: hostile.noted(5000, 1), "has more than 5000 boxes"),
        (lambda: hostile.turned(20, 64, pictures=4000), "has lists of more than 262144 bytes"),
    ],
)
def test_work_that_the_size_does_not_explain_is_refused(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], bytes], why: str
) -> None:
    data = make()
    monkeypatch.setattr(images, "_open", lambda data: pytest.fail("libheif opened it"))
    with pytest.raises(TaskError, match=r"\[image_too_large\] the HEIC file .*" + why):
        read_header(data)


def test_tiles_turns_and_notes_as_cameras_write_them_are_read() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 420, 3), np.uint8))
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0"
    data = saved(photo, "HEIF", tile_size=128, exif=exif, icc_profile=bytes(2**20))
    assert data.count(b"hvc1") == 3 * 4
    files = [data, hostile.grid(3, 64, 190), hostile.turned(3, 64), hostile.noted(9, 20)]
    sizes = [decode(file).size for file in files]
    assert sizes == [(420, 300), (190, 190), (64, 64), (64, 64)]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much a process has had")
@pytest.mark.parametrize("mode", ["RGB", "RGBA;16"])
def test_decoding_takes_no_more_memory_than_is_said(tmp_path: Path, mode: str) -> None:
    side = 3000
    files = []
    for size in (64, side):
        files.append(str(tmp_path / str(size)))
        Path(files[-1]).write_bytes(heic(size, size, mode=mode, chroma=444))
    run = [sys.executable, "-c", MEASURE, *files]
    taken = int(subprocess.run(run, capture_output=True, check=True, text=True).stdout)
    assert taken < images.HEIC_PIXEL_BYTES * side**2 + 24 * 2**20
