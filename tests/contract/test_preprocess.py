"""Pixels against open_clip's transform, crops by masks, and images that are decoded in parallel."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from open_clip.transform import image_transform
from PIL import Image

from radapter_serve.contract import images as files
from radapter_serve.contract import preprocess as module
from radapter_serve.contract.errors import TaskError, task_error
from radapter_serve.contract.images import read_headers
from radapter_serve.contract.preprocess import Decoder, MaskCrop, Preprocess, decode_pixels
from tests.helpers.small_release import png

MODES = ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "YCbCr", "I", "F"]


def picture(mode: str, width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode in ("I", "F"):
        return Image.fromarray(pixels[..., 0]).convert(mode)
    if mode in ("RGBA", "CMYK"):
        return Image.frombytes(mode, (width, height), pixels.tobytes())
    if mode == "LA":
        return Image.frombytes("LA", (width, height), pixels[..., :2].tobytes())
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    return image.quantize(17) if mode == "P" else image.convert(mode)


def reference(image: Image.Image, size: Any, **config: Any) -> np.ndarray:
    transform = image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), **config)
    return (transform(image) * 255).round().byte().permute(1, 2, 0).numpy()


@settings(max_examples=75, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    seed=st.integers(0, 9),
    size=st.one_of(st.integers(1, 48), st.tuples(st.integers(1, 48), st.integers(1, 48))),
    resize_mode=st.sampled_from(["shortest", "squash", "longest"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    fill_color=st.sampled_from([0, 127, 255]),
)
def test_pixels_are_those_of_open_clip(mode, width, height, seed, **config):
    image = picture(mode, width, height, seed)
    try:
        expected = reference(image.copy(), **config)
    except ValueError as error:  # a side rounded to nothing; ours goes on with one pixel
        assert "must be > 0" in str(error)
        assert Preprocess.from_dict(config)(image).shape[2] == 3
        return
    np.testing.assert_array_equal(Preprocess.from_dict(config)(image), expected)


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


@settings(max_examples=40, deadline=None)
@given(masks(), st.floats(0, 1))
def test_a_square_crop_holds_each_pixel_of_the_mask_once_in_place_and_no_other(
    mask: NDArray[np.bool_], padding: float
) -> None:
    crop = MaskCrop(padding)(Image.fromarray(numbered(*mask.shape)), mask)
    cropped = places(crop)
    assert crop.mode == "RGB" and crop.width == crop.height
    np.testing.assert_array_equal(cropped, np.argwhere(mask))  # both by row, then column
    filled = np.asarray(crop)[np.asarray(crop)[..., 2] != 255]
    assert (filled == FILL).all() and len(filled) == crop.width**2 - mask.sum()
    where = np.argwhere(np.asarray(crop)[..., 2] == 255)
    assert len(np.unique(where - cropped, axis=0)) == 1  # moved, not distorted
    longest = int(np.ptp(cropped, axis=0).max()) + 1
    border = round(padding * longest)
    top, left = where.min(0)
    assert crop.width == longest + 2 * border
    bottom, right = crop.width - 1 - where.max(0)
    assert abs(top - bottom) <= 1 and abs(left - right) <= 1
    assert min(top, left, bottom, right) >= border


def test_a_squashed_crop_stretches_the_box_alone() -> None:
    pixels = numbered(30, 40)
    mask = np.zeros((30, 40), bool)
    mask[5:9, 10:30] = True
    crop = MaskCrop(square=False)(Image.fromarray(pixels), mask)
    box = Image.fromarray(pixels[5:9, 10:30])
    np.testing.assert_array_equal(
        np.asarray(crop), np.asarray(box.resize((20, 20), Image.Resampling.BICUBIC))
    )


def test_crops_are_rgb_and_masks_that_do_not_fit_are_refused() -> None:
    for mode in ("LA", "P", "CMYK", "1", "I;16"):
        gray = Image.fromarray(numbered(6, 8)).convert("L" if mode == "I;16" else "RGB")
        crop = MaskCrop()(gray.convert(mode), np.ones((6, 8), bool))
        assert crop.mode == "RGB" and crop.size == (8, 8)
    image = Image.new("RGB", (8, 6))
    for mask, message in (
        (np.ones((8, 6), bool), r"a mask of 6 x 8 pixels does not fit .* 8 x 6"),
        (np.zeros((6, 8), bool), "empty"),
    ):
        with pytest.raises(TaskError, match=message):
            MaskCrop()(image, mask)
    with pytest.raises(TaskError, match=r"\[image_too_large\] .* 9000 x 9000"):
        MaskCrop()(Image.new("L", (9000, 1)), np.ones((1, 9000), bool))


PREPROCESS = Preprocess((16, 16))

WAIT = 60


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    decoder = Decoder(PREPROCESS, 2)
    yield decoder
    decoder.close()


def pixels_of(images: Sequence[bytes]) -> list[np.ndarray]:
    return [decode_pixels(image, PREPROCESS) for image in images]


def test_images_in_their_order_and_the_first_bad_one_is_named(decoder: Decoder) -> None:
    images = [png(seed, kind=kind) for seed, kind in enumerate(["PNG", "JPEG", "WEBP"] * 3)]
    np.testing.assert_array_equal(decoder.start(read_headers(images))(), pixels_of(images))
    assert decoder.start([])().shape == (0, 16, 16, 3)
    broken = png(0)[:-40]
    with pytest.raises(TaskError, match=r"^\[invalid_image\] image 2 of 3: ") as error:
        decoder.start(read_headers([png(1), broken, broken]))()
    assert error.value.message.count("image 2 of 3") == 1
    with pytest.raises(TaskError, match=r"^\[invalid_image\] the image is broken"):
        decoder.start(read_headers([broken]))()


def test_no_more_images_are_decoded_when_the_caller_has_left(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    gone = threading.Event()
    load = files.decode

    def note(file: Any, **how: Any) -> Any:
        decoded.append(file)
        gone.set()
        return load(file, **how)

    monkeypatch.setattr(module, "decode", note)
    left = decoder.start(read_headers([png(seed) for seed in range(20)]), gone.is_set)
    stayed = decoder.start(read_headers([png(99)]), lambda: False)
    with pytest.raises(TaskError, match=r"\[cancelled\]"):
        left()
    assert stayed().shape == (1, 16, 16, 3)
    assert len(decoded) <= 3


def test_threads_are_for_small_images_of_all_callers(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread waits for the turn of a large image, and those who wait have turns."""
    monkeypatch.setattr(files, "LARGE_MEMORY", 8 * 700)
    monkeypatch.setattr(files, "POLL_SECONDS", 0.01)
    small = read_headers([png(seed) for seed in range(3)])
    large = read_headers([png(seed, 30, 30) for seed in range(6)])
    waits = threading.Event()
    decoded = []

    def stays() -> bool:
        waits.set()
        return False

    thread = threading.Thread(target=lambda: decoded.append(decoder.start(large, stays)()))
    thread.daemon = True
    with ThreadPoolExecutor() as pool, files.turn(large[0]):
        thread.start()
        assert waits.wait(WAIT)
        assert pool.submit(decoder.start(small)).result(WAIT).shape == (3, 16, 16, 3)
        assert not decoded
    thread.join(WAIT)
    np.testing.assert_array_equal(decoded[0], pixels_of([file.data for file in large]))


