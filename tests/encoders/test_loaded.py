"""A loaded release, of a repository or of a live server; and tasks side by side."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_client import RAdapterClientError
from radapter_serve.contract.embeddings import Point
from radapter_serve.contract.errors import ENCODER_FAILED, OVERLOADED, TaskError
from radapter_serve.contract.images import read_headers
from radapter_serve.encoders.batcher import complete, encode_together
from radapter_serve.encoders.loaded import (
    LoadedRelease,
    Need,
    TaskSteps,
    load_release,
    served_release,
)
from radapter_serve.errors import RAdapterError
from radapter_serve.gateway.upstream import Refused
from radapter_serve.release.release import TASKS
from radapter_serve.tasks.embed import (
    EmbedImagesRequest,
    EmbedTextsRequest,
    embed_images,
    embed_texts,
)
from tests.helpers.fake_upstream import config, serving
from tests.helpers.small_models import release
from tests.helpers.small_release import SIZE, Local, png, together


def test_a_copy_turns_images_or_leaves_them(local: Local) -> None:
    photo = png(3, SIZE, SIZE, "JPEG", turn=6)
    files = read_headers([photo])
    upright = local.loaded.pixels(photo)
    decoded = complete(local.loaded.decoded(files))
    np.testing.assert_array_equal(decoded[0], upright)
    as_it_is = local.loaded.turned(False)
    for pixels in (as_it_is.pixels(photo), complete(as_it_is.decoded(files))[0]):
        np.testing.assert_array_equal(np.rot90(pixels, -1), upright)
    np.testing.assert_array_equal(local.loaded.pixels(photo), upright)
    as_it_is.close()


def test_a_copy_at_another_alpha(local: Local) -> None:
    loaded = local.changed(dynamic_alpha=True)
    other = loaded.at(0.25)
    assert (loaded.release.alpha, other.release.alpha) == (0.5, 0.25)
    assert (loaded.place().alpha, other.place().alpha) == (0.5, 0.25)
    assert other.label_cache is not loaded.label_cache  # which keeps what was embedded at its own
    with pytest.raises(RAdapterError, match=r"alpha is 2; allowed"):
        loaded.at(2)
    with pytest.raises(RAdapterError, match=r"--alpha dynamic"):
        local.loaded.at(0.25)


def test_the_release_of_a_repository(repository: Path, tmp_path: Path) -> None:
    for name, version, expected in (
        (str(repository), None, 2),
        (str(repository), 1, 1),
        (f"{repository}@1", None, 1),
    ):
        loaded = load_release(name, version, indexes=tmp_path)
        assert loaded.release.version == expected
        assert loaded.indexes == tmp_path
        assert loaded.origin == {"model_repository": name}
        assert set(loaded.label_sets) == {"colours"}
        local = Local(repository, expected)
        pixels = [local.loaded.pixels(png(0))]
        np.testing.assert_array_equal(
            loaded.embed_pixels(pixels), local.loaded.embed_pixels(pixels)
        )
        loaded.close()
    with pytest.raises(RAdapterError, match="no release 7 in"):
        load_release(repository, 7)


def test_a_live_server_embeds_pixels_and_texts() -> None:
    facts = release(1, dynamic_alpha=True, max_batch_size=4).to_dict()
    with serving() as served:
        served.upstream.configs = {name: config(name, facts) for name in TASKS}
        loaded = served_release(served.url).at(0.25)
        assert loaded.release.version == 1 and loaded.origin == {"url": served.url}
        embeds = loaded.embed_texts(["four", "sixsix", "four"])
        assert embeds.dtype == np.float32 and embeds[:, 0].tolist() == [4, 6, 4]
        pixels = np.zeros((6, 4, 4, 3), np.uint8)
        assert loaded.embed_pixels(list(pixels)).shape == (6, 2)
        asked = [
            (inference.version, inference.inputs["alpha"].tolist())
            for inference in served.upstream.asked
        ]
        assert asked == [("1", [[0.25]] * rows) for rows in (2, 3, 3)]
        served.upstream.error = Refused(500, "internal_error", "it is gone")
        with pytest.raises(TaskError, match=rf"{served.url}: .*it is gone$"):
            loaded.embed_texts(["fails"])
        loaded.close()


def test_nobody_there() -> None:
    with pytest.raises(RAdapterError, match=r"grpc://127.0.0.1:9: no answer") as error:
        served_release("grpc://127.0.0.1:9")
    assert not isinstance(error.value, RAdapterClientError)


def images(loaded: LoadedRelease, *data: bytes) -> TaskSteps[Any]:
    return embed_images(loaded, EmbedImagesRequest(data))


def texts(loaded: LoadedRelease, *values: str, alpha: float | None = None) -> TaskSteps[Any]:
    return embed_texts(loaded, EmbedTextsRequest(values, Point(alpha=alpha)))


def codes(answers: list[Any]) -> list[str | None]:
    return [answer.code if isinstance(answer, TaskError) else None for answer in answers]


def test_needs_of_several_tasks_are_encoded_in_one_call(local: Local) -> None:
    loaded = local.loaded
    cat_and_dog, pictures, dogs = together(
        [
            texts(loaded, "a cat", "a dog"),
            images(loaded, png(0), png(1)),
            texts(loaded, "a dog", "a much longer text of a dog"),
        ]
    )
    # A text that two tasks have is encoded once.
    assert sorted(shape[0] for shape in local.calls) == [2, 3]
    np.testing.assert_array_equal(cat_and_dog[1], dogs[0])
    for embeds, task in (
        (cat_and_dog, texts(loaded, "a cat", "a dog")),
        (pictures, images(loaded, png(0), png(1))),
        (dogs, texts(loaded, "a dog", "a much longer text of a dog")),
    ):
        np.testing.assert_allclose(embeds, complete(task), atol=1e-6)


@pytest.mark.parametrize(
    ("counts", "max_batch_size", "precision", "expected"),
    [
        ((40, 40, 40), 64, "fp32", [15] * 8),
        ((40, 40, 40), 64, "bf16", [60, 60]),
        ((9, 8), 64, "int8", [8, 9]),
        ((16,), 64, "fp32", [16]),
        ((7,), 3, "fp32", [2, 2, 3]),
    ],
)
def test_many_images_are_encoded_in_parts_of_about_one_size(
    local: Local,
    counts: tuple[int, ...],
    max_batch_size: int,
    precision: str,
    expected: list[int],
) -> None:
    loaded = local.changed(max_batch_size=max_batch_size, precision=precision)
    data = [png(number) for number in range(sum(counts))]
    ends = list(itertools.accumulate(counts))
    parts = [data[end - count : end] for count, end in zip(counts, ends, strict=True)]
    embeds = together([images(loaded, *part) for part in parts])
    assert [shape[0] for shape in local.calls] == expected
    alone = [complete(images(loaded, image))[0] for image in data]
    np.testing.assert_allclose(np.concatenate(embeds), alone, atol=1e-6)


def test_a_bad_image_is_its_own_tasks_error(local: Local) -> None:
    loaded = local.loaded
    good = png(0)
    bad = png(1)[:60]
    asked = [[bad], [good], [good, bad], [good], [b"nonsense"]]
    answers = together([images(loaded, *data) for data in asked])
    assert codes(answers) == ["invalid_image", None, "invalid_image", None, "invalid_image"]
    assert "image 2 of 2" in str(answers[2])
    assert local.calls == [(2, SIZE, SIZE, 3)]
    for embeds in (answers[1], answers[3]):
        np.testing.assert_allclose(embeds, complete(images(loaded, good)), atol=1e-6)


@pytest.mark.parametrize(
    ("error", "code", "tracebacks"),
    [
        (ZeroDivisionError("at /home/somebody/secret.py"), "internal_error", 1),
        (TaskError(ENCODER_FAILED, "image_encoder failed"), ENCODER_FAILED, 0),  # a runtime's
    ],
)
def test_needs_that_fail_together_are_halved_until_the_one_is_found(
    local: Local,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    code: str,
    tracebacks: int,
) -> None:
    loaded = local.loaded
    black = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    rows = [np.full((1, SIZE, SIZE, 3), number, np.uint8) for number in range(1, 8)]
    expected = [local.images(image) for image in rows]
    batches: list[int] = []
    encode = local.images

    def fail(pixels: np.ndarray, alpha: np.ndarray | None = None) -> np.ndarray:
        batches.append(len(pixels))
        if not all(image.any() for image in pixels):
            raise error
        return encode(pixels)

    local.images = fail  # type: ignore[method-assign]
    batch = [*rows[:5], black, *rows[5:]]
    results: list[Any] = encode_together(
        [Need(loaded, "images", image, None, None) for image in batch]
    )
    assert codes(results) == [*[None] * 5, code, None, None]
    np.testing.assert_allclose(results[:5] + results[6:], expected, atol=1e-6)
    assert batches == [8, 4, 4, 2, 1, 1, 2]
    # Its caller learns that there was an error, and the log which, once.
    assert "secret" not in str(results[5])
    assert capfd.readouterr().err.count("Traceback") == tracebacks


def test_a_caller_who_has_left_is_encoded_no_further(local: Local) -> None:
    loaded = local.changed(max_batch_size=2)
    rows = [[number] for number in range(1, 7)]
    need = Need(loaded, "tokens", rows, None, lambda: len(local.calls) > 1)
    assert codes(encode_together([need])) == ["cancelled"]
    assert local.calls == [(2, 1)] * 2  # of three batches


def test_an_error_reaches_its_own_task_alone(
    local: Local, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of the encoder, which a task may catch, and a fault of a task, which the log has."""

    def task(*, fails: bool = False) -> TaskSteps[str]:
        try:
            yield from local.loaded.encoded("tokens", [[1]])
        except TaskError as error:
            return error.message
        if fails:
            raise ZeroDivisionError("at /home/somebody/secret.py")
        return "an answer"

    def later(needs: Any) -> list[TaskError]:
        return [TaskError("restarting", "later") for _ in needs]

    assert together([task(), task()], later) == ["later"] * 2
    [refused] = together([texts(local.loaded, "a")], later)
    assert str(refused) == "[restarting] later"
    failed, other = together([task(fails=True), task()])
    assert str(failed) == "[internal_error] the server failed on this request; its log says why"
    assert other == "an answer"
    assert "secret.py" in capfd.readouterr().err


