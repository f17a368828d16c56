"""One declaration of where data comes from: recipes, suites and adapter files agree on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from radapter_serve.data.source import DataSource, RunSource, users
from radapter_serve.evaluation.suite import Entry
from radapter_serve.training.recipe import GROUPS, Recipe


def names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def test_a_recipe_and_an_entry_have_the_fields_of_a_data_source() -> None:
    own = names(DataSource)
    for kind in (Recipe, RunSource, Entry):
        inherited = [field for field in dataclasses.fields(kind) if field.name in own]
        assert [field.name for field in inherited] == own
        assert [field.default for field in inherited] == [
            field.default for field in dataclasses.fields(DataSource)
        ]


def test_each_field_of_a_recipe_is_in_one_group() -> None:
    grouped = [name for _, fields in GROUPS.values() for name in fields]
    assert sorted(grouped) == sorted(names(Recipe))


def test_the_tasks_that_use_a_field_stand_beside_it() -> None:
    assert users(DataSource) == {
        "image_column": ("classification", "retrieval"),
        "label_column": ("classification",),
        "label_separator": ("classification",),
        "caption_column": ("retrieval",),
        "classes": ("classification", "segmentation"),
        "class_split": ("classification",),
    }
    of_recipe = dict(users(Recipe))
    assert of_recipe.pop("negative_classes") == ("classification", "segmentation")
    assert users(DataSource).items() < users(RunSource).items() == of_recipe.items()
    assert users(Entry)["max_captions"] == ("retrieval",)


def test_an_adapter_files_recipe_is_read_into_one() -> None:
    recipe = Recipe(
        data="csv:t.csv", task="retrieval", images=Path("photos"), val_fraction=0.2, seed=3
    )
    found = RunSource.from_json(recipe.to_dict(), "retrieval")
    assert found == RunSource(
        "csv:t.csv", "retrieval", images=Path("photos"), val_fraction=0.2, seed=3
    )
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
