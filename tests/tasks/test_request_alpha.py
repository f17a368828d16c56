"""α of requests, without Triton: of rows, of labels and of indexes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_client import Client, Timeout
from radapter_serve.contract.embeddings import Point
from radapter_serve.contract.errors import TaskError
from radapter_serve.encoders.batcher import complete
from radapter_serve.encoders.labels import Examples
from radapter_serve.engine.engine import Engine
from radapter_serve.index.build import add, build
from radapter_serve.index.index import open_index
from radapter_serve.tasks.classify import ClassifyRequest, classify
from radapter_serve.tasks.embed import Labels, embed_labels
from radapter_serve.tasks.retrieve import Query, RetrieveRequest
from radapter_serve.tasks.segment import SegmentRequest, segment
from radapter_serve.tasks.table import MAX_ENCODED, TASKS
from tests.helpers.fake_upstream import until
from tests.helpers.projection import Searching, projecting
from tests.helpers.small_release import Local, photos_in, png, together

SHOWN = tuple(png(seed, 4, 4) for seed in range(50, 70))
NAMES = ("red, scarlet", "blue")


class Turned:
    """The small release as if α were an input: an encoder turns its embeddings around by α."""

    def __init__(self, local: Local) -> None:
        self.calls: list[list[float]] = []  # α of each row
        for name in ("images", "patches", "tokens"):
            setattr(local, name, self._turned(getattr(local, name)))
        self.loaded = local.changed(alpha=0.3, dynamic_alpha=True)
        colours = complete(embed_labels(self.loaded, NAMES, ["a {}"]))
        shown = replace(colours, examples=Examples(SHOWN, (0,) * len(SHOWN)))
        self.loaded.label_sets = {"colours": colours, "shown": shown}
        self.calls.clear()

    def _turned(self, encode: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def call(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
            assert alpha.shape == (len(values), 1) and alpha.dtype == np.float32
            self.calls.append(alpha.ravel().tolist())
            embeds = encode(values)
            turn = alpha.reshape(-1, *[1] * (embeds.ndim - 1))
            mixed = (1 - turn) * embeds + turn * np.roll(embeds, 1, -1)
            return mixed / np.linalg.norm(mixed, axis=-1, keepdims=True)

        return call


@pytest.fixture
def turned(local: Local) -> Turned:
    return Turned(local)


def column(*rows: Any, kind: Any = object) -> np.ndarray:
    return np.array([[row] for row in rows], kind)


def test_rows_of_several_alphas_share_a_batch(turned: Turned) -> None:
    """Rows of one request do so too, and become requests of one α each."""
    task = TASKS["embed_image"]
    run = task.make(turned.loaded, lambda: [], 0)
    image = png(0)
    other = png(1)

    def answer(*rows: bytes, alphas: Sequence[float] = ()) -> np.ndarray:
        inputs = {"image": column(*rows)}
        if alphas:
            inputs["alpha"] = column(*alphas, kind=np.float32)
        requests = task.read(turned.loaded, inputs, lambda name: True)
        outputs = task.values(1, together([run(image, None) for image in requests]))
        expected = [round(alpha, 6) for alpha in alphas] or [0.3] * len(rows)
        assert [json.loads(image)["alpha"] for image in outputs["receipt"].ravel()] == expected
        return outputs["image_embeds"]

    low, middle, high = (answer(image, other, alphas=[a, a]) for a in (0, 0.3, 1))
    assert np.abs(low - high).max() > 0.01
    turned.calls.clear()
    mixed = answer(image, other, image, other, other, alphas=[0, 1, 1, 1, 0.3])
    assert len(turned.calls) == 1
    np.testing.assert_allclose(mixed, [low[0], high[1], high[0], high[1], middle[1]], atol=1e-6)
    np.testing.assert_allclose(answer(other), middle[1:], atol=1e-6)


# Examples of a request, and of a label set of the release
BY_EXAMPLE = {
    "request": (Labels(NAMES, templates=["a {}"]), Examples(SHOWN, (0,) * len(SHOWN))),
    "label set": (Labels(label_set="shown"), None),
}
BOTH_WAYS = pytest.mark.parametrize("way", BY_EXAMPLE)


@BOTH_WAYS
def test_examples_are_encoded_once_for_each_alpha(turned: Turned, way: str) -> None:
    labels, examples = BY_EXAMPLE[way]
    scores = []
    for count, alpha in enumerate((0.5, 0.75, 0.5, 0.75), 1):
        request = ClassifyRequest([png(0)], labels, point=Point(alpha=alpha), examples=examples)
        [ranking] = complete(classify(turned.loaded, request))
        scores.append(ranking.scores)
        # At each α three texts and the examples; then the image.
        assert sum(map(len, turned.calls)) == min(count, 2) * (3 + len(SHOWN)) + count
    np.testing.assert_array_equal(scores[0], scores[2])
    assert np.abs(scores[0] - scores[1]).max() > 1e-4


@BOTH_WAYS
def test_examples_at_too_many_alphas_are_refused(turned: Turned, way: str) -> None:
    """Of one request on the wire, all its rows together."""
    labels, examples = BY_EXAMPLE[way]
    count = MAX_ENCODED // len(SHOWN) + 1
    alphas = [0.5 + number / 100 for number in range(count)]

    def read(alphas: list[float]) -> None:
        inputs = {"image": column(*[png(0)] * len(alphas))}
        inputs["alpha"] = column(*alphas, kind=np.float32)
        if labels.label_set is not None:
            inputs["label_set"] = column(*[b"shown"] * len(alphas))
        if examples is not None:
            inputs["labels"] = np.array([[name.encode() for name in NAMES]] * len(alphas), object)
            inputs["examples"] = np.array([SHOWN] * len(alphas), object)
            inputs["example_labels"] = np.zeros((len(alphas), len(SHOWN)), np.int32)
        TASKS["classify"].read(turned.loaded, inputs, lambda name: True)

    message = f"{count * len(SHOWN)} examples to encode .* at most {MAX_ENCODED} are"
    with pytest.raises(TaskError, match=message):
        read(alphas)
    read(alphas[1:])


def test_segment_takes_every_encoder_at_one_alpha(turned: Turned) -> None:
    masks = np.full((1, 20, 30), 255, np.uint8)
    answers = []
    for alpha in (0.0, 0.5):
        turned.calls.clear()
        labelled = SegmentRequest(png(3), Labels(label_set="colours"), Point(alpha=alpha))
        answers.append(complete(segment(turned.loaded, labelled)))
        labels = Labels(["a", "b"])
        proposed = SegmentRequest(png(3), labels, Point(alpha=alpha), proposals=masks)
        complete(segment(turned.loaded, proposed))
        assert {value for call in turned.calls for value in call} == {alpha}
        assert len(turned.calls) >= 3
    assert np.abs(answers[0].scores - answers[1].scores).max() > 1e-4


def test_an_index_belongs_to_one_alpha(tmp_path: Path) -> None:
    indexes = tmp_path / "indexes"
    photos = photos_in(tmp_path / "photos")
    dynamic = projecting(indexes, dynamic_alpha=True, alpha=0.5)
    alphas: list[np.ndarray] = []
    tokens = dynamic.encoder.tokens

    def note(values: np.ndarray, alpha: Any = None) -> np.ndarray:
        alphas.append(alpha)
        return tokens(values)

    dynamic.encoder.tokens = note  # type: ignore[method-assign,assignment]
    build(photos, indexes / "photos", dynamic.at(0.8))
    assert open_index(indexes / "photos").facts.plan.release.alpha == 0.8
    assert add(indexes / "photos", dynamic).kept == 4  # whose own α is 0.5
    request = RetrieveRequest("photos", Query(["1"]))
    ids = Searching.of(dynamic).ids(request)
    np.testing.assert_array_equal(alphas, [np.full((1, 1), 0.8, np.float32)])
    # A release with that alpha folded in can search it, too.
    assert Searching.of(projecting(indexes, alpha=0.8)).ids(request) == ids


def test_a_label_set_at_another_alpha_has_the_limit_of_labels(
    turned: Turned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three prompts, over all rows of a request."""
    monkeypatch.setattr("radapter_serve.contract.labels.MAX_PROMPTS", 5)
    task = TASKS["classify"]

    def read(*alphas: float) -> Sequence[Any]:
        inputs = {
            "image": column(*map(png, range(len(alphas)))),
            "label_set": column(*[b"colours"] * len(alphas)),
            "alpha": column(*alphas, kind=np.float32),
        }
        return task.read(turned.loaded, inputs, lambda name: True)

    assert len(read(0.3, 0.4)) == 2  # the first has the embeddings of the export
    with pytest.raises(TaskError, match=r"6 prompts .* 5 are allowed, so ask at the alpha of the"):
        read(0.4, 0.5)
    monkeypatch.setattr("radapter_serve.contract.labels.MAX_PROMPTS", 2)
    labels = Labels(label_set="colours")
    for alpha in (0.3, None):
        complete(classify(turned.loaded, ClassifyRequest([png(0)], labels, point=Point("", alpha))))
    turned.calls.clear()
    with pytest.raises(TaskError, match=r"3 prompts .* 2 are allowed"):
        complete(classify(turned.loaded, ClassifyRequest([png(0)], labels, point=Point("", 0.4))))
    assert not turned.calls


