"""Judgements of other classes, by hand; which images and halves are one; the table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from radapter_serve.data.labelled import load_labelled
from radapter_serve.data.source import DataSource
from radapter_serve.evaluation.rows import packed
from rivals import others
from rivals.benchmark import table_of
from rivals.others import (
    Collection,
    Images,
    Judged,
    at_equal_gain,
    averaged,
    base_to_novel,
    judge,
    names_of,
    table,
)
from tests.rivals.conftest import collection_of

CLASSES = ("a", "b", "c", "d")


def test_a_table_of_images_is_read_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "photos" / "1.png")
    monkeypatch.chdir(tmp_path)
    source = table_of({"cat": [Path("photos/1.png")]}, tmp_path / "photos")
    data = load_labelled(DataSource(source))
    assert data.classes == ["cat"] and data.image(data.rows[0]).size == (4, 4)


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
    kinds = {kind: values.tolist() for (kind, _), values in judged.items()}
    assert kinds["trained"] == [True, True]
    assert kinds["trained, all labels"] == [True, False]
    assert kinds["others"] == [True, False]
    assert kinds["others, all labels"] == [False, False]
    # c ranks its image third or second: 0.9, 0.6, 0.6; d ranks its own first.
    assert kinds["searches"] == pytest.approx([1 / 3, 1.0], abs=1e-3)


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
    groups = [("first half",)]
    line = base_to_novel(rows, "own", tmp_path / "picture.png", groups).splitlines()[-2]
    # 2 * 75 * 25 / 100 and 2 * 50 * 50 / 100
    assert line == "| m | 0.5 | 75.0 | 25.0 | 37.5 | 50.0 | 50.0 | 50.0 |"


def test_an_image_that_is_judged_in_both_splits_has_one_name() -> None:
    # b is trained in both; of d there is no image to search for.
    of = Collection(("a", "b", "d"), ("{}",), {}, {}, {})
    images = Images(torch.zeros(4, 3), np.array([0, 1, 0, 1]))
    names = names_of(of, {"x": images, "y": images})
    assert of.splits == {"first half": ("a", "b"), "last half": ("b", "d")}
    assert names["first half", "trained", "x"].tolist() == ["x 0", "x 1", "x 2", "x 3"]
    assert names["last half", "trained", "x"].tolist() == ["x 1", "x 3"]
    assert names["last half", "others, all labels", "y"].tolist() == ["y 0", "y 2"]
    assert names["last half", "searches", "x"].tolist() == ["0"]
    assert names["first half", "searches", "x"].tolist() == []


def test_no_mean_is_taken_with_a_half_that_has_nothing_to_lose(tmp_path: Path) -> None:
    of = Collection(CLASSES, ("{}",), {}, {}, {})

    def rows(method: str, last: list[int]) -> list[Judged]:
        halves = {"first half": [1, 1, 1, 0], "last half": last}
        return [
            Judged(method, "", split, 0, 0.5, "own", kind, 4, packed(np.array(right, bool)))
            for split, right in halves.items()
            for kind in ("trained", "others", "trained, all labels", "others, all labels")
        ]

    known = rows("base", [1, 1, 0, 0])  # twice chance among four
    unknown = rows("base", [1, 0, 0, 0])
    assert averaged(of, known, "own") == [("first half", "last half")]
    groups = averaged(of, unknown, "own")
    assert groups == [("first half",), ("last half",)]
    images = Images(torch.zeros(8, 3), np.repeat([0, 1, 2, 3], 2))
    after = rows("m", [1, 1, 1, 1])
    first, last = table(
        {("m", "0.5"): after}, unknown, "own", names_of(of, {"own": images}), groups
    )
    assert "Trained: the first half" in first and "| +0.0 ± 0.0 |" in first
    assert "| +75.0 ± " in last
    lines = base_to_novel([*unknown, *after], "own", tmp_path / "picture.png", groups).splitlines()
    assert lines[-1].startswith("| m | 0.5 | last half | 100.0 | 100.0 | 100.0 |")


def test_at_equal_gain_each_method_stands_at_its_nearest_alpha() -> None:
    of = Collection(CLASSES, ("{}",), {}, {}, {})
    names = names_of(of, {style: Images(torch.zeros(8, 3), np.arange(8) // 2) for style in "xy"})
    kinds = ("trained", "others, all labels")

    def rows(method: str, alpha: float, rights: list[list[int]], seeds: int = 2) -> list[Judged]:
        return [
            Judged(method, "", "first half", seed, alpha, style, kind, 4, packed(np.array(r, bool)))
            for seed in range(seeds)
            for style in "xy"
            for kind, r in zip(kinds, rights, strict=True)
        ]

    grouped = {
        others.SMALL: rows("preserve, words", 0.5, [[1, 1, 0, 0], [1, 1, 1, 0]]),
        ("m", "0.5"): rows("m", 0.5, [[1, 1, 1, 0], [1, 0, 0, 0]], seeds=1),
        ("m", "1"): rows("m", 1.0, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        # At 1 the gain is equal, but beyond the largest.
        ("past", "0.5"): rows("past", 0.5, [[1, 1, 1, 0], [1, 1, 1, 1]]),
        ("past", "1"): rows("past", 1.0, [[1, 1, 0, 0], [0, 0, 0, 0]]),
    }
    text = at_equal_gain(grouped, "x", names, ("first half",))
    (line,) = [line for line in text.splitlines() if line.startswith("| m ")]
    assert line.startswith("| m (1 seed) | 0.5 | +25.0 ± ")
    assert "| -50.0 ± " in line
    assert "| past | 0.5 | +25.0" in text
    assert at_equal_gain({("m", "1"): grouped["m", "1"]}, "x", names, ("first half",)) == ""


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
    (tmp_path / "openmoji").mkdir()
    call = ["--set-name", "drawings", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")]
    known = {"preserve", "preserve, words", "CoOp, 0.2"}
    call += ["--seeds", "0", "--steps", "2", "--only", *known]
    assert others.main(call) == 0
    page = (tmp_path / "out" / "others.md").read_text(encoding="utf-8")
    # In both tables by halves, as the base is near chance; CoOp has no line to its base.
    assert page.count("| preserve, words |") == 2 * 2 * len(others.ALPHAS)
    assert page.count("| CoOp, 0.2 | 1 |") == page.count("| CoOp, 0.2 |") == 6  # at equal gain, too
    assert "| base | 0 |" in page
    # These other names are the classes themselves: right as in both halves among all labels.
    cells = map(json.loads, (tmp_path / "out" / "others.jsonl").read_text("utf-8").splitlines())
    for cell in cells:
        rows = [Judged(*cell["run"], *row) for row in cell["rows"]]
        right = {
            row.kind: row.each.sum() for row in rows if "own" in row.style and row.alpha in (0, 1)
        }
        halves = right["trained, all labels"] + right["others, all labels"]
        assert right[others.OTHER_NAMES] == halves
    assert page.count("OpenMoji of other names, other styles") == 4
    assert (tmp_path / "out" / "others.png").stat().st_size > 10_000
    assert capsys.readouterr().err.count("seed 0") == 6  # three methods on two halves
    assert others.main([*call, "--no-training", "--seeds", "0", "1"]) == 0
    assert "seed" not in capsys.readouterr().err
