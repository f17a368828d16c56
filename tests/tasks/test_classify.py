"""The tasks in this process: scores against the formula, and errors that stay with their
request.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import threading
import weakref
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_serve.contract import preprocess
from radapter_serve.contract.preprocess import Preprocess, decode_into
from radapter_serve.release.release import Release
from radapter_serve.tasks.classify import Classify, ClassifyRequest, EmbedImages
from tests.helpers.small_models import release
from tests.helpers.small_release import LABELS, SIZE, WIDTH, png


def answers(outcomes):
    return [outcome.unwrap() for outcome in outcomes]


def failures(outcomes):
    """The errors, None where there is an answer."""
    return [outcome.error for outcome in outcomes]


def test_embed_images(local):
    requests = [[png(0)], [png(1), png(2, 90, 16)], [png(3, kind="JPEG")]]
    embeds = answers(local.embed_images(requests))
    assert [array.shape for array in embeds] == [(1, WIDTH), (2, WIDTH), (1, WIDTH)]
    assert local.calls == [(4, SIZE, SIZE, 3)]
    for request, rows in zip(requests, embeds, strict=True):
        for data, row in zip(request, rows, strict=True):
            pixels = Preprocess((SIZE, SIZE))(Image.open(io.BytesIO(data)))
            np.testing.assert_allclose(row, local.encode_images(pixels[None])[0], atol=1e-6)
            assert np.linalg.norm(row) == pytest.approx(1)


def test_a_bad_image_fails_its_own_request_only(local):
    good = png(0)
    bad = png(1)[:60]
    [alone] = answers(local.embed_images([[good]]))
    results = local.embed_images([[bad], [good], [good, bad], [good]])
    assert [error and error.code for error in failures(results)] == ["invalid_image", None] * 2
    np.testing.assert_allclose(results[1].unwrap(), alone, atol=1e-6)
    np.testing.assert_allclose(results[3].unwrap(), alone, atol=1e-6)
    local.calls.clear()
    assert local.embed_images([[bad]])[0].error
    assert not local.calls


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
def test_many_images_are_encoded_in_parts(local, repository, counts, max_batch_size, expected):
    facts = dataclasses.replace(
        Release.load(repository / "classify" / "2"), max_batch_size=max_batch_size
    )
    embed = EmbedImages(facts, local.encode_images)
    images = [png(number) for number in range(sum(counts))]
    ends = list(itertools.accumulate(counts))
    requests = [images[end - count : end] for count, end in zip(counts, ends, strict=True)]
    found = np.concatenate(answers(embed(requests)))
    assert [shape[0] for shape in local.calls] == expected
    for image, row in zip(images, found, strict=True):
        [[alone]] = answers(embed([[image]]))
        np.testing.assert_allclose(row, alone, atol=1e-6)
    embed.close()


def test_a_bad_image_in_a_late_part_fails_its_own_request_only(local):
    good = [png(number) for number in range(40)]
    results = local.embed_images([good[:20], [*good[20:], b"nonsense"], good[:1]])
    assert "image 21 of 21" in str(results[1].error)
    expected = np.concatenate(answers(local.embed_images([[image] for image in good[:20]])))
    np.testing.assert_allclose(results[0].unwrap(), expected, atol=1e-6)
    np.testing.assert_allclose(results[2].unwrap(), expected[:1], atol=1e-6)


def test_images_are_decoded_while_others_are_encoded(local, repository, monkeypatch):
    late = threading.Event()
    images = [png(number) for number in range(32)]
    waited = []

    def decode(data, *others):
        if data.data == images[-1]:
            late.set()
        decode_into(data, *others)

    def encode(pixels):
        waited.append(late.wait(10))
        return local.encode_images(pixels)

    monkeypatch.setattr("radapter_serve.tasks.classify.decode_into", decode)
    embed = EmbedImages(Release.load(repository / "classify" / "2"), encode)
    assert answers(embed([images]))[0].shape == (32, WIDTH)
    assert waited == [True, True]
    embed.close()


def release_of(repository) -> Release:
    return Release.load(repository / "classify" / "2")


def test_the_headers_of_all_images_are_read_before_the_first_is_decoded(local, monkeypatch):
    monkeypatch.setattr("radapter_serve.contract.preprocess.MAX_REQUEST_PIXELS", 4600)
    seen: list[bytes] = []
    monkeypatch.setattr(
        "radapter_serve.tasks.classify.decode_into", lambda file, *_: seen.append(file.data)
    )
    images = [png(seed) for seed in range(8)]  # 600 pixels each
    broken = [images[0], b"nonsense"]
    thin = [images[0], png(0, 4000, 1)]  # 16 x 64,000 pixels when it is resized
    monkeypatch.setattr("radapter_serve.contract.preprocess.LARGE_PIXELS", 1_000_000)
    found = local.embed_images([images, broken, thin, images[:3]])
    assert [one.error and one.error.code for one in found] == [
        "image_too_large",
        "invalid_image",
        "image_too_large",
        None,
    ]
    assert "have 4800 pixels together; at most 4600" in str(found[0].error)
    assert "image of 4000 x 1, resized," in str(found[2].error)
    assert sorted(seen) == sorted(images[:3])


@pytest.mark.parametrize("threads", [1, 2])
def test_no_more_images_are_decoded_when_the_caller_has_left(
    local, repository, monkeypatch, threads
):
    decoded = []
    gone = threading.Event()
    load = preprocess._loaded

    def note(*args):
        decoded.append(args)
        gone.set()
        return load(*args)

    monkeypatch.setattr(preprocess, "_loaded", note)
    embed = EmbedImages(release_of(repository), local.encode_images, threads=threads)
    images = [png(seed) for seed in range(20)]
    left, stayed = embed([images, [png(99)]], cancelled=[gone.is_set, lambda: False])
    assert left.error is not None
    assert left.error.code == "cancelled"
    assert stayed.unwrap().shape == (1, WIDTH)
    assert len(decoded) <= threads + 1
    embed.close()


def test_threads_are_for_small_images_of_all_callers(local, repository, monkeypatch):
    """No thread waits for the turn of a large image, and those who wait have turns."""
    monkeypatch.setattr(preprocess, "LARGE_MEMORY", 8 * 700)
    monkeypatch.setattr(preprocess, "POLL_SECONDS", 0.01)
    embed = EmbedImages(release_of(repository), local.encode_images, threads=2)
    small = [png(seed) for seed in range(3)]
    large = [png(seed, 30, 30) for seed in range(6)]
    waits = threading.Event()
    found = []

    def stays() -> bool:
        waits.set()
        return False

    def ask() -> None:
        found.append(embed([large], cancelled=[stays])[0])

    thread = threading.Thread(target=ask, daemon=True)
    with preprocess.turn(preprocess.read_header(large[0])):
        thread.start()
        assert waits.wait(60)
        quick = run_in_time(lambda: embed([small])[0].unwrap())
        assert quick.shape == (3, WIDTH)
        assert not found
    thread.join(60)
    assert found[0].unwrap().shape == (6, WIDTH)
    embed.close()


def test_images_of_several_callers_are_decoded_in_turns(local, repository, monkeypatch):
    many = [png(seed) for seed in range(12)]
    few = [png(100), png(101)]
    order: list[bytes] = []
    free = threading.Semaphore(0)
    began = threading.Semaphore(0)

    def decode(file, *others):
        order.append(file.data)
        began.release()
        assert free.acquire(timeout=60)
        decode_into(file, *others)

    monkeypatch.setattr("radapter_serve.tasks.classify.decode_into", decode)
    embed = EmbedImages(release_of(repository), local.encode_images, threads=2)
    submitted = threading.Semaphore(0)
    submit = embed._submit

    def note(work) -> None:
        submit(work)
        submitted.release()

    monkeypatch.setattr(embed, "_submit", note)
    threads = [
        threading.Thread(target=embed, args=[[images]], daemon=True) for images in (many, few)
    ]
    for thread in threads:
        thread.start()
        for _ in range(2):
            assert submitted.acquire(timeout=60)
    for _ in range(2):  # of the first caller both threads decode one
        assert began.acquire(timeout=60)
    free.release(14)
    for thread in threads:
        thread.join(60)
    # Behind the two that were begun, and at most one more that its thread took on at once.
    assert {order.index(image) for image in few} <= {2, 3, 4}
    assert len(order) == 14
    embed.close()


def test_what_is_left_to_decode_when_a_release_is_closed_is_decoded(local, repository, monkeypatch):
    embed = EmbedImages(release_of(repository), local.encode_images, threads=2)
    images = [png(seed) for seed in range(8)]
    expected = embed([images])[0].unwrap()
    closing: list[threading.Thread] = []

    def decode(file, *others):
        if not closing:
            closing.append(threading.Thread(target=embed.close, daemon=True))
            closing[0].start()
        decode_into(file, *others)

    monkeypatch.setattr("radapter_serve.tasks.classify.decode_into", decode)
    found = run_in_time(lambda: embed([images])[0].unwrap())
    np.testing.assert_array_equal(found, expected)
    closing[0].join(60)


def run_in_time(work):
    """What `work` gives, or None where it hangs."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(60)
    return found[0] if found else None