def test_one_label_set_at_a_time_is_embedded_again(
    turned: Turned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others wait, and find those of their α in the cache."""
    monkeypatch.setattr("radapter_serve.tasks.table._FEW_PROMPTS", 0)
    encode = turned.loaded.encoder.tokens
    gate = threading.Event()
    calls: list[float] = []

    def tokens(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        calls.append(round(float(alpha[0, 0]), 6))
        assert gate.wait(30)
        return encode(values, alpha)

    turned.loaded.encoder.tokens = tokens  # type: ignore[method-assign,assignment]
    with Engine([turned.loaded]) as engine, ThreadPoolExecutor(3) as pool:
        [served] = engine._served.values()
        client = Client(transport=engine)
        ask = partial(client.classify, png(0), label_set="colours")
        answers = [pool.submit(ask, alpha=alpha) for alpha in (0.4, 0.4, 0.5)]
        until(lambda: len(served.label_sets._queue) == 3 and calls)
        assert len(calls) == 1
        assert ask().top  # at the α of the export nobody waits
        with pytest.raises(Timeout):
            Client(transport=engine, timeout=0.3, retries=0).classify(
                png(0), label_set="colours", alpha=0.6
            )
        gate.set()
        assert all(answer.result(30).top for answer in answers)
    assert sorted(calls) == [0.4, 0.5]
