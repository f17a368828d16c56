"""Classes of unequal size: how many images each has, what helps the rare, and the table."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from radapter_serve import Evaluation, evaluate, train
from radapter_serve.data import Labelled
from radapter_serve.evaluation.rows import ClassFigures, Row
from radapter_serve.training import Run
from rivals import loop
from rivals.small import table_of
from rivals.unequal import (
    FIGURES,
    WAYS,
    Found,
    best,
    evened,
    figures_of,
    logit_adjustment,
    main,
    tables,
    unequal,
)
from tests.rivals.test_small import data_root as data_root


def images_of(**counts: int) -> dict[str, list[Path]]:
    return {name: [Path(f"{name}{i}") for i in range(count)] for name, count in counts.items()}


def test_sizes_fall_by_equal_factors_and_the_seed_draws_which_class_has_which() -> None:
    images = images_of(a=200, b=200, c=200)
    drawn = [unequal(images, 100, seed) for seed in range(20)]
    assert all([len(own) for own in one.values()] == [100, 10, 1] for one in drawn)
    assert {next(iter(one)) for one in drawn} == {"a", "b", "c"}
    assert unequal(images, 100, 3) == drawn[3]
    for label, own in drawn[0].items():
        assert len(set(own)) == len(own) and set(own) <= set(images[label])


def test_a_class_that_lacks_images_is_a_rarer_one() -> None:
    for seed in range(20):
        drawn = unequal(images_of(a=5, b=100, c=12), 100, seed)
        assert list(drawn)[:1] == ["b"] and len(drawn["b"]) == 100
        assert len(drawn["c"]) == 10 and len(drawn["a"]) == 1
    assert [len(own) for own in unequal(images_of(a=5, b=7, c=2), 100, 0).values()] == [7, 5, 1]


@pytest.mark.parametrize("balanced", [False, True])
def test_balanced_classes_have_as_many_rows_as_the_largest(balanced: bool, tmp_path: Path) -> None:
    images = images_of(a=7, b=3, c=1)
    table = table_of(evened(images) if balanced else images, tmp_path)
    with Path(table.removeprefix("csv:")).open() as file:
        rows = list(csv.DictReader(file))
    for label, own in images.items():
        count = Counter(row["image"] for row in rows if row["label"] == label)
        assert set(count) == {str(path) for path in own}
        assert sum(count.values()) == (7 if balanced else len(own))
        assert max(count.values()) - min(count.values()) <= 1


def test_the_adjustment_is_the_logarithm_of_the_shares() -> None:
    rows = {"label": ["b", "a", "b", "b"]}
    found = logit_adjustment(Labelled(_Rows(rows), ["a", "b"], "image", "label"))
    assert found.tolist() == pytest.approx([math.log(0.25), math.log(0.75)])


class _Rows(dict[str, list[str]]):
    """A table of one column."""

    def __len__(self) -> int:
        return len(self["label"])


def row(name: str, shift: str, *recalls: float | None) -> Row:
    """Of the classes 0, 1, 2, ...; None is a class without images."""
    return Row(
        dataset=name,
        task="zeroshot_classification",
        source="adapter",
        alpha=0.5,
        shift=shift,
        split="test",
        metric="acc1",
        n=4,
        set_digest="",
        metrics={},
        per_class=[
            ClassFigures(str(label), 0 if recall is None else 4, recall)
            for label, recall in enumerate(recalls)
        ],
        runtime=1.0,
    )


def test_figures_are_of_all_classes_the_frequent_and_the_rare() -> None:
    rows = [
        row("photo, validation", "id", 0.5, 0.5, 0.2),
        row("sketch, validation", "ood", 0.1, None, 0.2),
        row("photo", "id", 0.9, 0.6, 0.3),
        row("art", "ood", 0.4, 0.2, 0.0),
        row("cartoon", "ood", 0.8, 0.5, 0.2),
        row("clip art", "ood", 0.6, None, 0.4),
    ]
    assert figures_of(rows, ["0", "1", "2"]) == pytest.approx(
        {
            "validation": (40 + 15) / 2,
            "in distribution": 60,
            "its frequent third": 90,
            "its rare third": 30,
            "shifts": (20 + 50 + 50) / 3,
            "their frequent third": 60,
            "their rare third": 20,
        }
    )
    assert figures_of(rows, ["2", "1", "0"])["its frequent third"] == pytest.approx(30)


def found(candidate: str, seed: int, *validation: float) -> Found:
    """Other figures follow from that of validation."""
    figures = {
        f"{alpha:g}": {name: one + number for number, name in enumerate(FIGURES)}
        for alpha, one in zip((0.5, 1.0), validation, strict=True)
    }
    return Found(candidate, seed, 7.0, figures)


def test_validation_chooses_alpha_and_leads_are_over_the_form_without_it() -> None:
    runs = {
        "R-Adapter": [found("R-Adapter", 0, 40, 30), found("R-Adapter", 1, 30, 36)],
        "R-Adapter, balanced batches": [
            found("R-Adapter, balanced batches", 0, 20, 42),
            found("R-Adapter, balanced batches", 1, 20, 34),
        ],
        "with both additions": [found("with both additions", 0, 9, 8)],
    }
    assert [best(own) for own in runs.values()] == ["0.5", "1", "0.5"]
    figures, _, leads = tables(runs)
    rows = [line.strip("| ").split(" | ") for line in figures.splitlines()]
    assert rows[0][:3] == ["way", "α", "validation"]
    assert [one[:3] for one in rows[2:]] == [
        ["R-Adapter", "0.5", "35.0 ± 7.1"],
        ["R-Adapter, balanced batches", "1", "38.0 ± 5.7"],
        ["with both additions", "0.5", "9.0"],
    ]
    rows = [line.strip("| ").split(" | ") for line in leads.splitlines()]
    # 2 and 4 points, whose interval has t of one degree of freedom
    assert rows[2:] == [["R-Adapter, balanced batches", *["+3.0 ± 12.7"] * len(FIGURES)]]


@pytest.mark.slow
def test_every_way_learns_once_and_is_judged(
    data_root: Path,
    tiny_clip_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("rivals.small.BASE", tiny_clip_dir.removeprefix("local-dir:"))
    monkeypatch.setattr("rivals.unequal.STEPS", 2)
    judged: list[Evaluation] = []
    learned: list[dict[str, Any]] = []

    def heard(*arguments: Any, **named: Any) -> Evaluation:
        judged.append(evaluate(*arguments, **named))
        return judged[-1]

    def taught(how: Callable[..., Run], *arguments: Any, **named: Any) -> Run:
        with Path(named["data"].removeprefix("csv:")).open(encoding="utf-8") as file:
            learned.append({**named, "rows": list(csv.DictReader(file))})
        return how(*arguments, **named)

    monkeypatch.setattr("rivals.small.evaluate", heard)
    monkeypatch.setattr("rivals.small.train", partial(taught, train))
    monkeypatch.setattr("rivals.loop.train", partial(taught, loop.train))
    out = tmp_path / "out"
    flags = ["--set-name", "pacs", "--data-root", str(data_root), "--seeds", "3", "--out", str(out)]
    assert main(flags) == 0
    assert capsys.readouterr().out.strip() == (out / "unequal.md").read_text().strip()
    made = (out / "unequal.json").read_text()
    runs = {run["candidate"]: run for run in json.loads(made)}
    assert list(runs) == list(WAYS)
    for way, tested, fields in zip(WAYS, judged, learned, strict=True):
        assert fields.get("negative_classes", 0) == (1000 if "additions" in way else 0)
        assert fields["learning_rate"] == (5e-3 if "additions" in way else 5e-4)
        counts = Counter(row["label"] for row in fields["rows"])
        assert (len(set(counts.values())) == 1) == ("balanced" in way)
        same = {tuple(row.values()) for row in fields["rows"]}
        assert same == {tuple(row.values()) for row in learned[0]["rows"]}
        assert (fields.get("class_offsets") is logit_adjustment) == ("adjustment" in way)
        of = {row.dataset: 100 * row.metrics["mean_per_class_recall"] for row in tested.rows[::2]}
        assert {row.alpha for row in tested.rows[::2]} == {0.5}
        figures = runs[way]["figures"]["0.5"]
        chooses = (of["photo, validation"] + of["sketch, validation"]) / 2
        assert figures["validation"] == pytest.approx(chooses)
        assert figures["in distribution"] == pytest.approx(of["photo"])
        assert figures["shifts"] == pytest.approx(of["art_painting"])
    assert main(flags) == 0
    assert (out / "unequal.json").read_text() == made