def test_an_error_lets_go_of_its_image(local, monkeypatch):
    opened: list[weakref.ref] = []
    real = Image.open

    def note(*args, **options):
        image = real(*args, **options)
        opened.append(weakref.ref(image))
        return image

    monkeypatch.setattr(Image, "open", note)
    [found] = local.embed_images([[png(0)[:-40]]])
    assert found.error.code == "invalid_image"
    assert len(opened) == 2  # for its header and for its pixels
    assert [one() for one in opened] == [None, None]


def test_what_is_wrong_is_said_before_labels_are_embedded(local):
    labels = [[b"new one", b"new two"]]
    cases = [
        (ClassifyRequest([b"nonsense"], labels), "invalid_image"),
        (
            ClassifyRequest([png(0)], labels, examples=[[png(1)]], example_labels=[[2]]),
            "there are labels 0 to 1",
        ),
        (
            ClassifyRequest([png(0)], labels, examples=[[b"x"]], example_labels=[[1]]),
            "example 1 of 1: 1 bytes are not an image",
        ),
        (ClassifyRequest([png(0)] * 2, [*labels, [b"new", b" "]]), "label 2 of 2 is empty"),
    ]
    for request, message in cases:
        [found] = local.classify([request])
        assert message in str(found.error)
    assert not local.calls


