"""Segmentation and its task: against torch, plain loops, and masks that are known beforehand."""

from __future__ import annotations

import dataclasses
import io
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

from radapter_serve.contract.embeddings import Point
from radapter_serve.contract.errors import Encode, TaskError
from radapter_serve.contract.images import decode
from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.encoders.batcher import complete, encode_together, run_together
from radapter_serve.encoders.loaded import LoadedRelease, Need
from radapter_serve.tasks import segment as module
from radapter_serve.tasks.dense import (
    PATCH_SCALE,
    MaskTally,
    ScoredMask,
    SegmentOptions,
    encode_windows,
    refine,
    segment_densely,
)
from radapter_serve.tasks.embed import Labels, embed_labels
from radapter_serve.tasks.segment import LabelledMask, SegmentRequest, segment, segment_proposals
from tests.helpers.small_models import preprocess, release
from tests.helpers.small_release import LABELS, Local, png

SIZE = 32
GRID = 4
WIDTH = 6


def unit(values: np.ndarray) -> np.ndarray:
    return np.asarray(values / np.linalg.norm(values, axis=-1, keepdims=True), np.float32)


def random_patches(pixels: np.ndarray) -> np.ndarray:
    """Patches that depend on all of a window's pixels in an arbitrary way."""
    means = pixels.reshape(len(pixels), GRID, SIZE // GRID, GRID, SIZE // GRID, 3).mean((2, 4))
    weight = np.random.default_rng(3).normal(size=(3, WIDTH))
    return unit(np.sin(means @ weight) + 0.3 * np.sin(means.mean((1, 2), keepdims=True) @ weight))


def colour_embeds(colours: np.ndarray) -> np.ndarray:
    """Colours [B, 3] about grey."""
    return unit(colours.astype(np.float64) - 127.5 + 1e-3)


def colour_images(pixels: np.ndarray) -> np.ndarray:
    return colour_embeds(pixels.mean((1, 2)))


class Segmenter:
    """Segments by patches, and by masks that a request brings; with what a release would say."""

    def __init__(
        self,
        patches: Encode = random_patches,
        images: Encode = colour_images,
        size: int = SIZE,
        *,
        crop: MaskCrop = MaskCrop(fill=(127, 128, 127)),  # noqa: B008  # grey to `colour_embeds`
        scale: float = 10.0,
        batch: int = 3,
        bias: float | None = None,
    ) -> None:
        self._patches = patches
        self._images = images
        facts: dict[str, Any] = {"logit_scale": scale, "logit_bias": bias, "max_batch_size": batch}
        nothing: Any = None
        self._loaded = LoadedRelease(
            release(preprocess=preprocess(size), crop=crop, **facts), nothing, nothing
        )

    def dense(self, image: Image.Image, *arguments: Any) -> ScoredMask:
        windows = segment_densely(self._loaded, image, *arguments, rows=3)
        return encode_windows(windows, self._patches)

    def from_proposals(self, image: Image.Image, *arguments: Any, **options: Any) -> ScoredMask:
        windows = segment_proposals(self._loaded, image, *arguments, **options)
        return encode_windows(windows, self._images)


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def embeds(count: int, seed: int = 1) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, WIDTH)))


def reference(
    picture: Image.Image, labels: np.ndarray, short_side: int, stride: int
) -> tuple[torch.Tensor, np.ndarray]:
    """The working image's cosines [C, h, w], window by window with torch, and its pixels."""
    ratio = max(picture.size) / min(picture.size)
    sides = [
        short_side if side == min(picture.size) else int(short_side * ratio)
        for side in picture.size
    ]
    working = np.asarray(picture.resize(sides, Image.Resampling.BICUBIC).convert("RGB"))
    height, width = working.shape[:2]
    total = torch.zeros(len(labels), height, width, dtype=torch.from_numpy(labels).dtype)
    count = torch.zeros(height, width)
    top = 0
    while True:
        bottom = min(top + SIZE, height)
        left = 0
        while True:
            right = min(left + SIZE, width)
            window = slice(bottom - SIZE, bottom), slice(right - SIZE, right)
            cosines = random_patches(working[window][None]) @ labels.T
            maps = torch.from_numpy(cosines).permute(0, 3, 1, 2)
            total[:, window[0], window[1]] += interpolate(
                maps, (SIZE, SIZE), mode="bilinear", align_corners=False
            )[0]
            count[window] += 1
            if right == width:
                break
            left += stride
        if bottom == height:
            break
        top += stride
    return total / count, working


