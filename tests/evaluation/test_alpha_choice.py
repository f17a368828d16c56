"""The rule that chooses α, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from radapter_serve.adapter import Metadata
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import (
    RULE,
    Choice,
    choose,
    load_choice,
    save_choice,
)
from radapter_serve.evaluation.rows import Row, packed, table
from radapter_serve.evaluation.sets import own_validation
from tests.helpers.a_row import a_row


def rows(**sets: tuple[str, dict[float, float]]) -> list[Row]:
    return [
        a_row(name, value, shift=shift, alpha=alpha)
        for name, (shift, values) in sets.items()
        for alpha, value in values.items()
    ]


def images(right: Any, alpha: float, name: str = "a", shift: str = "id") -> Row:
    """A row of images, of which these are right, bool [N]."""
    hits = np.array(right, bool)
    return a_row(
        name, float(hits.mean()), alpha=alpha, shift=shift, n=len(hits), right=packed(hits)
    )


def of_ten(right: dict[float, str], own_alpha: float = 0.5) -> Choice:
    """The choice by ten images for each α, of which those with a 1 are right."""
    return choose([images([c == "1" for c in of], a) for a, of in right.items()], own_alpha)


def test_the_paired_interval_is_scipys() -> None:
    draw = np.random.default_rng(0)
    first, second = draw.random(150) < 0.8, draw.random(150) < 0.6
    choice = choose([images(second, 0.0), images(first, 1.0)], 1.0)
    t = scipy.stats.norm.interval(
        0.95,
        np.mean(first.astype(float) - second),
        scipy.stats.sem(first.astype(float) - second),
    )
    behind, half = choice.curve[0]["behind"], choice.curve[0]["plus_minus"]
    assert (behind - half, behind + half) == pytest.approx(t)
    assert (choice.curve[1]["behind"], choice.curve[1]["plus_minus"]) == (0, 0)


def test_sets_are_independent_and_a_shift_counts_as_much_as_all_others() -> None:
    draw = np.random.default_rng(1)
    hits = {
        name: (draw.random((2, n)) < [[0.5], [0.7]])
        for name, n in (("a", 40), ("b", 64), ("c", 90))
    }
    shifts = {"a": "id", "b": "id", "c": "ood"}
    rows = [
        images(of[place], alpha, name, shifts[name])
        for name, of in hits.items()
        for place, alpha in enumerate((0.0, 1.0))
    ]
    point = choose(rows, 1.0).curve[0]
    differences = {name: of[1].astype(float) - of[0] for name, of in hits.items()}
    means = {name: of.mean() for name, of in differences.items()}
    errors = {name: of.var(ddof=1) / len(of) for name, of in differences.items()}
    assert point["behind"] == pytest.approx(((means["a"] + means["b"]) / 2 + means["c"]) / 2)
    variance = (errors["a"] + errors["b"]) / 16 + errors["c"] / 4
    assert point["plus_minus"] == pytest.approx(scipy.stats.norm.ppf(0.975) * variance**0.5)


def test_auto_is_the_smallest_alpha_that_cannot_be_told_from_the_best() -> None:
    # 0.2 has the best one's images and one less, 0.1 six less, 0.3 three others.
    choice = of_ten(
        {0.0: "0000000011", 0.1: "0000001111", 0.2: "0111111111", 0.3: "1111111000", 0.5: "1" * 10}
    )
    assert (choice.alpha, choice.best, choice.own_alpha, choice.rule) == (0.2, 0.5, 0.5, RULE)
    assert choice.smallest == 0.2
    assert [point["behind"] for point in choice.curve] == pytest.approx([0.8, 0.6, 0.1, 0.3, 0])
    assert "one-standard-error rule" in RULE and choice.notes == (
        "No validation set is shifted, so this choice tells nothing of images in other styles than"
        " yours.",
    )


def test_the_pairs_tell_what_two_intervals_do_not() -> None:
    """Of 100 images 0.5 has six more right than 0.3, and the same others: Wilson's intervals of 50
    and 56 overlap.
    """
    rows = [
        replace(images(np.arange(100) < count, alpha), intervals={"acc1": (count / 100 - 0.1, 1.0)})
        for alpha, count in {0.0: 30, 0.3: 50, 0.5: 56}.items()
    ]
    assert choose(rows, 0.5).alpha == 0.5
    assert choose([replace(row, right=None) for row in rows], 0.5).alpha == 0.3


def test_auto_does_not_exceed_the_runs_own_alpha() -> None:
    right = {0.0: "0000000011", 0.4: "0000001111", 0.8: "0111111111", 1.0: "1111111111"}
    choice = of_ten(right, own_alpha=0.4)
    assert (choice.alpha, choice.best) == (0.4, 1.0)
    assert choice.notes[0] == (
        "alpha 1 is better on these images than the run's own alpha 0.4, which auto does not"
        " exceed; radapter-export --alpha best takes it."
    )
    assert choice.smallest == of_ten(right, own_alpha=0.8).alpha == 0.8
    assert of_ten(right, own_alpha=1.0).alpha == 0.8


def test_of_equal_scores_the_smallest_is_the_best() -> None:
    choice = of_ten({0.0: "0000000011", 0.4: "1111111110", 0.5: "0111111111", 1.0: "0111111110"})
    assert (choice.alpha, choice.best) == (0.4, 0.4)


def test_images_that_do_not_show_that_training_helped_choose_nothing() -> None:
    choice = of_ten({0.0: "0011111111", 0.3: "0111111111", 0.5: "0111111110", 1.0: "1111111110"})
    assert (choice.alpha, choice.best) == (0.5, 0.3)
    assert choice.notes[0] == (
        "alpha 0, the base as it was, can't be told from the best: these images are too few to tell"
        " that training helped, so auto takes the run's own alpha 0.5."
    )


def test_where_training_did_harm_auto_takes_what_cannot_be_told_from_the_best() -> None:
    right = {0.0: "1111111111", 0.2: "0111111111", 0.5: "0000000111", 1.0: "0" * 10}
    choice = of_ten(right)
    assert (choice.alpha, choice.best) == (0.2, 0.0)
    assert "the run's own alpha 0.5 is worse: training did not help" in choice.notes[0]
    assert of_ten({**right, 0.2: "0000000111"}).alpha == 0.0


def with_interval(found: list[Row], half: float) -> list[Row]:
    return [replace(row, intervals={"acc1": (row.metrics["acc1"] - half, 1.0)}) for row in found]


def test_without_results_of_each_image_the_interval_of_the_best_decides() -> None:
    values = {0.0: 0.3, 0.3: 0.71, 0.5: 0.72, 0.7: 0.8, 1.0: 0.82}
    plain = rows(a=("id", values))
    assert choose(with_interval(plain, 0.1), 1.0).alpha == 0.5
    assert choose(with_interval(plain, 0.11), 1.0).alpha == 0.3  # its end belongs to it
    assert choose(plain, 1.0).alpha == 1.0  # nothing says how far off they are
    two = with_interval(rows(a=("id", values), b=("id", values)), 0.1)  # 0.1 / sqrt(2) below 0.82
    assert choose(two, 1.0).alpha == 0.7


def test_what_is_kept_is_told_and_chooses_nothing() -> None:
    right = {0.0: "0000000011", 0.1: "0000001111", 0.2: "1111111111", 0.5: "0000000000"}
    share = {0.0: 1.0, 0.1: 0.92, 0.2: 0.85, 0.5: 0.3}
    found = [images([c == "1" for c in of], alpha) for alpha, of in right.items()]
    kept = [replace(row, metrics={**row.metrics, "kept": share[row.alpha or 0.0]}) for row in found]
    choice = choose(kept, 0.5)
    assert choice.alpha == choose(found, 0.5).alpha == 0.2
    assert [point["kept"] for point in choice.curve] == [1, 0.92, 0.85, 0.3]
    assert choice.kept == 0.85 and choose(found, 0.5).kept is None
    (note,) = [line for line in choice.notes if "keeps" in line]
    assert note.startswith("alpha 0.2 keeps 85.0 % of what the base answers among common nouns")
    assert (
        "alpha 0.1 keeps more, and so does training with --preserve 10 --preserve-words 3." in note
    )
    enough = [replace(row, metrics={**row.metrics, "kept": 0.9}) for row in found]
    assert not [line for line in choose(enough, 0.5).notes if "keeps" in line]
    little = [replace(row, metrics={**row.metrics, "kept": 0.5}) for row in found]
    assert "a smaller alpha keeps more" in choose(little, 0.5).notes[0]


def test_the_table_of_a_choice() -> None:
    right = {0.0: "0000000011", 0.2: "0111111111", 0.5: "1111111111"}
    found = [images([c == "1" for c in of], alpha) for alpha, of in right.items()]
    shown = choose(
        [replace(row, metrics={**row.metrics, "kept": 0.5}) for row in found], 0.5
    ).table()
    cells = {str(column.header): list(column.cells) for column in shown.columns}
    assert cells == {
        "α": ["0", "0.2", "0.5"],
        "score": ["20.00", "90.00", "100.00"],
        "behind the best": ["80.00 ± 26.13", "10.00 ± 19.60", "0.00 ± 0.00"],
        "kept": ["50.0"] * 3,
        "a": ["20.00", "90.00", "100.00"],
        "": ["", "auto", "best, the run's own"],
    }
    assert "kept" not in [column.header for column in choose(found, 0.5).table().columns]


def test_shifts_say_something_of_other_styles() -> None:
    both = [images(np.arange(9) < 5, alpha, "c", "ood") for alpha in (0.0, 0.5)]
    choice = choose([*both, *(replace(row, dataset="a", shift="id") for row in both)], 0.5)
    assert not [line for line in choice.notes if "No validation set is shifted" in line]


def test_tables_and_choices_take_the_mean_of_the_means_of_each_shift() -> None:
    shifts = {"a": "id", "b": "id", "c": "ood", "d": "ood", "e": "ood"}
    shares = {0.25: (0.5, 0.8, 0.1, 0.3, 0.8), 0.75: (0.9, 0.3, 0.2, 0.2, 0.35)}
    means = {0.25: (65.0, 40.0), 0.75: (60.0, 25.0)}
    found = [
        a_row(name, value, shift=shifts[name], alpha=alpha)
        for alpha, values in shares.items()
        for name, value in zip(shifts, values, strict=True)
    ]
    columns = {
        " ".join(str(column.header).split()): list(column.cells)
        for column in table(found, "t").columns
    }
    for number, name in enumerate(("mean of 2 id", "mean of 3 ood")):
        assert columns[name] == [f"{of[number]:.2f}" for of in means.values()]
    choice = choose(found, 1.0)
    scores = [point["score"] for point in choice.curve]
    assert scores == pytest.approx([sum(of) / 200 for of in means.values()]) and choice.best == 0.25


def test_dense_labels_and_proposals_are_no_mean() -> None:
    mixed = [a_row(name, dense=dense) for name, dense in (("a", "naclip"), ("b", "proposals"))]
    with pytest.raises(RAdapterError, match="dense segmentation and proposals are no mean"):
        choose(mixed, 0.5)


def test_a_shift_alone_chooses_nothing() -> None:
    with pytest.raises(RAdapterError, match="without an in-distribution validation set"):
        choose(rows(c=("ood", {0.0: 0.1})), 0.5)


def test_the_choice_is_kept_beside_the_adapter(tmp_path: Path) -> None:
    choice = choose(rows(a=("id", {0.0: 0.5, 0.5: 0.8})), 0.5)
    assert save_choice(choice, tmp_path / "adapter.safetensors") == tmp_path / "alpha.json"
    assert load_choice(tmp_path) == choice
    assert [path.name for path in tmp_path.iterdir()] == ["alpha.json"]


@pytest.mark.parametrize(
    ("trained", "other", "same"),
    [
        ("imagefolder:photos", "imagefolder:photos", True),
        ("imagefolder:photos", "imagefolder:./photos/", True),
        ("imagefolder:photos", "imagefolder:{here}/photos@train", True),
        ("imagefolder:photos", "imagefolder:link", True),
        ("imagefolder:photos", "imagefolder:photos@validation", False),
        ("imagefolder:photos", "imagefolder:others", False),
        ("csv:photos", "imagefolder:photos", False),
        ("a/hub", "a/hub", True),
        ("a/hub", "a/hub@test", False),
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
        assert own_validation(run, other).entries[0].data == other
        return
    with pytest.raises(RAdapterError, match=r"is what the run was trained with") as error:
        own_validation(run, other)
    assert "\n" not in str(error.value)
