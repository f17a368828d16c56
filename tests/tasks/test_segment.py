"""The task `segment` in this process: what a request may hold, and whose labels it gets."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import decode
from radapter_serve.contract.preprocess import MaskCrop, Preprocess
from radapter_serve.encoders.loaded import LoadedRelease, Need, complete, encode_together
from radapter_serve.tasks import segment as module
from radapter_serve.tasks.dense import SegmentOptions
from radapter_serve.tasks.embed import Labels, embed_labels
from radapter_serve.tasks.segment import LabelledMask, SegmentRequest, segment
from tests.helpers.segmenting import Segmenter
from tests.helpers.small_release import LABELS, Local, png, together

NAMES = ["cat, kitty", "dog", "bird"]
CATS = Labels(NAMES)


def ask(loaded: LoadedRelease, image: bytes, labels: Labels = CATS, **options: Any) -> LabelledMask:
    return complete(segment(loaded, SegmentRequest(image, labels, **options)))


def segmenter(local: Local) -> Segmenter:
    """Of the same encoders, without the task."""
    return Segmenter(local.patches, local.images, Preprocess((16, 16)), MaskCrop(), 10.0, 64)


def test_labels_of_the_request(local: Local) -> None:
    image = Image.open(io.BytesIO(png(3)))
    label_set = complete(embed_labels(local.loaded, NAMES, ["a photo of a {}."]))
    expected = segmenter(local).dense(image, label_set.embeds)
    found = ask(local.loaded, png(3))
    assert found.labels == ("cat", "dog", "bird")
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.scores, expected.scores)

    templates = ["one {}", "two {}"]
    label_set = complete(embed_labels(local.loaded, NAMES, templates))
    expected = segmenter(local).dense(image, label_set.embeds, SegmentOptions(20, 5, 2, 0.5))
    given = {"short_side": 20, "stride": 5, "refine": 2, "threshold": 0.5}
    found = ask(local.loaded, png(3), Labels(NAMES, templates=templates), **given)
    assert found.labels == ("cat", "dog", "bird", "background")
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_a_label_set_and_proposals(local: Local) -> None:
    masks = np.zeros((2, 20, 30), np.uint8)
    masks[0, :12] = 255
    masks[1, 8:] = 180
    scores = np.random.default_rng(0).random((2, len(LABELS)), np.float32)
    label_set = complete(embed_labels(local.loaded, LABELS, ["a {}"]))
    expected = segmenter(local).from_proposals(
        Image.open(io.BytesIO(png(3))),
        label_set.embeds,
        masks,
        scores,
        SegmentOptions(proposal_weight=0.4),
    )
    given = {"proposals": masks, "proposal_scores": scores, "proposal_weight": 0.4}
    found = ask(local.loaded, png(3), Labels(label_set="colours"), **given)
    assert found.labels == ("red", "green", "blue", "a striped thing", "background")
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_windows_of_several_requests_are_encoded_together(local: Local) -> None:
    """And one of them that fails is refused alone."""

    def tasks() -> list[Any]:
        images = [png(3), png(0)[:-40], png(4)]
        return [segment(local.loaded, SegmentRequest(image, CATS)) for image in images]

    one, broken, two = together(tasks())
    windows = [shape for shape in local.calls if len(shape) == 4]
    assert isinstance(broken, TaskError) and broken.code == "invalid_image"
    for found, task in ((one, tasks()[0]), (two, tasks()[2])):
        alone = complete(task)
        np.testing.assert_array_equal(found.mask, alone.mask)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-6)
    # Each image has eight windows of 16 pixels.
    assert windows == [(16, 16, 16, 3)]


def test_no_more_windows_are_encoded_when_the_caller_has_left(local: Local) -> None:
    loaded = local.changed(max_batch_size=3)
    parts: list[str] = []

    def encode(needs: Sequence[Need]) -> Any:
        parts.extend(need.part for need in needs)
        return encode_together(needs)

    request = SegmentRequest(png(3), CATS)
    with pytest.raises(TaskError, match=r"\[cancelled\]"):
        complete(segment(loaded, request, lambda: parts.count("patches") == 2), encode)
    assert parts == ["tokens", "patches", "patches"]


ONES = np.ones((1, 3), np.float32)
PROPOSALS: dict[str, Any] = {"proposals": np.full((1, 20, 30), 255, np.uint8)}


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ({}, {}, r"\[no_labels\] .*label_set of this release: colours"),
        ({"names": ["a", " "]}, {}, "label 2 of 2 is empty"),
        ({"label_set": "colors"}, {}, r"\[unknown_label_set\] .*there are: colours"),
        *(
            ({"names": NAMES}, {name: value}, rf"\[invalid_argument\] {name} is {value}")
            for name, values in {
                "short_side": (0, 15),
                "stride": (0, 17),
                "refine": (-1, 1000),
                "threshold": (1.5, np.nan),
                "alpha": (0.9,),
            }.items()
            for value in values
        ),
        ({"names": NAMES}, {**PROPOSALS, "proposal_scores": ONES, "proposal_weight": -1}, "is -1"),
        ({"names": NAMES}, {"proposal_scores": ONES}, "no effect here; send proposals with it"),
        ({"names": NAMES}, {**PROPOSALS, "stride": 8}, "no effect here; leave it out"),
        ({"names": NAMES}, {**PROPOSALS, "proposal_weight": 1}, "no effect here; send proposal_sc"),
    ],
)
def test_what_is_refused_before_the_image_is_looked_at(
    local: Local, labels: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        ask(local.loaded, b"nonsense", Labels(**labels), **options)
    assert not local.calls


def test_a_release_without_patch_encoder(repository):
    local = Local(repository, 1)  # without one
    with pytest.raises(
        TaskError, match=r"\[no_patch_encoder\] .*--dense naclip, or send proposals"
    ):
        ask(local.loaded, png(0))
    assert not local.calls
    assert ask(local.loaded, png(0), **PROPOSALS).mask.shape == (20, 30)


def test_a_request_that_asks_for_too_much_work_is_refused(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 30 x 20 pixels and 3 labels; in a step of refinement 3.5 times as much for the working image,
    # 36 x 24.
    monkeypatch.setattr(module, "MAX_WORK", 1800)
    ask(local.loaded, png(3))
    with pytest.raises(
        TaskError, match=r"3 labels and 1 steps of refinement .* 30 x 20 are 6.0 times the work"
    ):
        ask(local.loaded, png(3), refine=1)
    monkeypatch.setattr(module, "MAX_WORK", 1799)
    with pytest.raises(
        TaskError, match=r"\[invalid_argument\] 3 labels and 0 steps .* send a smaller image"
    ):
        ask(local.loaded, png(3))


def sized(*shape: int) -> dict[str, Any]:
    return {"proposals": np.full(shape, 255, np.uint8)}


@pytest.mark.parametrize(
    ("given", "limits", "message"),
    [
        ({"labels": Labels([str(n) for n in range(5_000)]), "refine": 100}, {}, "the work"),
        ({}, {"MAX_WINDOWS": 7}, r"an image of 30 x 20, resized to 36 x 24, takes 8 windows"),
        ({}, {"MAX_VALUES": 383}, "3 labels are too many .* at most 2 are allowed at a smaller"),
        ({"refine": 1}, {"MAX_VALUES": 2591}, "at most 2 are allowed to refine"),
        (sized(1, 20, 31), {}, r"proposals are uint8 \[1, 20, 31\]; for this image: .*20, 30\]"),
        (
            {**sized(1, 1, 9_000), "image": png(0, 9_000, 1)},
            {},
            "the square crop of a mask has 9000 x 9000 pixels",
        ),
        ({"image": b"nonsense"}, {}, r"\[invalid_image\]"),
        ({"image": png(0, 4_000, 1)}, {}, r"an image of 4000 x 1, .* takes \d+ windows"),
    ],
)
def test_what_asks_for_too_much_is_refused_before_anything_is_done(
    local, given, limits, message, monkeypatch
):
    for name, value in limits.items():
        monkeypatch.setattr(f"radapter_serve.tasks.dense.{name}", value)
    monkeypatch.setattr(module, "decode", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr(module, "MAX_WORK", 1_000_000_000)
    request = {"image": png(3), **given}
    with pytest.raises(TaskError, match=message):
        ask(local.loaded, **request)
    assert not local.calls
    if limits:  # and at the limit it is not
        for name, value in limits.items():
            monkeypatch.setattr(f"radapter_serve.tasks.dense.{name}", value + 1)
        monkeypatch.setattr(module, "decode", decode)
        ask(local.loaded, **request)


def test_proposals_fit_a_photo_that_is_turned(local):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.open(io.BytesIO(png(3))).save(file, "JPEG", exif=exif)
    found = ask(local.loaded, file.getvalue(), **sized(1, 30, 20))
    assert found.mask.shape == (30, 20)
    with pytest.raises(TaskError, match=r"proposals are uint8 \[1, 20, 30\]; .* 30, 20\]"):
        ask(local.loaded, file.getvalue(), **sized(1, 20, 30))