def check(picture, labels, options, *, short_side=None, stride=None, maps=None) -> None:
    if maps is None:
        maps, _ = reference(picture, labels, short_side or SIZE * 3 // 2, stride or SIZE // 2)
    full = interpolate(maps[None], picture.size[::-1], mode="bilinear", align_corners=False)[0]
    probabilities = (PATCH_SCALE * full).softmax(0)
    best, expected = (values.numpy() for values in probabilities.max(0))
    answer = Segmenter().dense(picture, labels, options)
    assert answer.mask.dtype == np.uint16
    assert answer.mask.shape == picture.size[::-1]
    top_two = (
        probabilities.topk(2, dim=0).values if len(labels) > 1 else torch.tensor([[1.0], [0.0]])
    )
    clear = (top_two[0] - top_two[1]).numpy() > 1e-4
    if options.threshold is not None:
        expected = np.where(best < options.threshold, len(labels), expected)
        clear &= np.abs(best - options.threshold) > 1e-4
    assert clear.mean() > 0.9 or clear.size < 10
    np.testing.assert_array_equal(np.where(clear, answer.mask, 0), np.where(clear, expected, 0))
    for label, score in enumerate(answer.scores):
        values = best[answer.mask == label]
        if label == len(labels):
            values = 1 - values
        assert score == pytest.approx(values.mean() if values.size else 0, abs=1e-4)
    assert len(answer.scores) == len(labels) + (options.threshold is not None)


@pytest.mark.parametrize(
    ("size", "labels", "options"),
    [
        *(((width, height), 5, {}) for width, height in ((50, 70), (1, 1), (300, 9))),
        *(((40, 30), count, {}) for count in (1, 500)),
        ((90, 71), 4, {"short_side": 40, "stride": 1}),
        ((90, 71), 4, {"short_side": 100, "stride": 24}),
        *(((90, 71), 6, {"threshold": threshold}) for threshold in (0.3, 0.9)),
    ],
)
def test_dense_is_a_loop_over_windows_with_torch(size, labels, options):
    sizes = {name: options[name] for name in ("short_side", "stride") if name in options}
    check(image(*size), embeds(labels), SegmentOptions(**options), **sizes)


@pytest.mark.parametrize(("count", "bias"), [(10, -3.0), (30, None)])
def test_a_mask_is_that_of_float64_in_all_but_one_of_100000_pixels(count, bias):
    picture = image(640, 480)
    labels = embeds(count)
    maps, _ = reference(picture, labels.astype(np.float64), SIZE * 3 // 2, SIZE // 2)
    full = interpolate(maps[None], (480, 640), mode="bilinear", align_corners=False)[0]
    scale = PATCH_SCALE if bias is None else 10.0
    best, expected = full.max(0)
    if bias is None:
        probabilities = 1 / (scale * (full - best)).exp_().sum(0)
    else:
        probabilities = (scale * best + bias).sigmoid()
    answer = Segmenter(bias=bias).dense(picture, labels)
    assert (answer.mask != expected.numpy()).mean() <= 1e-5
    for label in range(count):
        of_label = probabilities[expected == label]
        mean = float(of_label.mean()) if len(of_label) else 0.0
        assert answer.scores[label] == pytest.approx(mean, abs=1e-4)


def test_embeddings_that_are_not_finite_are_an_error():
    def broken(pixels):
        embeds = random_patches(pixels)
        embeds[-1, ..., 0] = np.nan
        return embeds

    segmenter = Segmenter(broken, lambda pixels: np.full((len(pixels), 3), np.inf, np.float32))
    with pytest.raises(TaskError, match=r"\[encoder_failed\] .* not finite"):
        segmenter.dense(image(40, 30), embeds(3))
    with pytest.raises(TaskError, match=r"\[encoder_failed\] .* not finite"):
        segmenter.from_proposals(
            image(20, 20), colour_labels(), np.full((1, 20, 20), 255, np.uint8)
        )


def torch_pamr(maps: torch.Tensor, pixels: np.ndarray, steps: int) -> torch.Tensor:
    """Refine maps [C, h, w] by unfolding neighbourhoods."""
    colours = torch.from_numpy(pixels.copy()).permute(2, 0, 1).double() / 255

    def around(values: torch.Tensor) -> torch.Tensor:
        parts = []
        for dilation in (8, 16):
            padded = pad(values[None], (dilation,) * 4, mode="replicate")
            parts.append(
                torch.nn.functional.unfold(padded, 3, dilation=dilation).reshape(
                    len(values), 9, *values.shape[1:]
                )
            )
        return torch.cat(parts, 1)

    others = [index for index in range(18) if index % 9 != 4]
    near = around(colours)
    weights = -(near[:, others] - colours[:, None]).abs() / (1e-8 + 0.1 * near.std(1, keepdim=True))
    weights = weights.mean(0).softmax(0)
    for _ in range(steps):
        maps = (around(maps)[:, others] * weights).sum(1)
    return maps


def test_refining_is_pamr():
    picture = image(90, 71)
    maps, working = reference(picture, embeds(20), 48, 16)
    expected = torch_pamr(maps.double(), working, 3)
    refined = maps.numpy().copy()
    refine(refined, working, 3)
    np.testing.assert_allclose(refined, expected, atol=1e-4)
    check(picture, embeds(20), SegmentOptions(refine=3), maps=expected.float())


def colour_labels() -> np.ndarray:
    """Red, green, blue and white."""
    return colour_embeds(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]))


