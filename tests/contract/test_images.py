"""Image files: how they are decoded and turned, and what is refused before it is decoded."""

from __future__ import annotations

import base64
import io
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from radapter_serve.contract import images as module
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import decode, oriented, read_header, read_headers
from radapter_serve.contract.preprocess import Preprocess, decode_pixels
from tests.data.test_orientation import STORED
from tests.helpers.small_release import chunk, png, png_header
from tests.hostile import images
from tests.hostile.images import saved


def test_decode_takes_bytes_base64_and_data_uri():
    for kind in ("JPEG", "PNG", "WEBP"):
        data = png(2, kind=kind)
        lines = base64.encodebytes(data)
        for file in (data, lines, b"data:image/x;base64," + base64.b64encode(data)):
            expected = np.asarray(Image.open(io.BytesIO(data)))
            np.testing.assert_array_equal(np.asarray(decode(file)), expected)


@pytest.mark.parametrize(("orientation", "kind"), [*((of, "JPEG") for of in STORED), (6, "WEBP")])
def test_images_are_turned_by_their_exif_orientation_but_where_the_release_says_no(
    orientation, kind
):
    data = png(4, kind=kind, turn=orientation)
    stored = np.asarray(Image.open(io.BytesIO(data)))
    turned = decode(data)
    np.testing.assert_array_equal(STORED[orientation](np.asarray(turned)), stored)
    assert oriented(turned) is turned
    np.testing.assert_array_equal(np.asarray(decode(data, exif_orientation=False)), stored)

    for facts, image in (({}, turned), ({"exif_orientation": False}, Image.fromarray(stored))):
        preprocess = Preprocess.from_dict({"size": 16, **facts})
        np.testing.assert_array_equal(decode_pixels(data, preprocess), preprocess(image))


@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")  # Pillow tells of them
@settings(max_examples=50, deadline=None)
@given(
    st.binary(max_size=60),
    st.sampled_from(
        [b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12"]
    ),
)
def test_broken_exif_leaves_an_image_as_it_is(exif, head):
    data = saved(Image.new("RGB", (8, 8)), "JPEG", exif=head + exif)
    assert decode(data).size == (8, 8)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for kind, options in (("WEBP", {"lossless": True}), ("PNG", {})):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode(data).convert("RGB").getpixel((3, 3)) == (255, 0, 0)


@settings(max_examples=50, deadline=None)
@given(
    st.binary(max_size=80),
    st.sampled_from(
        [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBPVP8 "]
    ),
)
def test_any_bytes_give_an_image_or_one_clear_error(data, magic):
    with pytest.raises(TaskError):
        decode(magic + data)


def test_of_16_bits_of_gray_the_upper_8_are_kept():
    """libpng cuts colours to 8 bits in the same way. Divided by 257, 65,534 would be 254."""
    values = np.array(
        [[0, 255, 256, 257, 511, 512, 32_767, 32_768, 65_279, 65_280, 65_534, 65_535]]
    )
    expected = [[0, 0, 1, 1, 1, 2, 127, 128, 254, 255, 255, 255]]
    gray = saved(Image.fromarray(values.astype(np.uint16)), "PNG")
    np.testing.assert_array_equal(np.asarray(decode(gray)), expected)
    # The same values as colours, of which Pillow keeps the upper 8 bits itself.
    line = b"\0" + np.repeat(values, 3).astype(">u2").tobytes()
    colours = images.png_of(12, 1, bits=16, colour=2, data=zlib.compress(line))
    np.testing.assert_array_equal(np.asarray(decode(colours))[..., 0], expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(0, 8, 8, "GIF"), "GIF files are not read; send a JPEG, PNG or WebP"),
        (
            b"\0\0\0\x18ftypheic" + bytes(16),
            r"^\[invalid_image\] HEIC files are not read; convert it to JPEG, as the client",
        ),
        (png_header(9_000, 9_000), r"^\[image_too_large\].* 64000000 "),
        (png_header(2**31 - 1, 2**31 - 1), r"^\[image_too_large\].* 64000000 "),
        (png_header(1, 65_536), r"^\[image_too_large\] the image has 1 x 65536 pixels"),
    ],
)
def test_other_formats_and_bombs_are_refused_from_their_headers(data, message):
    with pytest.raises(TaskError, match=message):
        decode(data)


