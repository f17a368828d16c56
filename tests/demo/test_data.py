"""The demo's data: nothing is trained on and tested, all are credited, and the folders are what the
trainer reads.
"""

from __future__ import annotations

import json
import lzma
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.drawings.iconify import LICENCES, load_roles
from radapter_serve.contract.labels import read_label_file, split_label
from radapter_serve.demo import data
from radapter_serve.errors import RAdapterError

PLACES = ("train", "val", "test", *(f"shifts/{style}" for style in data.SHIFTS))


def sets_of(place: str) -> set[str]:
    """Those whose drawings are in a place."""
    return {
        path.rsplit("/", 1)[1].split("--")[0]
        for path in data.drawings()
        if path.startswith(f"{place}/")
    }


def test_no_drawing_is_in_two_places() -> None:
    assert {path.rsplit("/", 2)[0] for path in data.drawings()} == set(PLACES)
    held = {
        place: {svg for of in data.drawings_of(place).values() for svg in of} for place in PLACES
    }
    for one, other in combinations(PLACES, 2):
        assert not held[one] & held[other], (one, other)


def test_the_shifts_are_by_hands_that_neither_base_nor_fine_tuning_has_seen() -> None:
    held_out = load_roles().held_out  # from training the base
    for place in PLACES:
        assert sets_of(place) <= held_out
        assert place in PLACES[:3] or not sets_of(place) & sets_of("train")


def test_every_class_can_be_learned_and_has_a_prompt() -> None:
    names = [split_label(line)[0] for line in read_label_file(data.CLASSES)]
    assert names == sorted(names) == sorted(data.drawings_of("train"))
    assert len(names) > 200
    assert all(set(data.drawings_of(place)) <= set(names) for place in PLACES)
    assert all("{}" in line for line in data.TEMPLATES.read_text(encoding="utf-8").splitlines())


def test_every_set_is_credited_and_asks_for_no_licence() -> None:
    text = (data.DRAWINGS.parent / "ATTRIBUTION.md").read_text(encoding="utf-8")
    table = text.partition("## The drawings")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| ([\d,]+) \|.*\| (\S+) \|$", table, re.MULTILINE)
    count = Counter(path.rsplit("/", 1)[1].split("--")[0] for path in data.drawings())
    assert {name: int(number.replace(",", "")) for name, number, _ in rows} == count
    assert {licence for *_, licence in rows} <= set(LICENCES)


def test_folders_hold_what_is_shipped(some: data.DemoData) -> None:
    assert tuple(some.test) == (data.FINE_TUNED, *data.SHIFTS)
    folder = some.classes.parent
    made = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.png")}
    classes = {path.split("/")[-2] for path in made}
    assert made == {p.removesuffix(".svg") for p in data.drawings() if p.split("/")[-2] in classes}
    for place in (some.train, some.val, *some.test.values()):
        assert any(place.glob("*/*.png")), place


def test_drawings_are_on_white_paper_and_silhouettes_on_black(some: data.DemoData) -> None:
    for style, ground in (("line", 255), ("silhouettes", 0)):
        corners = []
        for path in some.test[style].glob("*/*.png"):
            pixels = np.asarray(Image.open(path))
            assert pixels.shape == (data.SIDE, data.SIDE, 3)
            values, count = np.unique(pixels, return_counts=True)
            assert values[count.argmax()] in (ground, 255 - ground)
            assert np.ptp(pixels, axis=2).max() == 0
            corners.append(pixels[0, 0])
        assert np.median(corners) == ground


def test_a_finished_folder_is_taken_as_it_is(some: data.DemoData) -> None:
    image = next(some.train.glob("*/*.png"))
    changed = image.stat().st_mtime_ns
    assert data.prepare(some.classes.parent, quiet=True) == some
    assert image.stat().st_mtime_ns == changed


def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RAdapterError, match="could not make the demo's images"):
        data.prepare(tmp_path / "file" / "images", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_missing_styles_are_drawn_beside_those_that_are_there(
    some: data.DemoData, tmp_path: Path
) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "classes.txt").write_text("bell\n")
    (shipped / "templates.txt").write_text("{}\n")
    svg = data.drawings_of("train")["bell"][0]
    places = [f"{place}/bell/a--b.svg" for place in ("train", "val", "test", "shifts/line")]
    with lzma.open(shipped / "drawings.json.xz", "wt") as file:
        json.dump(dict.fromkeys(places, svg), file)
    few = data.prepare(tmp_path / "images", styles=("colour",), shipped=shipped, quiet=True)
    assert list(few.test) == ["colour"] and not (tmp_path / "images" / "shifts").exists()
    (few.train / "mark").touch()
    both = data.prepare(tmp_path / "images", styles=("colour", "line"), shipped=shipped, quiet=True)
    assert [*both.test] == ["colour", "line"] and (few.train / "mark").exists()
    assert [path.name for path in both.test["line"].rglob("*.png")] == ["a--b.png"]