def test_a_pixel_whose_probability_equals_the_threshold_has_its_label() -> None:
    tally = MaskTally((3,), 2, background=True, threshold=1.0)
    tally.put(slice(0, 3), np.array([0, 1, 1]), np.array([1, 1, 0.5], np.float32))
    assert tally.result().mask.tolist() == [0, 1, 2]


# OVSeg


@pytest.mark.parametrize(("threshold", "last"), [(0.1, 1), (0.4, 2)])
def test_proposals_are_fused_as_computed_by_hand(threshold, last):
    """Two masks that overlap in two pixels of five, one of them half sure of itself."""
    masks = np.array([[[255, 255, 255, 0, 0]], [[0, 153, 153, 204, 204]]], np.uint8)
    scores = np.array([[0.8, 0.1], [0.2, 0.6]], np.float32)
    clip = iter([np.array([[0.6, 0.8], [1.0, 0.0]], np.float32)])
    labels = np.eye(2, dtype=np.float32)
    segmenter = Segmenter(images=lambda pixels: next(clip), scale=2.0)
    options = SegmentOptions(proposal_weight=0.25, threshold=threshold)
    answer = segmenter.from_proposals(image(5, 1), labels, masks, scores, options)
    first = np.exp([1.2, 1.6]) / np.exp([1.2, 1.6]).sum()
    second = np.exp([2.0, 0.0]) / np.exp([2.0, 0.0]).sum()
    p = scores.astype(float) ** 0.75 * np.array([first, second]) ** 0.25
    overlap = (p[0] + 0.6 * p[1]) / 1.6
    assert answer.mask.tolist() == [[0, 0, 0, last, last]]
    expected = np.array([(p[0, 0] + 2 * overlap[0]) / 3, 0, 0])
    expected[last] = 0.8 * p[1, 1] if last == 1 else 1 - 0.8 * p[1, 1]
    np.testing.assert_allclose(answer.scores, expected, rtol=1e-5)


def test_proposals_that_a_sigmoid_can_not_tell_apart_get_the_label_of_the_greater_cosine():
    """In float32 a sigmoid is 1 for all logits above 17."""
    masks = np.array([[[255, 255, 0]], [[0, 255, 204]]], np.uint8)
    cosines = np.array([[0.7, 0.6, -1.0], [0.6, 0.75, -1.0]], np.float32)
    segmenter = Segmenter(images=lambda pixels: cosines, scale=100.0, bias=-10.0)
    answer = segmenter.from_proposals(image(3, 1), np.eye(3, dtype=np.float32), masks)
    assert answer.mask.tolist() == [[0, 1, 1]]


# what is refused


FULL = np.full((2, 6, 8), 255, np.uint8)