def test_images_of_several_callers_are_decoded_in_turns(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [png(seed) for seed in range(12)]
    few = [png(100), png(101)]
    expected = [pixels_of(many), pixels_of(few)]
    order: list[bytes] = []
    free = threading.Semaphore(0)
    began = threading.Semaphore(0)
    decode_into = module.decode_into

    def decode(file: Any, *others: Any) -> None:
        order.append(file.data)
        began.release()
        assert free.acquire(timeout=WAIT)
        decode_into(file, *others)

    monkeypatch.setattr(module, "decode_into", decode)
    waits = [decoder.start(read_headers(images)) for images in (many, few)]
    for _ in range(2):  # of the first caller both threads decode one
        assert began.acquire(timeout=WAIT)
    free.release(14)
    for wait, pixels in zip(waits, expected, strict=True):
        np.testing.assert_array_equal(wait(), pixels)
    # Behind the two that were begun, and at most one more that its thread took on at once.
    assert {order.index(image) for image in few} <= {2, 3, 4}
    assert len(order) == 14


def test_pixels_are_freed_with_their_request(decoder: Decoder) -> None:
    """And not only when Python looks for circles."""
    gc.disable()
    try:
        wait = decoder.start(read_headers([png(seed) for seed in range(5)]))
        pixels = weakref.ref(wait())
        del wait
        # Of a broken image, too: its error holds the frames that decoded it.
        files = read_headers([png(0), png(1)[:-40]])
        freed = [weakref.ref(file) for file in files]
        wait = decoder.start(files)
        del files
        try:
            wait()
        except TaskError as error:
            message = task_error(error).message
        assert message.startswith("image 2 of 2: the image is broken")
        del wait
        decoder.close()  # its threads have let go of the requests
        assert pixels() is None
        assert [file() for file in freed] == [None, None]
    finally:
        gc.enable()