@pytest.mark.parametrize("error", [TaskError(OVERLOADED, "too many"), KeyboardInterrupt()])
def test_where_the_encoder_takes_nobody_all_tasks_end(local: Local, error: BaseException) -> None:
    """Even while somebody keeps the traceback, as an interactive session does."""
    ended = []

    def task() -> TaskSteps[None]:
        try:
            yield from local.loaded.encoded("tokens", [[1]])
        finally:
            ended.append(True)

    def refuses(needs: Any) -> Any:
        raise error

    if isinstance(error, TaskError):
        assert codes(together([task(), task()], refuses)) == [OVERLOADED] * 2
    else:
        with pytest.raises(KeyboardInterrupt):
            together([task(), task()], refuses)
    assert len(ended) == 2


def test_tasks_with_many_rows_leave_turns_to_others(local: Local) -> None:
    sizes: list[int] = []

    def task(count: int) -> TaskSteps[int]:
        rows = yield from local.loaded.encoded("tokens", [[1]] * count)
        return len(rows)

    def encode(needs: Any) -> Any:
        if not needs:
            pytest.fail("a batch of no rows")
        sizes.append(sum(len(need.rows) for need in needs))
        return encode_together(needs)

    counts = [300, 100, 100, 100, 100, 100]  # the first is more than a batch by itself
    assert together([*map(task, counts)], encode) == counts
    assert sizes == [300, 200, 200, 100]


