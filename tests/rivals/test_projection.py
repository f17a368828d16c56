"""Rows that are trained with embeddings: classifiers on them, the choice of a few, and leads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rivals.others import Judged, judged_rows
from rivals.projection import (
    HEADS,
    PHOTOS,
    Classifier,
    Embedder,
    Moved,
    Task,
    by_set,
    few,
    heads,
    lead_over,
    leads,
    over_bases,
    retrieved,
)
from rivals.statistics import lead_of

CLASSES = ("ant", "bee", "cat")
WIDTH = 8


class Texts(Embedder):
    """An embedder whose texts are random, the same for the same text."""

    def __init__(self) -> None:
        """Need no base."""

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        draws = [torch.Generator().manual_seed(len(text) + 31 * ord(text[0])) for text in texts]
        return F.normalize(torch.stack([torch.randn(WIDTH, generator=g) for g in draws]), dim=-1)


@pytest.fixture
def task() -> Task:
    """Images of three classes that lie apart."""
    labels = np.arange(30) % 3
    centres = torch.eye(WIDTH)[:3]
    noise = 0.1 * torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(0))
    return Task(F.normalize(centres[labels] + noise, dim=-1), labels, CLASSES, ("a {}",))


@pytest.mark.parametrize("name", HEADS)
def test_a_classifier_on_embeddings_tells_its_classes_apart(task, name):
    weights = heads(task, name, np.arange(30) // 3 % 3)
    scores = task.images @ torch.stack([weights[name] for name in CLASSES]).T
    assert (scores.argmax(dim=1).numpy() == task.labels).all()


@pytest.mark.parametrize("name", HEADS)
def test_a_classifier_is_trained_without_folds_too(task, name):
    assert set(heads(task, name, np.full(30, -1))) == set(CLASSES)


def test_an_embedding_takes_the_place_of_a_class_and_leaves_the_others():
    prompts = {"bee": torch.ones(WIDTH)}
    plain = Moved(Texts(), {}, 0.0).embed_classes(CLASSES, ("a {}",))
    mixed = Classifier(Texts(), {}, 0.0, prompts, True).embed_classes(CLASSES, ("a {}",))
    assert torch.equal(mixed[1], torch.ones(WIDTH))
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]])
    alone = Classifier(Texts(), {}, 0.0, prompts, False).embed_classes(CLASSES, ("a {}",))
    assert not alone[[0, 2]].any()


def test_a_few_images_are_of_every_class_and_part_of_more():
    labels = np.repeat(np.arange(3), 7)
    two = few(labels, 2, seed=0)
    assert np.bincount(labels[two]).tolist() == [2, 2, 2]
    assert set(two) < set(few(labels, 4, seed=0))


def test_captions_find_photos_among_the_nearest():
    class Same(Moved):
        def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
            return torch.eye(3)[[int(text) for text in texts]]

    photos = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 0, 1]])
    captions = [["0"], ["1"], ["0"]]
    assert retrieved(Same(Texts(), {}, 0.0), photos, captions, 1).tolist() == [True, True, False]
    assert retrieved(Same(Texts(), {}, 0.0), photos, captions, 3).tolist() == [True] * 3


def rows(right: list[list[bool]]) -> list[Judged]:
    values = [np.array(each) for each in right]
    kind = ("trained", "photo")
    return [
        row
        for seed, each in enumerate(values)
        for row in judged_rows({kind: each}, "any", "", "all", seed, 1.0)
    ]


def test_a_gain_is_compared_with_two_thirds_of_another():
    base = rows([[False] * 6])
    ours = rows([[True] * 4 + [False] * 2] * 2)
    theirs = rows([[True] * 6] * 2)
    column = ("trained", True)
    ahead = lead_over(ours, theirs, base, column, "photo", {})
    beyond = lead_over(ours, theirs, base, column, "photo", {}, share=2 / 3)
    assert ahead.points == pytest.approx(-100 / 3)
    assert beyond.points == pytest.approx(0)


def test_a_text_of_a_search_counts_once_in_all_styles():
    """Two styles with the same precisions tell no more than one."""
    precisions = np.array([0.1, 0.5, 0.9, 0.3], np.float16)

    def searches(values: np.ndarray) -> list[Judged]:
        styles = {("searches", style): values for style in ("line", "pixel")}
        return judged_rows(styles, "any", "", "all", 0, 1.0)

    base = searches(np.zeros(4, np.float16))
    ours = searches(precisions)
    names = {("all", "searches", style): np.arange(4) for style in ("line", "pixel")}
    column = ("searches", False)
    lead = leads({"any": ours}, base, [column], "photo", names)["any", column]
    assert lead.half == pytest.approx(lead_of([precisions.astype(float)[None]]).half)


def test_the_captions_of_a_photo_are_one_sample():
    kind = ("R@1", PHOTOS)
    base = judged_rows({kind: np.zeros(10, bool)}, "base", "", "all", 0, 0.0)
    right = np.array([True] * 5 + [True] + [False] * 4)
    moved = judged_rows({kind: right}, "any", "", "all", 0, 1.0)
    differences = by_set(moved, base, ("R@1", True), PHOTOS)
    assert differences["all", PHOTOS][0].tolist() == [1.0, 0.2]


def test_the_seeds_of_a_base_are_averaged_and_bases_take_their_place():
    """One base gains on four of six images by every seed, the other on two by one seed of two."""
    base = rows([[False] * 6])
    first = rows([[True] * 4 + [False] * 2] * 2)
    second = rows([[True] * 2 + [False] * 4, [False] * 6])
    page = over_bases([(first, base), (second, base)], "photo")
    means = np.array([[1.0] * 4 + [0.0] * 2, [0.5] * 2 + [0.0] * 4])
    assert f"| any | {lead_of([means])} |" in page.replace("**", "")
    assert f"{lead_of([means]).points:.1f}" == "41.7"


def test_a_method_is_ahead_of_another_in_the_mean_of_each_bases_seeds():
    base = rows([[False] * 6])
    ours = [replace(row, method="ours") for row in rows([[True] * 6, [True] * 4 + [False] * 2])]
    studies = [
        (ours + rows([right] * 2), base) for right in ([True, True] + [False] * 4, [True] * 6)
    ]
    page = over_bases(studies, "photo", ("ours", "any")).replace("**", "")
    of_ours = np.array([1.0] * 4 + [0.5] * 2)
    of_any = np.array([[1.0] * 2 + [0.0] * 4, [1.0] * 6])
    assert f"| ours, ahead of any | {lead_of([of_ours - of_any])} |" in page
