"""The rule that chooses α, by hand."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from radapter_serve.adapter import Metadata, load_adapter
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import Choice, choose, read_choice, save_choice
from radapter_serve.evaluation.rows import Row, kept_notes, packed, what_is_kept
from radapter_serve.evaluation.run import as_trained, own_validation
from tests.helpers.a_row import a_row

UNSHIFTED = "No validation set is shifted"
AS_GOOD = "alpha 0, the base as it was, is not significantly different from the best"


def images(right: Any, alpha: float, name: str = "a", shift: str = "id", **metrics: float) -> Row:
    """A row of images, of which these are right, bool [N] or a text of 0 and 1."""
    hits = np.array([sign in (True, "1") for sign in right])
    share = float(hits.mean())
    metrics = {"acc1": share, **metrics}
    row = a_row(name, share, alpha=alpha, shift=shift, n=len(hits), metrics=metrics)
    return replace(row, right=packed(hits))


def choice_of(right: Mapping[float, str], own_alpha: float = 0.5) -> Choice:
    """The choice by images for each α, of which those with a 1 are right."""
    return choose([images(of, alpha) for alpha, of in right.items()], own_alpha)


def test_sets_are_independent_and_a_shift_counts_as_much_as_all_others() -> None:
    draw = np.random.default_rng(1)
    rows = []
    means: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    for name, n, shift in (("a", 40, "id"), ("b", 64, "id"), ("c", 90, "ood")):
        base = draw.random(n) < 0.5
        tuned: Any = draw.random(n) < 0.7
        rows += [images(base, 0.0, name, shift), images(tuned, 1.0, name, shift)]
        difference = tuned.astype(float) - base
        means[name] = difference.mean()
        errors[name] = difference.var(ddof=1) / n
    choice = choose(rows, 1.0)
    point = choice.curve[0]
    assert point.behind == pytest.approx(((means["a"] + means["b"]) / 2 + means["c"]) / 2)
    variance = (errors["a"] + errors["b"]) / 16 + errors["c"] / 4
    assert point.plus_minus == pytest.approx(scipy.stats.norm.ppf(0.975) * variance**0.5)
    assert not [line for line in choice.notes if "No validation set is shifted" in line]


@pytest.mark.parametrize(
    ("right", "own_alpha", "alpha", "best", "note"),
    [
        # Of ten images 0.2 has the best one's but one, 0.3 three less.
        ("0:0000000011 .2:0111111111 .3:1111111000 .5:1111111111", 0.5, 0.2, 0.5, UNSHIFTED),
        # At most the run's own.
        ("0:0000000011 .4:0000001111 .8:0111111111 1:1111111111", 0.4, 0.4, 1.0, "alpha 1 is"),
        # Of equal scores the smallest is the best.
        ("0:0000000011 .4:1111111110 .5:0111111111 1:0111111110", 0.5, 0.4, 0.4, UNSHIFTED),
        # Ten images can't tell that training helped: the smallest.
        ("0:0011111111 .1:0111111110 .3:0111111111 .5:0111111110", 0.5, 0.1, 0.3, AS_GOOD),
        ("0:1111111111 .2:0111111111 .5:0000000111 1:0000000000", 0.5, 0.2, 0.0, AS_GOOD),
        # Training did harm.
        ("0:1111111111 .2:0000000111 .5:0000000111", 0.5, 0.0, 0.0, f"{AS_GOOD}, and no alpha"),
        ("0:1111111111 .2:0000000111 .5:0000000111 .8:1111111111", 0.5, 0.0, 0.0, AS_GOOD),
    ],
)
def test_auto_is_the_smallest_alpha_that_can_not_be_told_from_the_best(
    right: str, own_alpha: float, alpha: float, best: float, note: str
) -> None:
    points = dict(point.split(":") for point in right.split())
    choice = choice_of({float(point): hits for point, hits in points.items()}, own_alpha)
    assert (choice.alpha, choice.best, choice.own_alpha) == (alpha, best, own_alpha)
    assert choice.notes[0].startswith(note)


def test_without_results_of_each_image_the_interval_of_the_best_decides() -> None:
    # Of 100 images 0.5 has six more right; pairs tell that apart, Wilson's intervals overlap.
    paired = [
        replace(images(np.arange(100) < count, alpha), intervals={"acc1": (count / 100 - 0.1, 1.0)})
        for alpha, count in {0.0: 30, 0.3: 50, 0.5: 56}.items()
    ]
    assert choose(paired, 0.5).alpha == 0.5
    assert choose([replace(row, right=None) for row in paired], 0.5).alpha == 0.3

    def rows(half: float, *names: str) -> list[Row]:
        shares = {0.0: 0.3, 0.3: 0.71, 0.5: 0.72, 0.7: 0.8, 1.0: 0.82}
        return [
            a_row(name, share, alpha=alpha, intervals={"acc1": (share - half, 1.0)})
            for name in names
            for alpha, share in shares.items()
        ]

    assert choose(rows(0.1, "a"), 1.0).alpha == 0.5
    assert choose(rows(0.11, "a"), 1.0).alpha == 0.3  # its end belongs to it
    assert choose(rows(0.1, "a", "b"), 1.0).alpha == 0.7  # 0.1 / sqrt(2) below 0.82
    unknown = [replace(row, intervals=None) for row in rows(0.1, "a")]
    assert choose(unknown, 1.0).alpha == 1.0


def choice_with(right: Mapping[float, str], *shares: float) -> Choice:
    """The choice by images for each α, and the share of the base's answers that each keeps."""
    points = zip(right.items(), shares, strict=True)
    return choose([images(of, alpha, kept=share) for (alpha, of), share in points], 0.5)


