"""`embed_image`, `embed_text` and `classify` in this process: scores against the formula, and what
is refused.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_serve.contract import preprocess as decoder
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.preprocess import Preprocess
from radapter_serve.encoders.loaded import LoadedRelease, Steps, complete
from radapter_serve.tasks.classify import ClassifyRequest, Ranking, classify
from radapter_serve.tasks.embed import (
    EmbedImagesRequest,
    EmbedTextsRequest,
    Labels,
    embed_images,
    embed_labels,
    embed_texts,
)
from radapter_serve.tasks.table import TASKS, forms
from tests.helpers.small_release import LABELS, SIZE, WIDTH, Local, png, together


def images(loaded: LoadedRelease, *data: bytes, **how: Any) -> Steps[Any]:
    return embed_images(loaded, EmbedImagesRequest(data, **how))


def ask(
    loaded: LoadedRelease,
    data: Sequence[bytes],
    names: Sequence[str] | None = None,
    *,
    label_set: str | None = None,
    templates: Sequence[str] | None = None,
    **options: Any,
) -> Steps[list[Ranking]]:
    labels = Labels(names, label_set, templates)
    return classify(loaded, ClassifyRequest(data, labels, **options))


def test_embed_images(local: Local) -> None:
    data = [png(0), png(1), png(2, 90, 16), png(3, kind="JPEG")]
    found = complete(images(local.loaded, *data))
    assert found.shape == (4, WIDTH) and local.calls == [(4, SIZE, SIZE, 3)]
    for image, row in zip(data, found, strict=True):
        pixels = Preprocess((SIZE, SIZE))(Image.open(io.BytesIO(image)))
        np.testing.assert_allclose(row, local.images(pixels[None])[0], atol=1e-6)
        assert np.linalg.norm(row) == pytest.approx(1)


def test_embed_texts(local: Local) -> None:
    values = ("a cat", "a dog", "Ölkäfer", "a cat", "word " * 200, "x" * 10_000)
    found = complete(embed_texts(local.loaded, EmbedTextsRequest(values)))
    assert [shape[0] for shape in local.calls] == [5]
    tokens = [local.loaded.tokenizer.batch(local.loaded.tokenizer.encode([one])) for one in values]
    expected = np.concatenate([local.tokens(one) for one in tokens])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_headers_of_all_images_are_read_before_the_first_is_decoded(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("radapter_serve.contract.images.MAX_REQUEST_PIXELS", 4600)
    monkeypatch.setattr("radapter_serve.contract.preprocess.LARGE_PIXELS", 1_000_000)
    monkeypatch.setattr(decoder, "decode_into", lambda *_: pytest.fail("decoded"))
    data = [png(seed) for seed in range(8)]  # 600 pixels each
    # The last is 16 x 64,000 pixels when it is resized.
    for asked, message in (
        (data, "have 4800 pixels together; at most 4600"),
        ([data[0], b"nonsense"], "image 2 of 2: 6 bytes are not an image"),
        ([data[0], png(0, 4000, 1)], "image of 4000 x 1, resized,"),
    ):
        for task in (images(local.loaded, *asked), ask(local.loaded, asked, ["a"])):
            with pytest.raises(TaskError, match=message):
                complete(task)
    assert not local.calls


def by_hand(
    loaded: LoadedRelease, image: bytes, names: Sequence[str], templates: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """The labels' first names, and the cosines."""
    label_set = complete(embed_labels(loaded, names, templates))
    embed = complete(images(loaded, image))[0].astype(np.float64)
    return list(label_set.labels), label_set.embeds @ embed


def check(found: Ranking, labels: Sequence[str], scores: np.ndarray, count: int) -> None:
    best = np.argsort(-scores)[:count]
    assert found.labels == [labels[place] for place in best]
    np.testing.assert_allclose(found.scores, scores[best], rtol=1e-5)


def test_classify_is_the_softmax_of_scaled_cosines(local: Local) -> None:
    names = ["cat", "dog", "bird, fowl", "fish", "a man", "tree"]
    labels, cosines = by_hand(local.loaded, png(5), names, ["a photo of a {}."])
    scores = np.exp(10 * cosines) / np.exp(10 * cosines).sum()
    cases: list[tuple[dict[str, Any], int]] = [({}, 5), ({"top_k": 100}, 6), ({"top_k": 2}, 2)]
    for options, count in cases:
        [found] = complete(ask(local.loaded, [png(5)], names, **options))
        check(found, labels, scores, count)
    labels, cosines = by_hand(local.loaded, png(5), names, ["one {}", "two {}"])
    scores = np.exp(10 * cosines) / np.exp(10 * cosines).sum()
    [found] = complete(ask(local.loaded, [png(5)], names, templates=["one {}", "two {}"]))
    check(found, labels, scores, 5)


