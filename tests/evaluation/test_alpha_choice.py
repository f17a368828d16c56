"""The rule that chooses α, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from radapter_serve.adapter import Metadata
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import (
    RULE,
    RULE_SHIFTED,
    choose,
    load_choice,
    save_choice,
)
from radapter_serve.evaluation.row import Row
from radapter_serve.evaluation.run import own_validation
from tests.helpers.a_row import a_row


def rows(**sets: tuple[str, dict[float, float]]) -> list[Row]:
    return [
        a_row(name, value, shift=shift, alpha=alpha)
        for name, (shift, values) in sets.items()
        for alpha, value in values.items()
    ]


def test_the_best_on_validation_and_of_equal_ones_the_smallest() -> None:
    choice = choose(rows(a=("id", {0.0: 0.5, 0.5: 0.8, 0.7: 0.8, 1.0: 0.7})))
    assert (choice.alpha, choice.rule) == (0.5, RULE)
    assert [point["score"] for point in choice.curve] == pytest.approx([50, 80, 80, 70])


def with_interval(found: list[Row], half: float) -> list[Row]:
    return [replace(row, intervals={"acc1": (row.metrics["acc1"] - half, 1.0)}) for row in found]


def test_the_smallest_within_the_interval_of_the_best() -> None:
    values = {0.0: 0.5, 0.3: 0.71, 0.5: 0.72, 0.7: 0.8, 1.0: 0.82}
    plain = rows(a=("id", values))
    choice = choose(with_interval(plain, 0.1))
    assert (choice.alpha, choice.smallest, choice.smaller, choice.shifted) == (1.0, 0.5, 0.5, False)
    assert (
        choose(with_interval(plain, 0.11)).smallest == 0.3
    )  # the end of the interval belongs to it
    assert (
        choose(with_interval(plain, 0.4)).smallest == 0.0
    )  # the base itself, which is no choice to offer
    assert choose(with_interval(plain, 0.4)).smaller is None
    assert (
        choose(with_interval(plain, 0.01)).smallest,
        choose(with_interval(plain, 0.01)).smaller,
    ) == (1.0, None)
    assert choose(plain).smallest is None  # nothing says how far off they are


def test_the_interval_of_a_mean_over_sets_is_narrower() -> None:
    values = {0.0: 0.5, 0.5: 0.74, 0.7: 0.75, 1.0: 0.82}
    assert choose(with_interval(rows(a=("id", values)), 0.1)).smallest == 0.5
    two = with_interval(rows(a=("id", values), b=("id", values)), 0.1)  # 0.1 / sqrt(2) below 0.82
    assert choose(two).smallest == 0.7


def test_where_a_set_is_shifted_nothing_else_is_offered() -> None:
    both = with_interval(rows(a=("id", {0.5: 0.7, 1.0: 0.8}), c=("ood", {0.5: 0.6, 1.0: 0.6})), 0.3)
    choice = choose(both)
    assert (choice.alpha, choice.smallest, choice.smaller, choice.shifted) == (
        1.0,
        None,
        None,
        True,
    )


def test_a_shift_counts_as_much_as_all_sets_in_distribution() -> None:
    one = {0.0: 0.4, 0.5: 0.7, 1.0: 0.9}
    two = {0.0: 0.6, 0.5: 0.9, 1.0: 1.0}
    shifted = {0.0: 0.5, 0.5: 0.6, 1.0: 0.3}
    choice = choose(rows(a=("id", one), b=("id", two), c=("ood", shifted)))
    assert (choice.alpha, choice.rule) == (0.5, RULE_SHIFTED)
    assert [point["score"] for point in choice.curve] == pytest.approx([50, 70, 62.5])
    assert choose(rows(a=("id", one), b=("id", two))).alpha == 1.0


def test_dense_labels_and_proposals_are_no_mean() -> None:
    mixed = [a_row(name, dense=dense) for name, dense in (("a", "naclip"), ("b", "proposals"))]
    with pytest.raises(RAdapterError, match="dense segmentation and proposals are no mean"):
        choose(mixed)


def test_a_shift_alone_chooses_nothing() -> None:
    with pytest.raises(RAdapterError, match="without an in-distribution validation set"):
        choose(rows(c=("ood", {0.0: 0.1})))


def test_the_choice_is_kept_beside_the_adapter(tmp_path: Path) -> None:
    choice = choose(rows(a=("id", {0.0: 0.5, 0.5: 0.8})))
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
