"""Class files from official lists, of excerpts made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from radapter_serve.cli.class_file import main
from radapter_serve.data.class_ids import number_classes, read_class_ids
from radapter_serve.data.official_classes import official_classes
from radapter_serve.errors import RAdapterError

# The shape of MaskFormer's script, with those of its classes whose first names meet.
ADE = """#!/usr/bin/env python3
import os
raise SystemExit("this file is read, not run")
SIZES = [os.cpu_count(), 2, {[]: 1}]
CATEGORIES = [{"name": "wall", "id": 2978, "trainId": 0},
  {"name": "bag, handbag, purse", "id": 96, "trainId": 1},
  {"name": "bag", "id": 95, "trainId": 2},
  {"name": "screen door, screen", "id": 2251, "trainId": 3},
  {"name": "screen, crt screen", "id": 3109, "trainId": 4},
  {"name": "screen, silver screen", "id": 2254, "trainId": 5},
  {"name": "instrument panel", "id": 1332, "trainId": 6},
  {"name": "control panel", "id": 602, "trainId": 7},
  {"name": "control panel, instrument panel, control board, board", "id": 603, "trainId": 8}]
"""


def test_an_official_list_of_ade(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prepare.py").write_text(ADE)
    assert main([str(tmp_path / "prepare.py"), str(tmp_path / "classes.yaml")]) == 0
    assert f"wrote 9 classes to {tmp_path / 'classes.yaml'}" in capsys.readouterr().out
    names = read_class_ids(tmp_path / "classes.yaml")
    assert names == {
        0: "wall",
        1: "handbag, bag, purse",
        2: "bag",
        3: "screen door, screen",
        4: "screen, crt screen",
        5: "silver screen, screen",
        6: "instrument panel",
        7: "control panel",
        8: "control board, control panel, instrument panel, board",
    }
    index, entries = number_classes(names)
    assert (
        list(index.values()) == list(range(9)) and len(entries) == 9
    )  # none is merged with another


def test_an_official_list_of_pascal_context(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text(
        "1: accordion\n2: aeroplane\n\n 3 : air conditioner \n431: unknown\n"
    )
    assert official_classes(tmp_path / "labels.txt") == {
        0: "accordion",
        1: "aeroplane",
        2: "air conditioner",
        430: "unknown",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.py", None, "cannot read .*none.py: No such file"),
        ("a.py", "def (", "could not read the class list .*a.py: invalid syntax"),
        ("a.py", "A = [1, 2]", "it holds no list of"),
        ("a.py", "A = [{'name': 'wall', 'trainId': -1}]", "it holds no list of"),
        ("a.json", '{"name": "wall"}', "it holds no list of"),
        ("a.json", "[", "could not read the class list"),
        ("a.txt", "accordion\naeroplane\n", "it has no lines such as '1: accordion'"),
        ("a.txt", "0: empty\n1: accordion\n", "which count from 1"),
        (
            "a.py",
            "A = [{'name': 'bag', 'trainId': 0}, {'name': 'bag', 'trainId': 4}]",
            "0 and 4 are both 'bag'",
        ),
        ("a.py", "(" * 500, "could not read the class list"),
    ],
)
def test_lists_that_can_not_be_used(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RAdapterError, match=message) as error:
        official_classes(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_place_that_can_not_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.txt").write_text("1: accordion\n")
    for out, message in (("c.txt", "is no YAML file"), ("none/c.yaml", "no folder")):
        assert main([str(tmp_path / "labels.txt"), str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["labels.txt"]