def _jpeg(*segments: tuple[int, bytes]) -> bytes:
    """A JPEG without JFIF, which would hide its EXIF, and with segments before its tables."""
    parts = (
        b"\xff" + bytes([marker]) + (len(body) + 2).to_bytes(2, "big") + body
        for marker, body in segments
    )
    return b"\xff\xd8" + b"".join(parts) + saved(Image.new("RGB", (8, 8)), "JPEG")[20:]


def _exif(count: int, size: int, values: int) -> bytes:
    """EXIF of so many values, which are the same bytes."""
    each = (struct.pack("<HHII", tag + 1, 1, values, 0) for tag in range(count))
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", count)
    return (head + b"".join(each)).ljust(size, b"\0")


_PROFILE = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**6), 9))


@pytest.mark.parametrize(
    ("make", "why"),
    [  # with the seconds that each took
        (lambda: _jpeg(*[(0xE3, b"")] * 2**20), "parts"),  # 1.4
        (lambda: b"\xff\xd8" + b"\xff" * 2**22 + _jpeg()[2:], "parts"),  # 1
        (lambda: b"\xff\xd8\xff\xd0" + bytes(2**22) + _jpeg()[2:], "parts"),  # 1
        (lambda: _jpeg(*[(0xED, b"Photoshop 3.0\0" + b"8BIM\0\1" * 5000)] * 999), "more than 8"),
        (lambda: _jpeg(*[(0xDB, (b"\0" + bytes(64)) * 999)] * 999), "more than 8388608 bytes of"),
        (lambda: _jpeg(*[(0xE1, b"Exif\0\0" + bytes(65_000))] * 999), "more than 8388608"),  # 17
        (lambda: images.png_of(8, 8, *[_PROFILE] * 999), "a second colour profile"),  # 2
        (lambda: images.png_of(8, 8, *[chunk(b"abCd", b"")] * 2**18), "parts"),  # 0.7
        (lambda: _split_png(2**18), "parts"),  # 1
        (lambda: images.png_of(8, 8)[:-12] + chunk(b"cHRM", bytes(2**24)), "more than 8388608"),
    ],
)
def test_the_work_of_a_header_has_a_bound(make: Callable[[], bytes], why: str) -> None:
    data = make()
    start = time.thread_time()
    with pytest.raises(TaskError, match=why):
        decode(data)
    assert time.thread_time() - start < 0.5


def _split_png(count: int) -> bytes:
    """A PNG whose pixels are behind so many empty chunks of pixels."""
    pixels = images.png_of(8, 8)
    place = pixels.index(b"IDAT") - 4
    return pixels[:place] + chunk(b"IDAT", b"") * count + pixels[place:]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow tells of EXIF that is cut off
def test_of_exif_no_more_is_read_than_fits_a_segment() -> None:
    # 64 KiB that Pillow would read as 2 GB, and a megabyte as 60 GB.
    small = _exif(2, 500, 10)
    many = [(0xE1, b"Exif\0\0" + _exif(5000, 65_000, 400_000))] * 100
    large = _exif(65_000, 10**6, 900_000)
    text = b"\n\n\n" + _exif(20_000, 240_100, 200_000).hex().encode()
    files = [
        _jpeg(*many),
        images.png_of(8, 8, chunk(b"eXIf", large)),
        images.png_of(8, 8)[:-12] + chunk(b"eXIf", large) + chunk(b"IEND", b""),
        saved(Image.new("RGB", (8, 8)), "WEBP", exif=large),
        images.png_of(8, 8, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))),
        images.png_of(8, 8, chunk(b"eXIf", small)),
    ]
    tracemalloc.start()
    for data in files:
        assert decode(data).size == (8, 8)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 64 * 2**20


