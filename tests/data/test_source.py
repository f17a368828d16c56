"""One declaration of where data comes from: recipes, suites and adapter files agree on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from radapter_serve.data.source import RunSource
from radapter_serve.training.recipe import GROUPS, Recipe


def test_each_field_of_a_recipe_is_in_one_group() -> None:
    grouped = [name for _, fields in GROUPS.values() for name in fields]
    assert sorted(grouped) == sorted(field.name for field in dataclasses.fields(Recipe))


def test_an_adapter_files_recipe_is_read_into_one() -> None:
    fields: dict[str, Any] = {"images": Path("photos"), "val_fraction": 0.2, "seed": 3}
    recipe = Recipe(data="csv:t.csv", task="retrieval", **fields)
    source = RunSource.from_json(recipe.to_dict(), "retrieval")
    assert source == RunSource("csv:t.csv", "retrieval", **fields)
    # What a later version adds is ignored, and what an earlier one lacked has its default.
    assert RunSource.from_json({"colour": "red"}, "segmentation") == RunSource(task="segmentation")
    assert RunSource.from_json({"task": "retrieval"}, "segmentation").task == "segmentation"


@pytest.mark.parametrize(
    "value",
    [{"data": 3}, {"val_fraction": 1}, {"seed": True}, {"streaming": "yes"}, {"images": 3}],
)
def test_values_of_the_wrong_kind_are_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(value))):
        RunSource.from_json(value, "classification")
