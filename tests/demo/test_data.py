"""The demo's data: nothing is trained on and tested, and the trainer reads the folders."""

from __future__ import annotations

import csv
import random
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from benchmarks.drawings.iconify import LICENCES, load_roles
from radapter_serve.contract.labels import read_label_file, split_label
from radapter_serve.data.masks import load_masked
from radapter_serve.data.source import DataSource
from radapter_serve.demo import data
from radapter_serve.errors import RAdapterError

PLACES = ("train", "val", "test", *(f"shifts/{style}" for style in data.SHIFTS))
FEW = 4


def sets_of(place: str) -> set[str]:
    """Those whose drawings are in a place."""
    return {
        path.rsplit("/", 1)[1].split("--")[0]
        for path in data.drawings()
        if path.startswith(f"{place}/")
    }


def test_no_drawing_is_in_two_places_and_the_shifts_are_by_unseen_hands() -> None:
    assert {path.rsplit("/", 2)[0] for path in data.drawings()} == set(PLACES)
    held = {
        place: {svg for of in data.drawings_of(place).values() for svg in of} for place in PLACES
    }
    for place, other in combinations(PLACES, 2):
        assert not held[place] & held[other], (place, other)
    held_out = load_roles().held_out  # from training the base
    for place in PLACES:
        assert sets_of(place) <= held_out
        assert place in PLACES[:3] or not sets_of(place) & sets_of("train")
    # Every class can be learned.
    names = [split_label(line)[0] for line in read_label_file(data.CLASSES)]
    assert names == sorted(names) == sorted(data.drawings_of("train"))
    assert all(set(data.drawings_of(place)) <= set(names) for place in PLACES)


def test_every_set_is_credited_and_asks_for_no_licence() -> None:
    text = (data.DRAWINGS.parent / "ATTRIBUTION.md").read_text(encoding="utf-8")
    table = text.partition("## The drawings")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| ([\d,]+) \|.*\| (\S+) \|$", table, re.MULTILINE)
    count = Counter(path.rsplit("/", 1)[1].split("--")[0] for path in data.drawings())
    assert {name: int(number.replace(",", "")) for name, number, _ in rows} == count
    assert {licence for *_, licence in rows} <= set(LICENCES)


def test_folders_hold_what_is_shipped_on_white_paper_and_silhouettes_on_black(
    some: data.DemoData,
) -> None:
    assert tuple(some.test) == (data.FINE_TUNED, *data.SHIFTS)
    folder = some.classes.parent
    drawings = {
        path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.png")
    }
    classes = {path.split("/")[-2] for path in drawings}
    assert drawings == {
        p.removesuffix(".svg") for p in data.drawings() if p.split("/")[-2] in classes
    }
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


def test_a_finished_folder_is_taken_as_it_is(some: data.DemoData, folder: data.SceneData) -> None:
    images = [next(some.train.glob("*/*.png")), next((folder.train / "images").iterdir())]
    changed = [image.stat().st_mtime_ns for image in images]
    assert data.prepare(some.classes.parent) == some
    assert data.prepare_scenes(folder.train.parent) == folder
    assert [image.stat().st_mtime_ns for image in images] == changed


def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RAdapterError, match="cannot write into"):
        data.prepare(tmp_path / "file" / "images")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> data.SceneData:
    place = tmp_path_factory.mktemp("demo") / "scenes"
    return data.prepare_scenes(place, train=FEW, test=FEW)


def test_a_mask_is_where_the_drawings_cover_the_paper() -> None:
    paper = len(data.scene_classes())
    both = np.zeros(3)  # pixels that are painted, inside, and both
    for scene in data.compose("test", "emoji-noto", 3 * FEW, 0):
        background = Image.new("RGB", scene.image.size, scene.image.getpixel((0, 0)))
        painted = np.asarray(ImageChops.difference(scene.image, background)).max(axis=2) > 0
        inside = scene.mask != paper
        both += [painted.sum(), inside.sum(), (painted & inside).sum()]
        lines = [data.scene_classes()[number] for number in np.unique(scene.mask[inside])]
        assert lines == sorted(scene.shown)
    assert both[2] > 0.9 * both[1]
    assert both[2] > 0.8 * both[0]  # half transparent edges are painted and not inside


def test_scenes_show_drawings_of_their_own_place_and_styles_the_same_scenes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[str] = []

    def note(svg: str) -> Image.Image:
        shown.append(svg)
        return Image.new("RGBA", (data.CELL, data.CELL))

    monkeypatch.setattr(data, "rendered", note)
    for split, style, place in (("train", "colour", "train"), ("test", "filled", "shifts/filled")):
        shown.clear()
        assert list(data.compose(split, style, 10, 0))  # type: ignore[arg-type]
        known = {svg for of in data.drawings_of(place).values() for svg in of}
        assert shown and set(shown) <= known
    monkeypatch.undo()
    colour, noto = (list(data.compose("test", style, FEW, 1)) for style in ("colour", "emoji-noto"))
    for first, second in zip(colour, noto, strict=True):
        assert first.shown == second.shown
        assert first.image.tobytes() != second.image.tobytes()
        assert first.image.getpixel((0, 0)) == second.image.getpixel((0, 0))


def test_the_folders_are_data_of_masks_and_of_captions(folder: data.SceneData) -> None:
    folders = [(folder.train, data.compose("train", "colour", FEW, 0))]
    folders += [(path, data.compose("test", style, FEW, 0)) for style, path in folder.test.items()]
    for place, drawn in folders:
        composed = list(drawn)
        masked = load_masked(DataSource(f"masks:{place}", classes=folder.classes))
        assert masked.classes == list(data.scene_classes())
        lines = (place / "captions.csv").read_text(encoding="utf-8").splitlines()
        rows = list(csv.DictReader(lines))
        assert len(rows) == FEW * data.CAPTIONS
        for scene, image, row in zip(composed, masked.images, rows[:: data.CAPTIONS], strict=True):
            assert Image.open(image.path).tobytes() == scene.image.tobytes()
            inside = scene.mask < len(masked.classes)
            np.testing.assert_array_equal(image.mask()[inside], scene.mask[inside])
            assert (image.mask()[~inside] < 0).all()  # the paper is ignored
            assert len(image.segments()) == len(scene.shown)
            assert (place / row["image"]).samefile(image.path)
            assert all(split_label(line)[0] in row["caption"] for line in scene.shown)
    gallery = list(csv.DictReader(folder.gallery.read_text(encoding="utf-8").splitlines()))
    assert len(gallery) == FEW * len(folder.test)
    assert all((folder.gallery.parent / row["image"]).is_file() for row in gallery)


def test_captions_name_all_that_is_shown() -> None:
    shown = ["home, house", "key", "search, magnifying glass, magnifier"]
    for seed in range(9):
        names, words = (
            re.split(", | and ", caption.partition(" of ")[2])
            for caption in data.captions(shown, random.Random(seed))
        )
        assert sorted(names) == ["home", "key", "search"]
        assert sorted(next(of for of in shown if word in of.split(", ")) for word in words) == shown
