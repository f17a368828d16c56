"""The nouns that a model is asked for beside the classes of a set."""

from __future__ import annotations

import open_clip
import pytest

from radapter_serve.evaluation.nouns import nouns_beside


def test_the_nouns_are_every_third_of_imagenets_names() -> None:
    names = nouns_beside(["something else"])
    assert names == list(dict.fromkeys(open_clip.IMAGENET_CLASSNAMES[::3])) and len(names) == 333
    assert nouns_beside(open_clip.IMAGENET_CLASSNAMES) == []


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("Toucan", ["toucan"]),
        ("a big toucan.", ["toucan"]),
        ("toucans", []),  # no word of it
        ("shark", ["tiger shark"]),
        ("SEA-LION", ["sea lion", "lion"]),
        ("!", []),
    ],
)
def test_what_is_a_class_or_a_part_of_one_is_no_noun(name: str, left_out: list[str]) -> None:
    kept = nouns_beside(["something else", name])
    assert [noun for noun in nouns_beside(["something else"]) if noun not in kept] == left_out