def test_headers_as_cameras_write_them_are_read() -> None:
    # A colour profile of a printer, EXIF, Photoshop's paths, and XMP with a map of depth.
    parts = [(0xE2, b"ICC_PROFILE\0" + bytes([number, 60]) + bytes(65_000)) for number in range(60)]
    parts += [
        (0xE1, b"Exif\0\0" + _exif(60, 60_000, 400)),
        (0xED, b"Photoshop 3.0\0" + bytes(60_000)),
    ]
    parts += [(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000))] * 50
    assert decode(_jpeg(*parts)).size == (8, 8)
    # Chunks of 8 KiB, as libpng writes them.
    noise = np.random.default_rng(0).bytes(1200 * 1201)
    rows = zlib.compress(
        b"".join(b"\0" + noise[row * 1200 : row * 1200 + 1200] for row in range(1200))
    )
    chunks = [chunk(b"IDAT", rows[start : start + 8192]) for start in range(0, len(rows), 8192)]
    whole = images.png_of(1200, 1200, bits=8, data=b"")
    empty = chunk(b"IDAT", b"")
    assert decode(whole.replace(empty, b"".join(chunks))).size == (1200, 1200)


def test_a_thin_image_is_refused_before_it_is_blown_up():
    assert decode(images.png_of(1, 65_535)).size == (1, 65_535)
    with pytest.raises(TaskError, match="image_too_large"):
        Preprocess((224, 224))(Image.new("RGB", (1, 1_200)))


