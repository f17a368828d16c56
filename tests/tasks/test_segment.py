"""The task `segment` in this process: what a request may hold, and whose labels it gets."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.contract.preprocess import Preprocess, decode
from radapter_serve.tasks.segment import Segment, SegmentRequest
from radapter_serve.tasks.segment_options import SegmentOptions
from tests.helpers.segmenting import Segmenter
from tests.helpers.small_release import LABELS, Local, png, png_header

CATS = [b"cat, kitty", b"dog", b"bird"]


def segmenter(local: Local) -> Segmenter:
    """Of the same encoders, without the task."""
    return Segmenter.of(
        local.encode_patches, local.encode_images, Preprocess((16, 16)), MaskCrop(), 10.0, 64
    )


def test_labels_of_the_request(local):
    image = Image.open(io.BytesIO(png(3)))
    label_set = local.embed_labels(["cat, kitty", "dog", "bird"], ["a photo of a {}."])
    expected = segmenter(local).dense(image, label_set.embeds)
    found = local.segment(SegmentRequest(png(3), CATS))
    assert found.labels == ("cat", "dog", "bird")
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.scores, expected.scores)

    label_set = local.embed_labels(["cat, kitty", "dog", "bird"], ["one {}", "two {}"])
    options = SegmentOptions(20, 5, 2, 0.5)
    expected = segmenter(local).dense(image, label_set.embeds, options)
    given = {"short_side": 20, "stride": 5, "refine": 2, "threshold": 0.5}
    found = local.segment(
        SegmentRequest(png(3), CATS, templates=[b"one {}", b"two {}"], options=given)
    )
    assert found.labels == ("cat", "dog", "bird", "background")
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_a_label_set_and_proposals(local):
    masks = np.zeros((2, 20, 30), np.uint8)
    masks[0, :12] = 255
    masks[1, 8:] = 180
    scores = np.random.default_rng(0).random((2, len(LABELS)), np.float32)
    label_set = local.embed_labels(LABELS, ["a {}"])
    expected = segmenter(local).from_proposals(
        Image.open(io.BytesIO(png(3))),
        label_set.embeds,
        masks,
        scores,
        SegmentOptions(proposal_weight=0.4),
    )
    request = SegmentRequest(png(3), label_set=b"colours", proposals=masks, proposal_scores=scores)
    request.options = {"proposal_weight": 0.4}
    found = local.segment(request)
    assert found.labels == ("red", "green", "blue", "a striped thing", "background")
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.scores, expected.scores)


PROPOSALS: dict[str, Any] = {"proposals": np.full((1, 20, 30), 255, np.uint8)}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, r"\[no_labels\] .*label_set of this release: colours"),
        ({"labels": []}, r"\[no_labels\] "),
        ({"labels": [b"a", b" "]}, r"\[invalid_argument\] label 2 of 2 is empty"),
        ({"labels": [b"\xff"]}, r"\[invalid_argument\] a text is not UTF-8"),
        (
            {"labels": CATS, "templates": [b"no place"]},
            r"\[invalid_argument\] the template 'no place' has no {}",
        ),
        (
            {"labels": CATS, "label_set": b"colours"},
            r"\[invalid_argument\] give labels .* not both",
        ),
        ({"label_set": b"colors"}, r"\[unknown_label_set\] .*there are: colours"),
        (
            {"label_set": b"c" * 10_001},
            r"\[unknown_label_set\] no label set 'c{79} in this release",
        ),
        (
            {"labels": CATS, "options": {"stride": 17}},
            r"\[invalid_argument\] stride is 17; 1 to 16",
        ),
        ({"labels": CATS, "options": {"refine": 1000}}, r"\[invalid_argument\] refine is 1000"),
        (
            {"labels": CATS, "options": {"proposal_weight": 0.5}},
            r"proposal_weight has no effect .*send proposals",
        ),
        (
            {"labels": CATS, "proposal_scores": np.ones((1, 3))},
            r"proposal_scores has no effect .*send proposals",
        ),
        (
            {"labels": CATS, **PROPOSALS, "options": {"stride": 8}},
            r"stride has no effect here; leave it out",
        ),
        (
            {"labels": CATS, **PROPOSALS, "options": {"proposal_weight": 1}},
            r"no effect here; send proposal_scores",
        ),
    ],
)
def test_what_is_refused_before_the_image_is_looked_at(local, request_, message):
    with pytest.raises(TaskError, match=message):
        local.segment(SegmentRequest(b"nonsense", **request_))
    assert not local.calls


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"nonsense", r"\[invalid_image\] "),
        (png(0)[:70], r"\[invalid_image\] .*broken or truncated"),
        (png_header(60_000, 60_000), r"\[image_too_large\] "),
        (png(0, 4_000, 1), r"\[invalid_argument\] an image of 4000 x 1, .* takes \d+ windows"),
    ],
)
def test_images_that_are_refused(local, image, message):
    with pytest.raises(TaskError, match=message):
        local.segment(SegmentRequest(image, CATS))


def test_a_release_without_patch_encoder(repository):
    local = Local(repository, 1)
    with pytest.raises(
        TaskError, match=r"\[no_patch_encoder\] .*--dense naclip, or send proposals"
    ):
        local.segment(SegmentRequest(png(0), CATS))
    assert not local.calls
    assert local.segment(SegmentRequest(png(0), CATS, **PROPOSALS)).mask.shape == (20, 30)


def test_a_16_bit_image_gets_an_answer_or_a_reason(local):
    file = io.BytesIO()
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(file, "PNG")
    try:
        assert local.segment(SegmentRequest(file.getvalue(), CATS)).mask.shape == (20, 30)
    except TaskError as error:
        assert error.code == "invalid_image"


def test_a_request_that_asks_for_too_much_work_is_refused(local):
    def segment(max_work: float, **options: int) -> None:
        encoders = (local.encode_images, local.encode_patches, local.embed_labels)
        task = Segment(local.release, *encoders, {}, max_work=max_work)
        task(SegmentRequest(png(3), CATS, options=options))

    # 30 x 20 pixels and 3 labels; in a step of refinement 3.5 times as much for the working image,
    # 36 x 24.
    segment(1800)
    with pytest.raises(
        TaskError, match=r"3 labels and 1 steps of refinement .* 30 x 20 are 6.0 times the work"
    ):
        segment(1800, refine=1)
    with pytest.raises(
        TaskError, match=r"\[invalid_argument\] 3 labels and 0 steps .* send a smaller image"
    ):
        segment(1799)


def sized(*shape: int) -> dict[str, Any]:
    return {"proposals": np.full(shape, 255, np.uint8)}


@pytest.mark.parametrize(
    ("given", "limits", "message"),
    [
        ({"labels": [b"%d" % n for n in range(5_000)], "options": {"refine": 100}}, {}, "the work"),
        ({}, {"MAX_WINDOWS": 7}, r"an image of 30 x 20, resized to 36 x 24, takes 8 windows"),
        ({}, {"MAX_VALUES": 383}, "3 labels are too many .* at most 2 are allowed at a smaller"),
        ({"options": {"refine": 1}}, {"MAX_VALUES": 2591}, "at most 2 are allowed to refine"),
        (sized(1, 20, 31), {}, r"proposals are uint8 \[1, 20, 31\]; for this image: .*20, 30\]"),
        ({"proposals": np.full((2, 20, 30), 102, np.uint8)}, {}, "all 2 proposals are empty"),
        ({**PROPOSALS, "proposal_scores": np.ones((1, 2), np.float32)}, {}, r"\[1, 3\] is needed"),
        (
            {**sized(1, 1, 9_000), "image": png(0, 9_000, 1)},
            {},
            "the square crop of a mask has 9000 x 9000 pixels",
        ),
        ({"image": b"nonsense"}, {}, r"\[invalid_image\]"),
        ({"image": png(0, 100_000, 1)}, {}, r"\[image_too_large\]"),
    ],
)
def test_what_asks_for_too_much_is_refused_before_anything_is_done(
    local, given, limits, message, monkeypatch
):
    for name, value in limits.items():
        monkeypatch.setattr(f"radapter_serve.tasks.dense.{name}", value)
    monkeypatch.setattr(
        "radapter_serve.tasks.segment.decode", lambda *_, **__: pytest.fail("decoded")
    )
    encoders = (local.encode_images, local.encode_patches, local.embed_labels)
    task = Segment(local.release, *encoders, {}, max_work=1_000_000_000)
    with pytest.raises(TaskError, match=message):
        task(SegmentRequest(**{"image": png(3), "labels": CATS, **given}))
    assert not local.calls
    if limits:  # and at the limit it is not
        for name, value in limits.items():
            monkeypatch.setattr(f"radapter_serve.tasks.dense.{name}", value + 1)
        monkeypatch.setattr("radapter_serve.tasks.segment.decode", decode)
        task(SegmentRequest(**{"image": png(3), "labels": CATS, **given}))


def test_proposals_fit_a_photo_that_is_turned(local):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.open(io.BytesIO(png(3))).save(file, "JPEG", exif=exif)
    found = local.segment(SegmentRequest(file.getvalue(), CATS, **sized(1, 30, 20)))
    assert found.mask.shape == (30, 20)
    with pytest.raises(TaskError, match=r"proposals are uint8 \[1, 20, 30\]; .* 30, 20\]"):
        local.segment(SegmentRequest(file.getvalue(), CATS, **sized(1, 20, 30)))
