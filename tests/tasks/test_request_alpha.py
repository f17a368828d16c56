"""α of requests, without Triton: rows of an encoder that has it as an input, labels by α, indexes
by α.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from radapter_serve.tasks.examples import MAX_ENCODED, ByExample

from radapter_serve.contract.alpha import RequestAlpha, at
from radapter_serve.contract.errors import TaskError
from radapter_serve.encoders.labels import Examples, LabelEmbedder, LabelSet
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.index.build import add, build
from radapter_serve.index.index import open_index
from radapter_serve.tasks.classify import Classify, ClassifyRequest, EmbedImages, EmbedTexts
from radapter_serve.tasks.query import Query
from radapter_serve.tasks.retrieve import Retrieve, RetrieveRequest
from radapter_serve.tasks.segment import Segment, SegmentRequest
from tests.helpers.small_models import release
from tests.helpers.small_release import SIZE, png

SHOWN = tuple(png(seed, 4, 4) for seed in range(50, 70))
FIXED = RequestAlpha(0.3)
DYNAMIC = RequestAlpha(0.3, dynamic=True)


def test_rows() -> None:
    dynamic = DYNAMIC
    per_row = np.array([[0], [1]], np.float32)
    for asked, rows in ((None, [[np.float32(0.3)]] * 2), (0.5, [[0.5]] * 2), (per_row, [[0], [1]])):
        found = dynamic(asked, 2)
        assert found is not None
        np.testing.assert_array_equal(found, rows)
    assert (dynamic.one(1), dynamic.one(None)) == (1.0, float(np.float32(0.3)))
    for value in (None, 0.3, np.float32(0.3), np.full((2, 1), 0.3, np.float32)):
        assert FIXED(value, 2) is None


@pytest.mark.parametrize("alphas", [FIXED, DYNAMIC])
@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan"), float("inf"), np.array([[0.3], [2]])])
def test_what_is_no_alpha(alphas: RequestAlpha, value: Any) -> None:
    with pytest.raises(TaskError, match=r"^\[invalid_argument\] alpha is .*; allowed: 0 .* to 1"):
        alphas(value, 2)


def test_another_than_was_exported() -> None:
    with pytest.raises(
        TaskError,
        match=r"alpha is 0.5, but .* exported at alpha 0.3; radapter-export --alpha dynamic",
    ):
        FIXED([[0.3], [0.5]], 2)
    with pytest.raises(RAdapterError, match=r"^alpha is 0.5, but"):
        release(alpha=0.3).at(0.5)


@pytest.fixture
def tasks(local: Any) -> Callable[..., Any]:
    """Makes a task of the small release as if α were an input: an encoder turns its embeddings
    around by α.
    """
    calls: list[list[float]] = []

    def turned(encode: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def call(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
            assert alpha.shape == (len(values), 1) and alpha.dtype == np.float32
            calls.append(alpha.ravel().tolist())
            embeds = encode(values)
            turn = alpha.reshape(-1, *[1] * (embeds.ndim - 1))
            mixed = (1 - turn) * embeds + turn * np.roll(embeds, 1, -1)
            return mixed / np.linalg.norm(mixed, axis=-1, keepdims=True)

        return call

    facts = release(
        alpha=0.3,
        dynamic_alpha=True,
        preprocess={
            "size": SIZE,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 0,
        },
        logit_scale=10.0,
    )
    images = turned(local.encode_images)
    tokens = turned(local.encode_tokens)
    embed_images = EmbedImages(facts, images)
    embed_labels = LabelEmbedder(local.tokenizer, tokens)
    own = facts.request_alpha.one(None)
    sets = {"colours": embed_labels(["red, scarlet", "blue"], ["a {}"], alpha=own)}
    sets["shown"] = replace(sets["colours"], examples=Examples(SHOWN, (0,) * len(SHOWN)))

    def make(kind: str) -> Any:
        calls.clear()
        made = {
            "images": embed_images,
            "texts": EmbedTexts(facts, local.tokenizer, tokens),
            "classify": Classify(facts, embed_images, embed_labels, sets),
            "segment": Segment(facts, images, turned(local.encode_patches), embed_labels, sets),
            "labels": embed_labels,
            "calls": calls,
        }
        return made[kind]

    return make


@pytest.mark.parametrize(
    ("kind", "one", "two"), [("images", png(0), png(1)), ("texts", b"a cat", b"a dog")]
)
def test_requests_of_several_alphas_share_a_batch(
    tasks: Any, kind: str, one: bytes, two: bytes
) -> None:
    embed = tasks(kind)
    alone = {
        a: embed([[one, two]], [np.full((2, 1), a, np.float32)])[0].unwrap() for a in (0, 0.3, 1)
    }
    assert np.abs(alone[0] - alone[1]).max() > 0.01
    calls = tasks("calls")
    given = [np.array([[0], [1]]), None, np.array([[2.0]]), np.array([[1.0]])]
    found = embed([[one, two], [two], [one], [two]], given)
    assert len(calls) == 1
    np.testing.assert_allclose(found[0].unwrap(), [alone[0][0], alone[1][1]], atol=1e-6)
    np.testing.assert_allclose(found[1].unwrap(), alone[0.3][1:], atol=1e-6)
    assert "alpha is 2" in str(found[2].error)
    np.testing.assert_allclose(found[3].unwrap(), alone[1][1:], atol=1e-6)


# Examples of a request, and of a label set of the release
IN_REQUEST = {
    "labels": [b"red, scarlet", b"blue"],
    "examples": list(SHOWN),
    "example_labels": [0] * len(SHOWN),
}
BOTH_WAYS = pytest.mark.parametrize("options", [IN_REQUEST, {"label_set": b"shown"}])


def by_example(
    options: dict[str, Any], alphas: list[float], cancelled: Callable[[], bool] | None = None
) -> ClassifyRequest:
    rows = {name: [value] * len(alphas) for name, value in options.items()}
    alpha = np.array(alphas, np.float32)[:, None]
    images = [png(seed) for seed in range(len(alphas))]
    return ClassifyRequest(images, alpha=alpha, cancelled=cancelled, **rows)


@BOTH_WAYS
def test_examples_are_encoded_once_for_each_alpha(
    tasks: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    classify = tasks("classify")
    calls = tasks("calls")
    mixed: list[Any] = []
    mix = ByExample.__call__

    def counted(self: ByExample, *given: Any) -> LabelSet:
        mixed.append(given)
        return mix(self, *given)

    monkeypatch.setattr(ByExample, "__call__", counted)
    alphas = [0.5, 0.75] * 4
    together = classify([by_example(options, alphas)])[0].unwrap()
    assert len(mixed) == 2
    # At each α three texts and the examples; then the images.
    assert sum(map(len, calls)) == 2 * (3 + len(SHOWN)) + len(alphas)
    alone = classify([by_example(options, alphas[:1])])[0].unwrap()
    np.testing.assert_allclose(together.scores[0], alone.scores[0], rtol=1e-5)


@BOTH_WAYS
def test_examples_at_too_many_alphas_are_refused(tasks: Any, options: dict[str, Any]) -> None:
    classify = tasks("classify")
    calls = tasks("calls")
    count = MAX_ENCODED // len(SHOWN) + 1
    alphas = [0.5 + number / 100 for number in range(count)]
    message = f"examples at {count} α are {count * len(SHOWN)} images .* at most {MAX_ENCODED} are"
    with pytest.raises(TaskError, match=message):
        classify([by_example(options, alphas)])[0].unwrap()
    assert not calls
    classify([by_example(options, alphas[1:])])[0].unwrap()


@BOTH_WAYS
def test_who_gives_up_gets_no_more_examples(tasks: Any, options: dict[str, Any]) -> None:
    classify = tasks("classify")
    calls = tasks("calls")
    encoded = 16  # of 20 images, one part

    def gone() -> bool:
        return any(len(call) == encoded for call in calls)

    with pytest.raises(TaskError, match="gave up"):
        classify([by_example(options, [0.5], gone)])[0].unwrap()
    assert [len(call) for call in calls] == [3, encoded]  # the texts, and one part
    # What it had is kept.
    calls.clear()
    classify([by_example(options, [0.5])])[0].unwrap()
    assert [len(call) for call in calls] == [len(SHOWN) - encoded, 1]


def test_labels_are_embedded_once_for_each_alpha(tasks: Any) -> None:
    labels = tasks("labels")
    calls = tasks("calls")
    low, high = (labels(["cat", "dog"], ["a {}"], alpha=alpha) for alpha in (0.0, 1.0))
    assert calls == [[0, 0], [1, 1]]
    assert np.abs(low.embeds - high.embeds).max() > 0.01
    assert labels(["cat", "dog"], ["a {}"], alpha=0.0) is low
    np.testing.assert_array_equal(labels(["dog"], ["a {}"], alpha=1.0).embeds[0], high.embeds[1])
    assert len(calls) == 2


def test_classify_takes_images_and_labels_at_the_alpha_of_the_row(tasks: Any) -> None:
    classify = tasks("classify")
    calls = tasks("calls")
    alpha = np.array([[0], [1]], np.float32)
    mixed = classify([ClassifyRequest([png(0), png(0)], label_set=[b"colours"] * 2, alpha=alpha)])[
        0
    ].unwrap()
    for row, a in enumerate((0, 1)):
        [alone] = classify(
            [ClassifyRequest([png(0)], label_set=[b"colours"], alpha=np.array([[a]], np.float32))]
        )
        [named] = classify(
            [
                ClassifyRequest(
                    [png(0)], [[b"red, scarlet", b"blue"]], templates=[[b"a {}"]], alpha=[[a]]
                )
            ]
        )
        for other in (alone.unwrap(), named.unwrap()):
            assert other.labels[0].tolist() == mixed.labels[row].tolist()
            np.testing.assert_allclose(other.scores[0], mixed.scores[row], rtol=1e-5)
        image = tasks("images")([[png(0)]], [[[a]]])[0].unwrap()[0]
        texts = tasks("labels")
        logits = 10 * texts(["red, scarlet", "blue"], ["a {}"], alpha=float(a)).embeds @ image
        expected = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(mixed.scores[row], np.sort(expected)[::-1], rtol=1e-5)
    calls.clear()
    classify([ClassifyRequest([png(0)], label_set=[b"colours"])])  # at its own: as it was exported
    assert calls == [[pytest.approx(0.3)]]
    [error] = classify([ClassifyRequest([png(0)], label_set=[b"colours"], alpha=[[float("nan")]])])
    assert error.error.code == "invalid_argument"


def test_segment_takes_every_encoder_at_one_alpha(tasks: Any) -> None:
    segment = tasks("segment")
    calls = tasks("calls")
    masks = np.full((1, 20, 30), 255, np.uint8)
    found = []
    for alpha in (0.0, 0.5):
        calls.clear()
        found.append(
            segment(
                SegmentRequest(png(3), label_set=b"colours", alpha=np.array([alpha], np.float32))
            )
        )
        segment(SegmentRequest(png(3), [b"a", b"b"], proposals=masks, alpha=[alpha]))
        assert {one for call in calls for one in call} == {alpha} and len(calls) >= 3
    assert np.abs(found[0].scores - found[1].scores).max() > 1e-4
    with pytest.raises(TaskError, match="alpha is 3"):
        segment(SegmentRequest(png(3), [b"a"], alpha=[3.0]))


def test_at_binds_or_leaves_an_encoder() -> None:
    def encode(values: np.ndarray, alpha: np.ndarray | None = None) -> Any:
        return alpha

    assert at(encode, None) is encode
    np.testing.assert_array_equal(at(encode, 0.25)(np.zeros(3)), np.full((3, 1), 0.25, np.float32))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30), Image.Resampling.NEAREST).save(
            folder / f"{number}.png"
        )
    return folder


def test_a_release_at_an_alpha_embeds_what_the_fold_embeds(
    dynamic_tiny_clip: Path, exported_tiny_clip: Path, photos: Path
) -> None:
    release = load_release(dynamic_tiny_clip)
    pixels = [release.prepare(path.read_bytes()) for path in sorted(photos.iterdir())]
    for version, alpha in ((1, 0.3), (2, 0.8)):
        fixed = load_release(f"{exported_tiny_clip / 'model_repository'}@{version}")
        release.set_alpha(alpha)
        np.testing.assert_allclose(
            release.encode_images(pixels), fixed.encode_images(pixels), atol=3e-6
        )
        np.testing.assert_allclose(
            release.embed_texts(["a cat"]), fixed.embed_texts(["a cat"]), atol=3e-6
        )
        assert release.facts.digest == fixed.facts.digest
        fixed.set_alpha(alpha)
        with pytest.raises(RAdapterError, match="--alpha dynamic"):
            fixed.set_alpha(0.5)
    with pytest.raises(RAdapterError, match="alpha is 2; allowed"):
        release.set_alpha(2)


def test_an_index_belongs_to_one_alpha(
    dynamic_tiny_clip: Path, exported_tiny_clip: Path, photos: Path, tmp_path: Path
) -> None:
    release = load_release(dynamic_tiny_clip)
    release.set_alpha(0.8)
    build(str(photos), tmp_path / "indexes" / "photos", release)
    made = open_index(tmp_path / "indexes" / "photos").facts.plan.release
    assert made.alpha == 0.8
    again = load_release(dynamic_tiny_clip)
    assert add(tmp_path / "indexes" / "photos", again).kept == 6
    assert again.facts.alpha == 0.8

    asked: list[float] = []

    def embed_text(text: bytes, alpha: np.ndarray) -> np.ndarray:
        asked.append(float(alpha[0, 0]))
        again.set_alpha(float(alpha[0, 0]))
        return again.embed_texts([text.decode()])[0]

    served = load_release(dynamic_tiny_clip)  # its own alpha is 0.5
    retrieve = Retrieve(served.facts, tmp_path / "indexes", embed_text, embed_text)
    found = retrieve(RetrieveRequest(b"photos", Query([b"a cat"])))
    assert asked == [pytest.approx(0.8)]
    fixed = load_release(f"{exported_tiny_clip / 'model_repository'}@2")
    images = fixed.encode_images(
        [fixed.prepare((photos / name).read_bytes()) for name in found.ids]
    )
    np.testing.assert_allclose(found.scores, images @ fixed.embed_texts(["a cat"])[0], atol=1e-5)
    # A release with that alpha folded in can search it, too; one with another can't.
    text = fixed.embed_texts(["a cat"])[0]
    one = Retrieve(fixed.facts, tmp_path / "indexes", lambda _: text, lambda _: text)
    assert one(RetrieveRequest(b"photos", Query([b"a cat"]))).ids.tolist() == found.ids.tolist()
    other = load_release(f"{exported_tiny_clip / 'model_repository'}@1")
    with pytest.raises(TaskError, match=r"index_mismatch.*at alpha 0.8.*this is .* at alpha 0.3"):
        Retrieve(other.facts, tmp_path / "indexes", lambda _: text, lambda _: text).index("photos")
