"""Tasks side by side: what they need is encoded together, and an error is its own task's alone."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_serve.contract.errors import OVERLOADED, TaskError
from radapter_serve.encoders.loaded import LoadedRelease, Need, Steps, complete, encode_together
from radapter_serve.tasks.embed import (
    EmbedImagesRequest,
    EmbedTextsRequest,
    embed_images,
    embed_texts,
)
from tests.helpers.small_release import SIZE, WIDTH, Local, png, together


def images(loaded: LoadedRelease, *data: bytes) -> Steps[Any]:
    return embed_images(loaded, EmbedImagesRequest(data))


def texts(loaded: LoadedRelease, *values: str, alpha: float | None = None) -> Steps[Any]:
    return embed_texts(loaded, EmbedTextsRequest(values, alpha))


def codes(answers: list[Any]) -> list[str | None]:
    return [one.code if isinstance(one, TaskError) else None for one in answers]


def test_needs_of_several_tasks_are_encoded_in_one_call(local: Local) -> None:
    loaded = local.loaded
    one, two, three = together(
        [
            texts(loaded, "a cat", "a dog"),
            images(loaded, png(0), png(1)),
            texts(loaded, "a dog", "a much longer text of a dog"),
        ]
    )
    # A text that two of them have is encoded once.
    assert sorted(shape[0] for shape in local.calls) == [2, 3]
    np.testing.assert_array_equal(one[1], three[0])
    for found, task in (
        (one, texts(loaded, "a cat", "a dog")),
        (two, images(loaded, png(0), png(1))),
        (three, texts(loaded, "a dog", "a much longer text of a dog")),
    ):
        np.testing.assert_allclose(found, complete(task), atol=1e-6)


@pytest.mark.parametrize(
    ("counts", "max_batch_size", "expected"),
    [
        ((40, 40, 40), 64, [15] * 8),
        ((64,), 64, [16] * 4),
        ((9, 8), 64, [8, 9]),
        ((16,), 64, [16]),
        ((7,), 3, [2, 2, 3]),
    ],
)
def test_many_images_are_encoded_in_parts_of_about_one_size(
    local: Local, counts: tuple[int, ...], max_batch_size: int, expected: list[int]
) -> None:
    loaded = local.changed(max_batch_size=max_batch_size)
    data = [png(number) for number in range(sum(counts))]
    ends = list(itertools.accumulate(counts))
    parts = [data[end - count : end] for count, end in zip(counts, ends, strict=True)]
    found = together([images(loaded, *part) for part in parts])
    assert [shape[0] for shape in local.calls] == expected
    alone = [complete(images(loaded, one))[0] for one in data]
    np.testing.assert_allclose(np.concatenate(found), alone, atol=1e-6)


def test_a_bad_image_is_its_own_tasks_error(local: Local) -> None:
    loaded = local.loaded
    good = png(0)
    bad = png(1)[:60]
    asked = [[bad], [good], [good, bad], [good], [b"nonsense"]]
    answers = together([images(loaded, *data) for data in asked])
    assert codes(answers) == ["invalid_image", None, "invalid_image", None, "invalid_image"]
    assert "image 2 of 2" in str(answers[2])
    assert local.calls == [(2, SIZE, SIZE, 3)]
    for found in (answers[1], answers[3]):
        np.testing.assert_allclose(found, complete(images(loaded, good)), atol=1e-6)


class Fails:
    """An encoder that fails where a batch has a certain row."""

    def __init__(self, local: Local, is_bad: Callable[[Any], bool]) -> None:
        self.batches: list[int] = []
        self._local = local
        self._is_bad = is_bad

    def images(self, pixels: np.ndarray, alpha: np.ndarray | None = None) -> np.ndarray:
        self.batches.append(len(pixels))
        if any(map(self._is_bad, pixels)):
            raise ZeroDivisionError("at /home/somebody/secret.py")
        return self._local.images(pixels)

    patches = tokens = images

    def close(self) -> None:
        pass


def test_needs_that_fail_together_are_halved_until_the_one_is_found(
    local: Local, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = local.loaded
    black = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    rows = [np.full((1, SIZE, SIZE, 3), number, np.uint8) for number in range(1, 8)]
    expected = [local.images(one) for one in rows]
    loaded.encoder = failing = Fails(local, lambda one: not one.any())
    given = [*rows[:5], black, *rows[5:]]
    results: list[Any] = encode_together([Need(loaded, "images", one, None, None) for one in given])
    assert codes(results) == [*[None] * 5, "internal_error", None, None]
    np.testing.assert_allclose(results[:5] + results[6:], expected, atol=1e-6)
    assert failing.batches == [8, 4, 4, 2, 1, 1, 2]
    # Its caller learns that there was an error, and the log which, once.
    assert "secret" not in str(results[5])
    assert capfd.readouterr().err.count("Traceback") == 1


def test_an_encoders_own_error_reaches_its_task(local: Local) -> None:
    def encode(needs: Any) -> list[TaskError]:
        return [TaskError("restarting", "later") for _ in needs]

    def task() -> Steps[str]:
        try:
            yield from local.loaded.encoded("tokens", [[1]])
        except TaskError as error:
            return f"was told: {error.message}"
        return ""

    assert together([task(), task()], encode) == ["was told: later"] * 2
    with pytest.raises(TaskError, match=r"^\[restarting\] later$"):
        complete(texts(local.loaded, "a"), encode)


def test_a_fault_of_a_task_is_its_own(local: Local, capfd: pytest.CaptureFixture[str]) -> None:
    def broken() -> Steps[None]:
        yield from local.loaded.encoded("tokens", [[1]])
        raise ZeroDivisionError("at /home/somebody/secret.py")

    found, other = together([broken(), texts(local.loaded, "a cat")])
    assert str(found) == "[internal_error] the server failed on this request; its log says why"
    assert other.shape == (1, WIDTH)
    assert "secret.py" in capfd.readouterr().err


def test_where_the_encoder_takes_nobody_all_tasks_end(local: Local) -> None:
    ended = []

    def task() -> Steps[None]:
        try:
            yield from local.loaded.encoded("tokens", [[1]])
        finally:
            ended.append(True)

    def refuses(needs: Any) -> Any:
        raise TaskError(OVERLOADED, "too many")

    answers = together([task(), task()], refuses)
    assert [one.code for one in answers if isinstance(one, TaskError)] == [OVERLOADED] * 2
    assert len(ended) == 2


def test_tasks_with_many_rows_leave_turns_to_others(local: Local) -> None:
    sizes: list[int] = []

    def task() -> Steps[int]:
        rows = yield from local.loaded.encoded("tokens", [[1]] * 100)
        return len(rows)

    def encode(needs: Any) -> Any:
        sizes.append(sum(len(need.rows) for need in needs))
        return encode_together(needs)

    assert together([task() for _ in range(5)], encode) == [100] * 5
    assert sizes == [200, 200, 100]


def test_each_row_is_encoded_at_the_alpha_of_its_task(local: Local) -> None:
    alphas: list[Any] = []
    encode = local.tokens

    def tokens(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        assert alpha.dtype == np.float32
        alphas.append(alpha.tolist())
        return encode(values) * alpha

    local.tokens = tokens  # type: ignore[method-assign,assignment]
    loaded = local.changed(dynamic_alpha=True, alpha=0.5)
    one, two, three = together(
        [texts(loaded, "cat", alpha=0.25), texts(loaded, "cat", alpha=1), texts(loaded, "cat")]
    )
    assert alphas == [[[0.25], [1], [0.5]]]  # one text, but at three α
    np.testing.assert_allclose([one / 0.25, three / 0.5], [two] * 2, atol=1e-6)


def test_an_error_lets_go_of_its_image(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[Image.Image]] = []
    real = Image.open

    def note(*given: Any, **options: Any) -> Image.Image:
        image = real(*given, **options)
        opened.append(weakref.ref(image))
        return image

    monkeypatch.setattr(Image, "open", note)
    [found] = together([images(local.loaded, png(0)[:-40])])
    assert found.code == "invalid_image"
    assert len(opened) == 2  # for its header and for its pixels
    assert [one() for one in opened] == [None, None]