def test_embed_texts(local):
    results = local.embed_texts(
        [[b"a cat", b"a dog"], [b" "], [b"a dog"], [b"\xff"], ["Ölkäfer".encode()]]
    )
    assert [error is None for error in failures(results)] == [True, False, True, False, True]
    assert "text 1 of 1 is empty" in str(results[1].error)
    assert "UTF-8" in str(results[3].error)
    np.testing.assert_array_equal(results[0].unwrap()[1], results[2].unwrap()[0])
    assert local.calls == [(3, max(shape[1] for shape in local.calls))]


def test_too_long_a_text_fails_its_own_request_only(local):
    results = local.embed_texts([[b"a cat"], [b"x" * 10_001], [b"x" * 10_000]])
    assert [error is None for error in failures(results)] == [True, False, True]
    assert "a text of 10001 characters" in str(results[1].error)


def test_prompts_are_counted_over_all_rows_of_a_request(local):
    lists = [[f"{row} {index}".encode() for index in range(7_000)] for row in range(3)]
    [error] = failures(local.classify([ClassifyRequest([png(0)] * 3, lists)]))
    assert "21000 prompts" in str(error)
    assert not local.calls
    [error] = failures(local.classify([ClassifyRequest([png(0)], [[b"a" * 1_001]])]))
    assert "a label of 1001 characters" in str(error)
    [classes] = answers(local.classify([ClassifyRequest([png(0)] * 50, [lists[0][:500]] * 50)]))
    assert len(classes.labels) == 50


def expected(local, image: bytes, labels: list[str], templates: list[str]) -> dict[str, float]:
    image_embed = local.embed_images([[image]])[0].unwrap()[0]
    label_set = local.embed_labels(labels, templates)
    logits = 10 * label_set.embeds.astype(np.float64) @ image_embed
    exponents = np.exp(logits)
    return dict(zip(label_set.labels, exponents / exponents.sum(), strict=True))


