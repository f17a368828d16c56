"""Means over data sets, in tables and in the choice of α: several sets of a shift count as one."""

from __future__ import annotations

import pytest

from radapter_serve.evaluation.alpha_choice import choose
from radapter_serve.evaluation.results import table
from radapter_serve.evaluation.row import Row
from tests.helpers.a_row import a_row

SETS = {"a": "id", "b": "id", "c": "ood", "d": "ood", "e": "ood"}
ACCURACIES = {0.25: (0.5, 0.8, 0.1, 0.3, 0.8), 0.75: (0.9, 0.3, 0.2, 0.2, 0.35)}
MEANS = {0.25: (65.0, 40.0), 0.75: (60.0, 25.0)}


def rows() -> list[Row]:
    return [
        a_row(name, value, shift=SETS[name], alpha=alpha)
        for alpha, values in ACCURACIES.items()
        for name, value in zip(SETS, values, strict=True)
    ]


def test_a_table_has_the_mean_over_sets_in_distribution_and_over_the_others() -> None:
    columns = {
        " ".join(str(column.header).split()): list(column.cells)
        for column in table(rows(), "t").columns
    }
    for number, name in enumerate(("mean of 2 id", "mean of 3 ood")):
        assert columns[name] == [f"{means[number]:.2f}" for means in MEANS.values()]


def test_the_choice_takes_the_mean_of_the_two_means() -> None:
    choice = choose(rows(), 1.0)
    assert [point["score"] for point in choice.curve] == pytest.approx(
        [sum(means) / 2 for means in MEANS.values()]
    )
    assert choice.best == 0.25