@pytest.mark.parametrize(
    ("masks", "scores", "message"),
    [
        (FULL[:0], None, r"proposals are uint8 \[0, 6, 8\]; for this image: uint8 \[N, 6, 8\]"),
        (FULL.transpose(0, 2, 1), None, r"proposals are uint8 \[2, 8, 6\]"),
        (FULL[0], None, r"proposals are uint8 \[6, 8\]"),
        (FULL.astype(np.float32), None, r"proposals are float32 \[2, 6, 8\]"),
        (FULL // 255, None, r"no value of the proposals is above 1; send .*255 inside"),
        (FULL * 0 + 102, None, r"all 2 proposals are empty: no value is above 102"),
        (FULL, np.ones((2, 3)), r"shape \[2, 3\]; \[2, 4\] is needed"),
        (FULL, np.full((2, 4), 1.1), r"proposal_scores hold a value outside 0 to 1"),
        (FULL, np.full((2, 4), np.nan), r"proposal_scores hold a value outside 0 to 1"),
    ],
)
def test_proposals_that_do_not_fit(masks, scores, message):
    with pytest.raises(TaskError, match=message) as error:
        Segmenter().from_proposals(image(8, 6), colour_labels(), masks, scores)
    assert error.value.code == "invalid_argument"


def test_memory_is_bounded():
    """Cosines of all pixels and labels would take 288 MB."""
    picture = image(800, 600)
    masks = np.zeros((4, 600, 800), np.uint8)
    masks[:, 200:400, 100:700] = 255
    for run in (
        lambda: Segmenter().dense(picture, embeds(150), SegmentOptions(threshold=0.1)),
        lambda: Segmenter(images=lambda crops: embeds(len(crops))).from_proposals(
            picture, embeds(150), masks
        ),
    ):
        tracemalloc.start()
        answer = run()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert answer.mask.shape == (600, 800)
        assert peak < 80_000_000


# The task


NAMES = ["cat, kitty", "dog", "bird"]
CATS = Labels(NAMES)


def ask(loaded: LoadedRelease, image: bytes, labels: Labels = CATS, **options: Any) -> LabelledMask:
    known = {field.name for field in dataclasses.fields(SegmentOptions)}
    numbers = {name: options.pop(name) for name in known & options.keys()}
    request = SegmentRequest(image, labels, options=SegmentOptions(**numbers), **options)
    return complete(segment(loaded, request))


TEMPLATES = ["one {}", "two {}"]
MASKS = np.zeros((2, 20, 30), np.uint8)
MASKS[0, :12] = 255
MASKS[1, 8:] = 180
SCORES = np.random.default_rng(0).random((2, len(LABELS)), np.float32)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (CATS, {}),
        (
            Labels(NAMES, templates=TEMPLATES),
            {"short_side": 20, "stride": 5, "refine": 2, "threshold": 0.5},
        ),
        (
            Labels(label_set="colours"),
            {"proposals": MASKS, "proposal_scores": SCORES, "proposal_weight": 0.4},
        ),
    ],
)
def test_a_request_is_segmented_by_its_labels_and_options(
    local: Local, labels: Labels, options: dict[str, Any]
) -> None:
    names = labels.names or LABELS
    templates = labels.templates or (["a {}"] if labels.label_set else ["a photo of a {}."])
    label_set = complete(embed_labels(local.loaded, names, templates))
    arrays = [options[name] for name in ("proposals", "proposal_scores") if name in options]
    numbers = {name: value for name, value in options.items() if not isinstance(value, np.ndarray)}
    # The same encoders, without the task.
    segmenter = Segmenter(local.patches, local.images, 16, crop=MaskCrop(), batch=64)
    run = segmenter.from_proposals if arrays else segmenter.dense
    picture = Image.open(io.BytesIO(png(3)))
    expected = run(picture, label_set.embeds, *arrays, SegmentOptions(**numbers))
    answer = ask(local.loaded, png(3), labels, **options)
    background = ("background",) if arrays or "threshold" in options else ()
    assert answer.labels == label_set.labels + background
    np.testing.assert_array_equal(answer.mask, expected.mask)
    np.testing.assert_array_equal(answer.scores, expected.scores)