def test_classify_is_the_softmax_of_scaled_cosines(local):
    image = png(5)
    labels = [b"cat", b"dog", b"bird, fowl", b"fish", b"a man", b"tree"]
    scores = expected(local, image, [label.decode() for label in labels], ["a photo of a {}."])
    [classes] = answers(local.classify([ClassifyRequest([image], [labels])]))
    best = sorted(scores, key=lambda label: scores[label], reverse=True)
    assert classes.labels.tolist() == [best[:5]]
    np.testing.assert_allclose(classes.scores[0], [scores[label] for label in best[:5]], rtol=1e-5)
    [classes] = answers(local.classify([ClassifyRequest([image], [labels], top_k=[100])]))
    assert classes.labels.tolist() == [best]
    assert classes.scores.sum() == pytest.approx(1)


def test_sigmoid_where_the_model_has_a_bias(local):
    sigmoid = release(alpha=0.5, templates=["a {}"], logit_scale=10.0, logit_bias=-3.0)
    classify = Classify(sigmoid, local.embed_images, local.embed_labels, {})
    [classes] = answers(classify([ClassifyRequest([png(5)], [[b"cat", b"dog"]])]))
    label_set = local.embed_labels(["cat", "dog"], ["a {}"])
    image = local.embed_images([[png(5)]])[0].unwrap()[0]
    expected = sorted(1 / (1 + np.exp(-(10 * label_set.embeds @ image - 3))), reverse=True)
    np.testing.assert_allclose(classes.scores[0], expected, rtol=1e-5)


def test_label_sets_may_come_as_an_array(local):
    """Triton gives the names of a request's images so."""
    names: Any = np.array([b"colours", b"colours"], object)
    images = [png(5), png(7)]
    [found] = answers(local.classify([ClassifyRequest(images, label_set=names, top_k=[2])]))
    [wanted] = answers(local.classify([ClassifyRequest(images, label_set=list(names), top_k=[2])]))
    assert found.labels.tolist() == wanted.labels.tolist()
    np.testing.assert_array_equal(found.scores, wanted.scores)


def test_requests_of_all_kinds_share_a_batch(local):
    good = png(7)
    bad = b"nonsense"
    requests = [
        ClassifyRequest([good], [[b"cat", b"dog"]]),
        ClassifyRequest([bad], [[b"cat", b"dog"]]),
        ClassifyRequest([good], label_set=[b"colours"], top_k=[2]),
        ClassifyRequest([good], [[b"cat"]], templates=[[b"one {}", b"two {}"]]),
        ClassifyRequest([good, png(8)], [[b"x", b"y", b"z"], [b"y", b"z", b"q"]]),
        ClassifyRequest([good], label_set=[b"colors"]),
        ClassifyRequest([good]),
        ClassifyRequest([good], [[b"cat"]], label_set=[b"colours"]),
        ClassifyRequest([good], [[b"cat"]], top_k=[0]),
        ClassifyRequest([good], [[b"cat"]], templates=[[b"no place"]]),
        ClassifyRequest([good], [[]]),
        ClassifyRequest([good], [[b"cat"]], templates=[[]]),
        ClassifyRequest([good], [[b"cat"]], alpha=[float("nan")]),
    ]
    results = local.classify(requests)
    alone = [local.classify([request])[0] for request in requests]
    for together, single in zip(results, alone, strict=True):
        assert str(together.error) == str(single.error)
        if single.error is None:
            assert together.unwrap().labels.tolist() == single.unwrap().labels.tolist()
            np.testing.assert_allclose(together.unwrap().scores, single.unwrap().scores, rtol=1e-5)
    codes = [error.code if error else "" for error in failures(results)]
    assert codes == [
        "",
        "invalid_image",
        "",
        "",
        "",
        "unknown_label_set",
        "no_labels",
        *["invalid_argument"] * 3,
        "no_labels",
        "invalid_argument",
        "invalid_argument",
    ]
    assert results[5].error.message.endswith("there are: colours")
    assert set(results[2].unwrap().labels[0]) < {label.split(",")[0] for label in LABELS}
    assert results[4].unwrap().labels.shape == (2, 3)


def test_ten_thousand_labels(local):
    labels = [f"label {index}".encode() for index in range(10_000)]
    [classes] = answers(local.classify([ClassifyRequest([png(0)], [labels])]))
    assert classes.labels.shape == (1, 5)
    assert (np.diff(classes.scores[0]) <= 0).all()