def with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan stands there again and again, up to so many scans."""
    data = saved(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda")) : -2]
    return data[:-2] + last * (count - data.count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_of_many_scans_is_refused():
    assert decode(with_scans(100)).size == (64, 64)
    with pytest.raises(TaskError, match=r"\[image_too_large\] the JPEG has 101 scans .* most 100 "):
        decode(with_scans(101))
    # One whose header says that it is large.
    size = with_scans(60).replace(b"\0\x40\0\x40", b"\x0f\xa0\x1f\x40", 1)
    with pytest.raises(TaskError, match="has 60 scans for its 32000000 pixels; at most 50 are"):
        decode(size)
    # Behind a marker that a decoder passes over.
    with pytest.raises(TaskError, match=r"\[image_too_large\] the JPEG has 258 scans"):
        decode(images.hidden_scans(1))
    # Scans of a preview, and those behind the end, are none.
    data = saved(Image.new("RGB", (64, 64)), "JPEG")
    many = b"\xff\xda" * 500
    preview = b"\xff\xe1" + (len(many) + 2).to_bytes(2, "big") + many
    assert decode(data[:2] + preview + data[2:] + many).size == (64, 64)


def test_a_file_that_is_too_long_is_refused():
    data = saved(Image.new("RGB", (64, 64)), "PNG").ljust(64 * 2**20, b"\0")
    assert decode(data).size == (64, 64)
    with pytest.raises(TaskError, match=r"\[image_too_large\] the image has 67108865 bytes"):
        decode(data + b"\0")


def test_the_images_of_a_request_have_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REQUEST_PIXELS", 3 * 1200)
    images = [png(0, 40, 30, "JPEG"), png(0, 30, 40), png(0, 40, 30, "WEBP")]
    assert [file.width for file in read_headers(images)] == [40, 30, 40]
    with pytest.raises(TaskError, match=r"\[image_too_large\] the 4 images .* have 3601 pixels"):
        read_headers([*images, png(0, 1, 1)])
    with pytest.raises(TaskError, match=r"^\[invalid_image\] image 2 of 2: 3 bytes are not an im"):
        read_headers([images[0], b"abc"])


def test_a_few_have_turns_at_once_in_their_order_and_too_many_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    turns = module.FifoLimit(2, 2, "requests to test")
    inside = threading.Semaphore(0)
    gates = [threading.Event() for _ in range(4)]
    order: list[int] = []

    def take(number: int) -> None:
        with turns():
            order.append(number)
            inside.release()
            assert gates[number].wait(30)

    threads = [threading.Thread(target=take, args=[number], daemon=True) for number in range(4)]
    for number, thread in enumerate(threads):
        thread.start()
        while len(turns._queue) <= number:
            time.sleep(0.001)
    assert inside.acquire(timeout=30) and inside.acquire(timeout=30)
    with (
        pytest.raises(TaskError, match=r"^\[overloaded\] too many requests to test; ask again"),
        turns(),
    ):
        pass
    assert sorted(order) == [0, 1]
    for number, following in ((1, 2), (0, 3)):
        gates[number].set()
        assert inside.acquire(timeout=30)
        assert order[-1] == following
    for gate in gates:
        gate.set()
    for thread in threads:
        thread.join(30)
    with turns():
        pass  # nobody is left who has it


@pytest.mark.parametrize(
    ("pixel_bytes", "mode", "kind", "progressive"),
    [
        (8, "RGB", "PNG", False),
        (8, "RGB", "JPEG", False),
        (10, "RGB", "JPEG", True),
        (12, "CMYK", "JPEG", True),
        (8, "L", "JPEG", True),
        (16, "RGB", "WEBP", False),
    ],
)
def test_what_takes_more_memory_to_decode_may_have_fewer_pixels(
    pixel_bytes: int, mode: str, kind: str, progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved(Image.new(mode, (40, 30)), kind, progressive=progressive)
    assert read_header(data).memory == 1200 * pixel_bytes
    monkeypatch.setattr(module, "MAX_MEMORY", 1200 * pixel_bytes)
    assert decode(data).size == (40, 30)
    monkeypatch.setattr(module, "MAX_MEMORY", 1200 * pixel_bytes - 1)
    with pytest.raises(TaskError, match=r"\[image_too_large\] .* 40 x 30 = 1200 pixels; at most"):
        decode(data)


def test_jpegs_that_are_more_than_they_seem() -> None:
    data = png(0, 64, 48, "JPEG")
    # Say that the first scan has the first of the three colours alone: it is as a progressive one.
    scan = data.index(b"\xff\xda")
    assert data[scan + 2 : scan + 5] == b"\0\x0c\x03"
    head = data[:scan] + b"\xff\xda\0\x08\x01" + data[scan + 5 : scan + 7] + b"\0\x3f\0"
    assert read_header(head + data[scan + 14 :]).memory == 64 * 48 * 10
    assert read_header(data).memory == 64 * 48 * 8
    # A photo of two pictures.
    picture = Image.new("RGB", (64, 64))
    data = saved(picture, "MPO", save_all=True, append_images=[picture], progressive=True)
    end = data.index(b"\xff\xd9")
    last = data[data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda", 0, end)) : end]
    with pytest.raises(TaskError, match=r"\[image_too_large\] the JPEG has \d+ scans"):
        decode(data[:end] + 100 * last + data[end:])


@pytest.mark.parametrize(("kind", "where"), [(PngImageFile, "load"), (Image.Image, "resize")])
def test_whatever_fails_is_the_image_s_error(monkeypatch, kind, where):
    for error, code in ((ValueError("x"), "invalid_image"), (MemoryError(), "image_too_large")):
        monkeypatch.setattr(kind, where, Mock(side_effect=error))
        with pytest.raises(TaskError) as caught:
            decode_pixels(png(0), Preprocess((8, 8)))
        assert caught.value.code == code


def test_base64_takes_little_memory():
    decode(png(0))  # Pillow loads its formats
    tracemalloc.start()
    with pytest.raises(TaskError):
        decode(b"a " * 1_000_000)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 6_000_000