def test_no_more_windows_are_encoded_when_the_caller_has_left(local: Local) -> None:
    loaded = local.changed(max_batch_size=3)
    parts: list[str] = []

    def encode(needs: Sequence[Need]) -> Any:
        parts.extend(need.part for need in needs)
        return encode_together(needs)

    request = SegmentRequest(png(3), CATS)
    steps = segment(loaded, request, lambda: parts.count("patches") == 2)
    [answer] = run_together([steps], encode)
    assert isinstance(answer, TaskError) and answer.code == "cancelled"
    assert parts == ["tokens", "patches", "patches"]


ONES = np.ones((1, 3), np.float32)
PROPOSALS: dict[str, Any] = {"proposals": np.full((1, 20, 30), 255, np.uint8)}


OUT_OF_RANGE = [
    *(("short_side", 0), ("short_side", 15), ("stride", 0), ("stride", 17)),
    *(("refine", -1), ("refine", 1000), ("threshold", 1.5), ("threshold", np.nan)),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": Labels(label_set="colors")}, r"\[unknown_label_set\] .*there are: colours"),
        *(
            ({name: value}, rf"\[invalid_argument\] {name} is {value}")
            for name, value in OUT_OF_RANGE
        ),
        ({"point": Point(alpha=0.9)}, r"\[invalid_argument\] alpha is 0.9"),
        ({**PROPOSALS, "proposal_scores": ONES, "proposal_weight": -1}, "is -1"),
        ({"proposal_scores": ONES}, "no effect here; send proposals with it"),
        ({**PROPOSALS, "stride": 8}, "no effect here; leave it out"),
        ({**PROPOSALS, "proposal_weight": 1}, "no effect here; send proposal_scores"),
    ],
)
def test_what_is_refused_before_the_image_is_looked_at(
    local: Local, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        ask(local.loaded, b"nonsense", **options)
    assert not local.calls


def test_a_release_without_patch_encoder(repository):
    local = Local(repository, 1)  # without one
    with pytest.raises(
        TaskError, match=r"\[no_patch_encoder\] .*--dense naclip, or send proposals"
    ):
        ask(local.loaded, png(0))
    assert not local.calls
    assert ask(local.loaded, png(0), **PROPOSALS).mask.shape == (20, 30)


def sized(*shape: int) -> dict[str, Any]:
    return {"proposals": np.full(shape, 255, np.uint8)}


@pytest.mark.parametrize(
    ("wrong", "limits", "message"),
    [
        ({"labels": Labels([str(n) for n in range(5_000)]), "refine": 100}, {}, "the work"),
        # 30 x 20 pixels and 3 labels; in a step of refinement 3.5 times as much for the working
        # image, 36 x 24.
        ({}, {"segment.MAX_WORK": 1799}, r"3 labels and 0 steps .* send a smaller image"),
        ({"refine": 1}, {"segment.MAX_WORK": 10_871}, "1 steps of refinement .* are 1.0 times"),
        ({}, {"dense.MAX_WINDOWS": 7}, "an image of 30 x 20, resized to 36 x 24, takes 8 windows"),
        ({}, {"dense.MAX_VALUES": 383}, "3 labels are too many .* at most 2 .* at a smaller"),
        ({"refine": 1}, {"dense.MAX_VALUES": 2591}, "at most 2 are allowed to refine"),
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
    local, wrong, limits, message, monkeypatch
):
    monkeypatch.setattr(module, "MAX_WORK", 1_000_000_000)
    for name, value in limits.items():
        monkeypatch.setattr(f"radapter_serve.tasks.{name}", value)
    monkeypatch.setattr(module, "decode", lambda *_, **__: pytest.fail("decoded"))
    request = {"image": png(3), **wrong}
    with pytest.raises(TaskError, match=message):
        ask(local.loaded, **request)
    assert not local.calls
    if limits:  # and at the limit it is not
        for name, value in limits.items():
            monkeypatch.setattr(f"radapter_serve.tasks.{name}", value + 1)
        monkeypatch.setattr(module, "decode", decode)
        ask(local.loaded, **request)


def test_proposals_fit_a_photo_that_is_turned(local):
    photo = png(3, kind="JPEG", turn=6)
    answer = ask(local.loaded, photo, **sized(1, 30, 20))
    assert answer.mask.shape == (30, 20)
    with pytest.raises(TaskError, match=r"proposals are uint8 \[1, 20, 30\]; .* 30, 20\]"):
        ask(local.loaded, photo, **sized(1, 20, 30))
