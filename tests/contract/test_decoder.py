"""Images of several callers are decoded side by side, and none keeps another waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from radapter_serve.contract import images as files
from radapter_serve.contract import preprocess as module
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import read_headers
from radapter_serve.contract.preprocess import Decoder, Preprocess, decode_pixels
from tests.helpers.small_release import png

PREPROCESS = Preprocess((16, 16))
WAIT = 60


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder(PREPROCESS, 2)
    yield made
    made.close()


def pixels_of(images: Sequence[bytes]) -> list[np.ndarray]:
    return [decode_pixels(image, PREPROCESS) for image in images]


def in_time(work: Callable[[], Any]) -> Any:
    """What `work` gives, or None where it hangs."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(WAIT)
    return found[0] if found else None


def test_images_in_their_order(decoder: Decoder) -> None:
    images = [png(seed, kind=kind) for seed, kind in enumerate(["PNG", "JPEG", "WEBP"] * 3)]
    np.testing.assert_array_equal(decoder.start(read_headers(images))(), pixels_of(images))
    assert decoder.start([])().shape == (0, 16, 16, 3)


def test_the_first_bad_image_is_named_where_there_are_several(decoder: Decoder) -> None:
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
    found = []

    def stays() -> bool:
        waits.set()
        return False

    thread = threading.Thread(target=lambda: found.append(decoder.start(large, stays)()))
    thread.daemon = True
    with files.turn(large[0]):
        thread.start()
        assert waits.wait(WAIT)
        assert in_time(decoder.start(small)).shape == (3, 16, 16, 3)
        assert not found
    thread.join(WAIT)
    np.testing.assert_array_equal(found[0], pixels_of([file.data for file in large]))


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
