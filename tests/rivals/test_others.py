"""Judgements of other classes, by hand; the interval and Holm's correction; the table."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from radapter_serve.evaluation.rows import packed
from rivals import others
from rivals.layout import holm, lead_of
from rivals.others import Collection, Images, Judged, base_to_novel, judge
from tests.rivals.conftest import collection_of

CLASSES = ("a", "b", "c", "d")


def test_each_kind_is_judged_among_its_own_labels() -> None:
    of = Collection(CLASSES, ("{}",), {}, {}, {})
    assert of.splits == {"first half": ("a", "b"), "last half": ("c", "d")}
    # Embeddings of classes and images are told.
    embeds = {"embed_classes": lambda *_: torch.eye(4), "embed_images": lambda pixels: pixels}
    system: Any = SimpleNamespace(**embeds)
    scores = [
        [0.9, 0.1, 0.0, 0.0],  # an image of a, right among all
        [0.5, 0.4, 0.6, 0.0],  # of a, right among a and b; c is better
        [0.7, 0.0, 0.6, 0.1],  # of c, right among c and d; a is better
        [0.0, 0.1, 0.9, 0.2],  # of d, wrong everywhere
    ]
    images = Images(torch.tensor(scores), np.array([0, 0, 2, 3]))
    judged = judge(system, of, "first half", {"x": images})
    found = {kind: values.tolist() for (kind, _), values in judged.items()}
    assert found["trained"] == [True, True]
    assert found["trained, all labels"] == [True, False]
    assert found["others"] == [True, False]
    assert found["others, all labels"] == [False, False]
    # c ranks its image third or second: 0.9, 0.6, 0.6; d ranks its own first.
    assert found["searches"] == pytest.approx([1 / 3, 1.0], abs=1e-3)


def test_the_harmonic_mean_of_trained_and_other_classes_by_hand(tmp_path: Path) -> None:
    def judged(kind: str, right: list[int], style: str = "own", method: str = "m") -> Judged:
        values = packed(np.array(right, bool))
        return Judged(method, "", "first half", 0, 0.5, style, kind, len(right), values)

    rows = [
        judged("trained", [1, 1, 1, 0]),
        judged("others", [1, 0, 0, 0]),
        judged("trained, all labels", [1, 0]),
        judged("others, all labels", [1, 0]),
        judged("others", [1, 1], "another style"),
    ]
    rows += [judged(row.kind, [1, 0], method="base") for row in rows[:4]]
    line = base_to_novel(rows, "own", tmp_path / "picture.png").splitlines()[-2]
    # 2 * 75 * 25 / 100 and 2 * 50 * 50 / 100
    assert line == "| m | 0.5 | 75.0 | 25.0 | 37.5 | 50.0 | 50.0 | 50.0 |"


def test_the_interval_of_one_seed_is_that_of_a_mean_over_images() -> None:
    draw = np.random.default_rng(1)
    differences = draw.choice([-1.0, 0.0, 1.0], size=(1, 400), p=[0.1, 0.7, 0.2])
    lead, half, p = lead_of([differences])
    error = scipy.stats.sem(differences[0])
    low, high = scipy.stats.norm.interval(0.95, differences.mean(), error)
    assert (lead - half, lead + half) == pytest.approx((100 * low, 100 * high))
    assert p == pytest.approx(2 * scipy.stats.norm.sf(differences.mean() / error))


def test_the_interval_holds_seeds_too() -> None:
    means = [0.0, 0.1, 0.2, 0.3]
    seeds = np.repeat(np.array(means)[:, None], 50, axis=1)  # images are all alike
    lead, half, _ = lead_of([seeds])
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(means), scipy.stats.sem(means))
    assert (lead - half, lead + half) == pytest.approx((100 * low, 100 * high))
    # Images that differ add their own part; each of two sets has half of the weight.
    images = np.random.default_rng(0).normal(size=50) / 10
    of_images = 1.96 * 100 * scipy.stats.sem(images)
    for sets in (1, 2):
        _, both, _ = lead_of([seeds + images] * sets)
        assert both == pytest.approx((half**2 + of_images**2 / sets) ** 0.5, rel=1e-3)
    assert lead_of([np.zeros((2, 5))]) == (0.0, 0.0, 1.0)


def test_holm_by_hand() -> None:
    # 0.005 <= 0.05/4 and 0.01 <= 0.05/3, but 0.03 > 0.05/2, which ends it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert holm([0.04]) == [True]


@pytest.mark.slow
def test_the_table_is_written_and_no_run_made_twice(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields = {"crop_scale": 0.9, "batch_size": 12}
    of = collection_of(images, ("own", "other"), 6, fields)
    monkeypatch.setattr(others, "collection", lambda name, root: of)
    call = ["--set-name", "drawings", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")]
    known = {"preserve", "preserve, words", "CoOp, no full stop"}
    call += ["--seeds", "0", "--steps", "2", "--only", *known]
    assert others.main(call) == 0
    page = (tmp_path / "out" / "others.md").read_text(encoding="utf-8")
    # In both tables; CoOp has no line to its base.
    assert page.count("| preserve, words |") == 2 * len(others.ALPHAS)
    assert page.count("| CoOp, no full stop | 1 |") == page.count("| CoOp, no full stop |") == 2
    assert "| base | 0 |" in page
    assert (tmp_path / "out" / "others.png").stat().st_size > 10_000
    assert capsys.readouterr().err.count("seed 0") == 6  # three methods on two halves
    assert others.main(call) == 0
    assert "seed 0" not in capsys.readouterr().err