@pytest.mark.parametrize(
    ("shares", "alpha"),
    [
        ((1.0, 0.95, 0.85, 0.8), 0.5),  # what a good run keeps at the run's own
        ((1.0, 0.95, 0.85, 0.79), 0.3),
        ((1.0, 0.95, 0.7, 0.18), 0.1),  # as a learning rate of 5e-3 did
        ((1.0, 0.7, 0.5, 0.18), 0.0),
    ],
)
def test_without_evidence_that_training_helped_auto_keeps_what_the_base_knows(
    shares: tuple[float, ...], alpha: float
) -> None:
    right = {0.0: "0011111111", 0.1: "0011111111", 0.3: "0011111111", 0.5: "0111111111"}
    choice = choice_with(right, *shares)
    assert choice.alpha == alpha
    assert choice.notes[0].startswith(AS_GOOD) and f" {alpha:g}," in choice.notes[0]


@pytest.mark.parametrize(
    ("shares", "alpha"),
    [
        ((1.0, 0.9, 0.8, 0.5), 0.5),
        ((1.0, 0.9, 0.6, 0.49), 0.3),
        ((1.0, 0.4, 0.3, 0.2), 0.0),
    ],
)
def test_auto_never_loses_much_of_what_the_base_answers(
    shares: tuple[float, ...], alpha: float
) -> None:
    right = {0.0: "0000000000", 0.1: "0000000001", 0.3: "0000000111", 0.5: "1111111111"}
    choice = choice_with(right, *shares)
    assert choice_of(right).alpha == choice.best == 0.5
    assert choice.alpha == alpha
    is_noted = "alpha 0.5 is better on these images, but keeps less than 50%" in choice.notes[0]
    assert is_noted == (alpha < 0.5)


@pytest.mark.parametrize(
    ("share", "grade"),
    [(0.8, "no loss"), (0.79, "some loss"), (0.5, "some loss"), (0.49, "much is lost")],
)
def test_what_is_kept_has_three_grades(share: float, grade: str) -> None:
    sentence = what_is_kept(0.5, share)
    assert f"alpha 0.5 keeps {100 * share:.1f} %" in sentence
    grades = [word for word in ("no loss", "some loss", "much is lost") if word in sentence]
    assert grades == [grade]
    assert ("smaller alpha" in sentence) == (share < 0.8)