def test_each_row_is_encoded_at_the_alpha_of_its_task(local: Local) -> None:
    alphas: list[Any] = []
    encode = local.tokens

    def tokens(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        assert alpha.dtype == np.float32
        alphas.append(alpha.tolist())
        return encode(values) * alpha

    local.tokens = tokens  # type: ignore[method-assign,assignment]
    loaded = local.changed(dynamic_alpha=True, alpha=0.5)
    quarter, full, half = together(
        [texts(loaded, "cat", alpha=0.25), texts(loaded, "cat", alpha=1), texts(loaded, "cat")]
    )
    assert alphas == [[[0.25], [1], [0.5]]]  # one text, but at three α
    np.testing.assert_allclose([quarter / 0.25, half / 0.5], [full] * 2, atol=1e-6)


def test_an_error_lets_go_of_its_image(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[Image.Image]] = []
    real = Image.open

    def note(*arguments: Any, **options: Any) -> Image.Image:
        image = real(*arguments, **options)
        opened.append(weakref.ref(image))
        return image

    monkeypatch.setattr(Image, "open", note)
    [answer] = together([images(local.loaded, png(0)[:-40])])
    assert answer.code == "invalid_image"
    assert len(opened) == 2  # for its header and for its pixels
    assert [reference() for reference in opened] == [None, None]