def test_sigmoid_where_the_model_has_a_bias(local: Local) -> None:
    loaded = local.changed(logit_bias=-3.0)
    labels, cosines = by_hand(loaded, png(5), ["cat", "dog"], loaded.release.templates)
    [found] = complete(ask(loaded, [png(5)], ["cat", "dog"]))
    check(found, labels, 1 / (1 + np.exp(-(10 * cosines - 3))), 2)


def test_a_label_set_of_the_release(local: Local) -> None:
    labels, cosines = by_hand(local.loaded, png(5), LABELS, ["a {}"])
    scores = np.exp(10 * cosines) / np.exp(10 * cosines).sum()
    local.calls.clear()
    [found, _] = complete(ask(local.loaded, [png(5), png(6)], label_set="colours"))
    check(found, labels, scores, 4)
    assert local.calls == [(2, SIZE, SIZE, 3)]  # its labels were embedded when it was made


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({}, "no_labels", "give labels, or a label_set of this release: colours"),
        ({"names": ["a", " "]}, "invalid_argument", "label 2 of 2 is empty"),
        ({"names": ["a", "a"]}, "invalid_argument", "label 2, 'a', is the same as label 1"),
        ({"names": ["a" * 1001]}, "invalid_argument", "a label of 1001 characters"),
        ({"names": ["a"], "templates": ["no place"]}, "invalid_argument", "has no {}"),
        ({"names": ["a"], "label_set": "colours"}, "invalid_argument", "not both"),
        ({"label_set": "colors"}, "unknown_label_set", "there are: colours"),
        ({"label_set": "c" * 10_001}, "unknown_label_set", f"no label set '{'c' * 79} in this"),
        ({"names": ["a"], "top_k": 0}, "invalid_argument", "top_k is 0; allowed: whole numbers"),
        ({"names": ["a"], "alpha": float("nan")}, "invalid_argument", "alpha is nan"),
        ({"names": list(map(str, range(20_001)))}, "invalid_argument", "20001 prompts"),
    ],
)
def test_what_is_refused_before_anything_is_encoded(
    local: Local, options: dict[str, Any], code: str, message: str
) -> None:
    with pytest.raises(TaskError) as error:
        complete(ask(local.loaded, [png(0)], **options))
    assert error.value.code == code and message in error.value.message
    assert not local.calls


def column(*rows: Any, kind: Any = object) -> np.ndarray:
    return np.array(rows, kind)


def test_rows_of_a_request_may_differ_in_their_options(local: Local) -> None:
    """On the wire each row has all of them; answers are as wide as that with most labels."""
    task = TASKS["classify"]
    inputs = {
        "image": column([png(0)], [png(1)], [png(2)], [png(3)]),
        "labels": column([b"x", b"y", b"z"], [b"x", b"y", b"z"], [b"a", b"b", b"c"], [b"a"] * 3),
        "top_k": column([2], [2], [3], [1], kind=np.int32),
    }
    inputs["labels"][3] = [b"d", b"e", b"f"]
    task.check("classify", forms(inputs), 64)
    requests = task.read(local.loaded, inputs, lambda name: True)
    assert [len(one.images) for one in requests] == [2, 1, 1]
    run = task.make(local.loaded, lambda: [])
    outputs = task.write(together([run(one, None) for one in requests]))
    assert outputs["label"].shape == outputs["score"].shape == (4, 3)
    for row, count in enumerate((2, 2, 3, 1)):
        names = [one.decode() for one in inputs["labels"][row]]
        [alone] = complete(ask(local.loaded, [png(row)], names, top_k=count))
        wide = [*alone.labels, *[""] * (3 - count)]
        assert [one.decode() for one in outputs["label"][row]] == wide
        np.testing.assert_allclose(outputs["score"][row, :count], alone.scores, rtol=1e-5)
        assert not outputs["score"][row, count:].any()


def test_prompts_are_counted_over_all_rows_of_a_request(local: Local) -> None:
    def read(lists: list[list[str]]) -> list[Any]:
        rows = [[name.encode() for name in names] for names in lists]
        inputs = {"image": column(*[[png(0)]] * len(lists)), "labels": column(*rows)}
        return TASKS["classify"].read(local.loaded, inputs, lambda name: True)

    lists = [[f"{row} {index}" for index in range(7_000)] for row in range(3)]
    with pytest.raises(TaskError, match=r"\[invalid_argument\] 21000 prompts"):
        read(lists)
    # A list that some rows have counts once.
    assert len(read([lists[0], lists[1], lists[0], lists[0], lists[1]])) == 4
