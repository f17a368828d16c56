"""A proposal network's masks and scores in evaluation: fused as OVSeg fuses them, and told in the
rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.models import Candidate
from radapter_serve.evaluation.rows import Row
from radapter_serve.evaluation.run import evaluate, open_set
from radapter_serve.evaluation.suite import Suite, load_suite
from tests.evaluation.conftest import Fake, candidate

NAMES = ["sky", "grass", "cow"]
SIZE = (6, 8)
COSINES = np.array([[0.2, 0.9, 0.4], [0.8, 0.1, 0.3], [0.5, 0.5, 0.1], [0.1, 0.4, 0.9]], np.float32)
SCALE = 3.0


def fixed() -> Candidate:
    """A model that gives the crops of an image the cosines of the table, one after the other."""
    fake = Fake(NAMES, lambda crops, dense: COSINES[: len(crops)])
    crop = {"padding": 0.0, "square": True, "fill": [0, 0, 0]}
    return candidate(fake, 4, crop=crop, logit_scale=SCALE, max_batch_size=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`data` of 2 images of noise with label maps, and `found` with 4 soft masks and scores of
    each.
    """
    generator = np.random.default_rng(0)
    for part in ("data/images", "data/masks", "found"):
        (tmp_path / part).mkdir(parents=True)
    for name in ("a", "b"):
        pixels = generator.integers(0, 255, (*SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"data/images/{name}.png")
        labels = generator.integers(0, 3, SIZE, np.uint8)
        Image.fromarray(labels).save(tmp_path / f"data/masks/{name}.png")
        masks = np.round(generator.random((4, *SIZE)) * 255).astype(np.uint8)
        scores = generator.random((4, 3)).astype(np.float32)
        np.savez(tmp_path / f"found/{name}.npz", masks=masks, scores=scores)
    (tmp_path / "data" / "classes.txt").write_text("\n".join(NAMES), encoding="utf-8")
    return tmp_path


def suite_of(folder: Path, *sets: str) -> Suite:
    lines = "\n".join(f"- {{name: s{number}, {fields}}}" for number, fields in enumerate(sets))
    text = f"task: segmentation\ndata: 'masks:data'\ndense: proposals\nsets:\n{lines}"
    (folder / "s.yaml").write_text(text, encoding="utf-8")
    return load_suite(folder / "s.yaml", folder)


def rows_of(suite: Suite) -> list[Row]:
    return [evaluate([fixed()], open_set(suite, entry))[0] for entry in suite.entries]


def rewrite(folder: Path, change: Callable[[NDArray[Any], NDArray[Any]], dict[str, Any]]) -> None:
    """Write other masks and scores into the files of proposals."""
    for path in (folder / "found").iterdir():
        with np.load(path) as arrays:
            changed = change(arrays["masks"], arrays["scores"])
        np.savez(path, **changed)


def by_ovseg(folder: Path, weight: float | None) -> list[list[int]]:
    """Counts by true and found class: sum_q (p_proposal^(1-w) p_clip^w) mask_q of each pixel, in
    OVSeg's own order.
    """
    logits = SCALE * COSINES.astype(float)
    clip = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    counts = np.zeros((3, 4), int)
    for name in ("a", "b"):
        with np.load(folder / "found" / f"{name}.npz") as found:
            masks = found["masks"] / 255
            classes = (
                clip
                if weight is None
                else found["scores"].astype(float) ** (1 - weight) * clip**weight
            )
        best = np.einsum("qc,qhw->chw", classes, masks).argmax(0)
        truth = np.asarray(Image.open(folder / "data" / "masks" / f"{name}.png"))
        for true, answer in zip(truth.ravel(), best.ravel(), strict=True):
            counts[true, answer] += 1
    return counts.tolist()


def test_scores_and_masks_are_fused_as_ovseg_does(folder: Path) -> None:
    weights: Sequence[float] = (0.0, 0.45, 1.0)
    sets = [f"proposals: found, proposal_weight: {weight}" for weight in weights]
    *rows, usual = rows_of(suite_of(folder, *sets, "proposals: found"))
    for row, weight in zip(rows, weights, strict=True):
        assert row.confusion == by_ovseg(folder, weight)
        assert (row.dense, row.proposals, row.proposal_weight) == ("proposals", "found", weight)
    assert usual.confusion == by_ovseg(folder, 0.7) and usual.proposal_weight == 0.7
    assert len({json.dumps(row.confusion) for row in rows}) == 3


def test_masks_without_scores_have_clips_classes(folder: Path) -> None:
    rewrite(folder, lambda masks, scores: {"masks": masks})
    (row,) = rows_of(suite_of(folder, "proposals: found"))
    assert row.confusion == by_ovseg(folder, None) and row.proposal_weight is None
    with pytest.raises(RAdapterError, match="proposal_weight is 0.6 but found has no scores"):
        rows_of(suite_of(folder, "proposals: found, proposal_weight: 0.6"))


def test_an_image_whose_masks_are_empty_is_background(folder: Path) -> None:
    rewrite(folder, lambda masks, scores: {"masks": np.full((3, *SIZE), 0.4)})
    np.savez(folder / "found" / "b.npz", masks=np.zeros((0, *SIZE)))
    (row,) = rows_of(suite_of(folder, "proposals: found"))
    assert np.array(row.confusion)[:, 3].sum() == 2 * 6 * 8


def test_a_mask_that_is_empty_takes_its_own_scores_along(folder: Path) -> None:
    """The first mask has nothing above one half: the others keep the scores that they came with."""
    rewrite(folder, lambda masks, scores: {"masks": [0 * masks[0], *masks[1:]], "scores": scores})
    (whole,) = rows_of(suite_of(folder, "proposals: found"))
    rewrite(folder, lambda masks, scores: {"masks": masks[1:], "scores": scores[1:]})
    (rest,) = rows_of(suite_of(folder, "proposals: found"))
    assert whole.confusion == rest.confusion