def test_without_a_choice_each_alpha_that_loses_something_is_noted() -> None:
    shares = {(0.2, "a"): 0.81, (0.2, "b"): 0.8, (0.5, "a"): 0.6, (0.5, "b"): 0.9, (1.0, "a"): 0.3}
    rows = [
        a_row(name, alpha=alpha, metrics={"acc1": 0.5, "kept": share})
        for (alpha, name), share in shares.items()
    ]
    # A set without the metric, and a model without alpha
    rows += [a_row("c", alpha=0.2), a_row("a", alpha=None, metrics={"acc1": 0.5, "kept": 0.1})]
    first, second = kept_notes(rows)
    assert first.startswith("alpha 0.5 keeps 75.0 % of") and "some loss" in first
    assert second.startswith("alpha 1 keeps 30.0 % of") and "much is lost" in second


def test_the_table_and_the_notes_say_what_is_kept() -> None:
    right = {0.0: "0000000011", 0.1: "0000001111", 0.2: "1111111111", 0.5: "0000000000"}
    choice = choice_with(right, 1.0, 0.92, 0.85, 0.3)
    assert choice.alpha == choice_of(right).alpha == 0.2
    assert (choice.kept, choice_of(right).kept) == (0.85, None)
    assert what_is_kept(0.2, 0.85) in choice.notes
    assert not any("keeps" in line for line in choice_of(right).notes)
    cells = {str(column.header): list(column.cells) for column in choice.table().columns}
    assert cells["kept"] == ["100.0", "92.0", "85.0", "30.0"]
    assert cells["score"] == cells["a"] == ["20.00", "40.00", "100.00", "0.00"]
    assert cells["behind the best"][0] == "80.00 ± 26.13"
    assert cells[""] == ["", "", "auto, best", "the run's own"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"dense": "naclip"}, {"dense": "proposals"}], "dense segmentation, of true masks"),
        ([{"dense": "proposals"}, {"dense": "proposals", "proposals": "found"}], "a network's"),
        ([{"shift": "ood"}], "without an in-distribution validation set"),
    ],
)
def test_validation_sets_that_cannot_choose_alpha_are_refused(
    rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(RAdapterError, match=message):
        choose([a_row(f"{number}", **fields) for number, fields in enumerate(rows)], 0.5)


def test_the_choice_is_kept_beside_the_adapter(run_folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    digest = load_adapter(run_folder).digest
    choice = replace(choice_of({0.0: "01", 0.5: "11"}), adapter_digest=digest)
    assert save_choice(choice, run / "adapter.safetensors") == run / "alpha.json"
    assert read_choice(run, digest) == choice
    for text, problem in (("{", "Invalid JSON"), ("{}", "alpha: Field required")):
        (run / "alpha.json").write_text(text, encoding="utf-8")
        with pytest.raises(RAdapterError, match=f"could not read .*: {problem}"):
            read_choice(run, digest)


@pytest.mark.parametrize(
    ("trained", "other", "same"),
    [
        ("imagefolder:photos", "imagefolder:{here}/photos@train", True),
        ("imagefolder:photos", "imagefolder:link", True),
        ("imagefolder:photos", "imagefolder:photos@validation", False),
        ("csv:photos", "imagefolder:photos", False),
        ("a/hub", "a/hub", True),
        ("imagefolder:photos", "photos", True),
    ],
)
def test_validation_data_that_is_the_training_data_is_refused(
    trained: str, other: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to("photos")
    other = other.format(here=tmp_path)
    run = Metadata(
        architecture="a", base_digest="sha256:1", task="classification", recipe={"data": trained}
    )
    if not same:
        for suite in (own_validation(run, other), as_trained(run, other)):
            assert suite.entries[0].data == other
        return
    with pytest.raises(RAdapterError, match=r"is what the run was trained with"):
        own_validation(run, other)
