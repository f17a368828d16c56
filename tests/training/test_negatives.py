"""Which classes a batch is contrasted with beside its own, and how processes share their texts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radapter_serve.data.labelled import Labelled
from radapter_serve.training.step import other_prompts, share


@pytest.fixture
def data() -> Labelled:
    classes = ["cat, tabby", "missile", "projectile", "missile, rocket", "dog"]
    templates = ["a {}", "the {}."]
    return Labelled([], classes, "image", "label", Path(), templates)


def test_every_absent_class_has_one_prompt(data: Labelled) -> None:
    found = other_prompts(data, [2, -1], 9, random.Random(1))
    of_labels = {
        label: text.removeprefix("a ").removeprefix("the ").rstrip(".")
        for label, text in found.items()
    }
    assert of_labels == {0: "cat", 1: "missile", 3: "missile", 4: "dog"}
    names = of_labels.values()
    drawn = [other_prompts(data, [2], 1, random.Random(seed)) for seed in range(30)]
    seen = {text for one in drawn for text in one.values()}
    forms = {form.format(name) for form in ("a {}", "the {}.") for name in names}
    assert seen == forms  # one class and one template of them, drawn
    assert other_prompts(data, range(5), 9, random.Random(1)) == {}


def test_a_class_of_the_same_name_is_no_negative(data: Labelled) -> None:
    found = other_prompts(data, [1], 9, random.Random(1))
    assert len(found) == 3 and not any("missile" in text for text in found.values())


@given(count=st.integers(0, 9), processes=st.integers(1, 4))
def test_shares_are_equally_long_and_the_texts_in_their_order(count: int, processes: int) -> None:
    texts = [f"text {number}" for number in range(count)]
    parts = [share(texts, process, processes) for process in range(processes)]
    assert len({len(part) for part in parts}) == 1
    together = [text for part in parts for text in part]
    assert together[:count] == texts
    assert set(together[count:]) <= set(texts[:1]) and len(together) - count < processes
