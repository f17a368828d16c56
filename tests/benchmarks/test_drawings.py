"""The benchmark of drawings, made of a small package: names, licences, near-duplicates."""

from __future__ import annotations

import csv
import json
import lzma
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks.drawings import build, iconify, pairs, ship, unseen
from benchmarks.drawings.iconify import Classes, Roles, drawings, load_roles, render, sources
from radapter_serve.demo import data

SHAPES = {
    "star": (
        '<path fill="currentColor" d="m12 1 3 8h8l-6 5 2 9-7-6-7 6 2-9-6-5h8zM0 24V10l14 14z"/>'
    ),
    "moon": '<path fill="currentColor" d="M14 2a10 10 0 1 0 8 14A9 9 0 0 1 14 2z"/>',
    "house": '<path fill="currentColor" d="M12 2 1 12h3v10h16V12h3z"/>',
    "key": '<path fill="currentColor" d="M6 13a5 5 0 1 0 5 5l3-3h3v-3l5-6V2h-4z"/>',
    "flag": '<path fill="currentColor" d="M3 1h3v22H3zM6 2h16l-5 5 5 5H6z"/>',
    "box": '<path fill="currentColor" d="M3 3h6v12h12v6H3z"/>',
}


def icon_set(
    folder: Path, name: str, icons: dict[str, str], licence: str = "MIT", **facts: object
) -> None:
    """Add a set of drawings, 24 units wide, to the package."""
    (folder / "json").mkdir(parents=True, exist_ok=True)
    bodies = {key: {"body": body} for key, body in icons.items()}
    document = {"prefix": name, "width": 24, "height": 24, "icons": bodies}
    (folder / "json" / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    listed = folder / "collections.json"
    known = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else {}
    known[name] = {
        "name": name.title(),
        "author": {"name": f"Author of {name}"},
        "license": {"spdx": licence},
        **facts,
    }
    listed.write_text(json.dumps(known), encoding="utf-8")


def turned(shape: str, degrees: int) -> str:
    """Another hand's drawing of the same thing: the shape turned, which is no near-duplicate."""
    move = f"rotate({degrees} 12 12) translate(3 3) scale(.75)"
    return f'<g transform="{move}">{SHAPES[shape]}</g>'


def pixels(body: str, side: int, width: int = 24, height: int = 24) -> np.ndarray:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    drawn = render(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{body}</svg>', side)
    assert drawn is not None
    return drawn


def files(folder: Path, pattern: str = "*.*") -> dict[str, bytes]:
    paths = folder.rglob(pattern)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets by seven hands, and four whose licences don't let anyone pass them on."""
    folder = tmp_path_factory.mktemp("drawings") / "package"
    seen = {"star": SHAPES["star"], "crescent-outline": SHAPES["moon"], "acme": SHAPES["box"]}
    lines = {
        "star-filled": SHAPES["star"],
        "star-2": turned("star", 75),
        "moon": turned("moon", 170),
    }
    colours = {}
    for number, degrees in enumerate((20, 50, 110, 140, 200, 230)):
        for shape in ("star", "moon"):
            body = turned(shape, degrees)
            colours[f"{shape}-{number}"] = body
            colours[f"{shape}-{number}-flat"] = f'<g color="#900">{body}</g>'
    copies = {"fallen-star": turned("star", 75), "moon": turned("moon", 290)}
    icon_set(folder, "seen", seen)
    icon_set(folder, "alike", {"home": SHAPES["house"]}, "CC-BY-SA-4.0")
    icon_set(folder, "kept", {"key": SHAPES["key"]})
    icon_set(folder, "brands", {"acme": SHAPES["flag"], "star": SHAPES["star"]}, "CC0-1.0")
    icon_set(folder, "colours", colours, "CC-BY-4.0", palette=True)
    icon_set(folder, "lines", lines)
    icon_set(folder, "copies", copies, "CC-BY-SA-4.0")
    for licence in ("CC-BY-NC-4.0", "CC-BY-ND-4.0", "GPL-3.0-only", ""):
        icon_set(folder, f"closed {licence}", {"star": SHAPES["star"]}, licence)
    return folder


@pytest.fixture(scope="module")
def roles(package: Path) -> Roles:
    """The roles of that package's data sets."""
    document = {
        "fine_tuned": {"name": "colour", "sets": [{"set": "colours"}]},
        "shifts": [
            {"name": "line", "sets": [{"set": "lines"}]},
            {"name": "black", "paper": "black", "sets": [{"set": "copies"}]},
        ],
        "base_validation": ["kept"],
        "unused": [["brands"]],
        "brands": ["brands"],
    }
    path = package.with_name("roles.yaml")
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return load_roles(path)


@pytest.fixture(scope="module")
def classes(package: Path) -> Classes:
    """Two classes, and a house that is none."""
    file = package.with_name("classes.txt")
    file.write_text("star, pentagram | shining star\nmoon | crescent\n", encoding="utf-8")
    synonyms = package.with_name("synonyms.txt")
    synonyms.write_text("home, house\n", encoding="utf-8")
    return Classes(file, synonyms)


@pytest.fixture(scope="module")
def drawn_pairs(package: Path, roles: Roles) -> Path:
    folder = package.with_name("pairs")
    assert pairs.write_pairs(package, folder, roles, side=96, processes=1) == 3
    return folder


@pytest.fixture(scope="module")
def folders(package: Path, drawn_pairs: Path, roles: Roles, classes: Classes) -> Path:
    """The benchmark's folders."""
    folder = package.with_name("data")
    build.build(package, drawn_pairs, folder, roles, classes)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_a_drawing_is_rendered_whole_and_centred(tmp_path):
    expected = np.zeros((8, 8, 4), np.uint8)
    expected[:, :4, 3] = 255
    np.testing.assert_array_equal(pixels('<path d="M0 0h12v24H0z"/>', 8), expected)
    wide = pixels('<path d="M0 0h24v12H0z"/>', 8, height=12)
    rows = np.repeat([0, 0, 255, 255, 255, 255, 0, 0], 8).reshape(8, 8)
    np.testing.assert_array_equal(wide[..., 3], rows)
    icon_set(tmp_path, "shapes", {"nothing": "<g/>", "torn": "<path d="})
    assert [render(drawing.svg, 8) for drawing in drawings(tmp_path, "shapes")] == [None, None]


def test_only_licences_that_let_anyone_pass_drawings_on(package):
    names = {"seen", "alike", "kept", "brands", "colours", "lines", "copies"}
    assert set(sources(package)) == names


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        ("magnifying glass", "search"),  # a synonym
        ("camera off circle", "camera"),  # beside words that change nothing
        ("claw hammer", "hammer"),  # the last word
        ("clouds", "cloud"),  # one of many
        ("mobile phone", "mobile phone"),  # the longest name
        ("check", "check"),  # a symbol alone is a class, beside something it is a mark on it
        ("calendar check", "calendar"),
        ("calendar search", None),  # two classes
        ("hot dog", None),  # a name that means something else
    ],
)
def test_the_class_that_a_name_means(words, meaning):
    classes = Classes()
    expected = meaning if meaning in classes.names else None
    assert meaning is None or meaning in classes.meanings.values()
    assert classes.of(words) == expected


def test_near_duplicates_are_found_whatever_their_size_and_place():
    marks = []
    for place in ("", ' transform="translate(4 1) scale(.7)"'):
        drawn = [pixels(f"<g{place}>{body}</g>", 48) for body in SHAPES.values()]
        marks.append(np.stack([iconify.signature(drawing) for drawing in drawn]))
    np.testing.assert_array_equal(iconify.alike(*marks), np.eye(len(SHAPES), dtype=bool))


def test_pairs_are_of_nobody_that_is_tested(package, drawn_pairs):
    listed = rows(drawn_pairs / "pairs.csv")
    assert [(row["set"], row["words"], row["style"], row["split"]) for row in listed] == [
        ("kept", "key", "", "validation"),
        ("seen", "crescent", "line", "train"),
        ("seen", "star", "", "train"),
    ]  # neither share-alike nor brands
    stored = np.load(drawn_pairs / "pixels.npy", mmap_mode="r")
    [star] = [drawing.svg for drawing in drawings(package, "seen") if drawing.name == "star"]
    drawn = render(star, 96)
    assert drawn is not None
    np.testing.assert_array_equal(stored[2], drawn)
    credit = (drawn_pairs / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "| `seen` | 2 | Seen | Author of seen | MIT |" in credit and "alike" not in credit


def test_the_folders_are_disjoint_whole_and_always_the_same(
    package, drawn_pairs, folders, roles, classes, tmp_path
):
    folder = tmp_path / "again"
    count = build.build(package, drawn_pairs, folder, roles, classes)
    assert files(folder) == files(folders)
    listed = rows(folder / "index.csv")
    images = files(folder, "*.png")
    assert {row["path"] for row in listed} == set(images) and sum(count.values()) == len(images)
    assert count == Counter(row["split"] for row in listed)
    assert {"train", "val", "test"} <= set(count)

    # The colourings of a drawing are in one place, one of them alone where nothing is trained.
    drawn: dict[str, list[str]] = {}
    for row in listed:
        if row["style"] == "colour":
            drawn.setdefault(row["name"].removesuffix("-flat"), []).append(row["split"])
    assert len(drawn) == 12
    for splits in drawn.values():
        assert splits in (["train", "train"], ["val"], ["test"])
    # The base has seen lines:star-filled in `seen`; copies:fallen-star is lines:star-2 again.
    others = {(row["set"], row["name"]) for row in listed if row["style"] != "colour"}
    assert others == {("lines", "star-2"), ("lines", "moon"), ("copies", "moon")}
    for place, paper in (("line/moon/lines--moon", 255), ("black/moon/copies--moon", 0)):
        with Image.open(folder / "shifts" / f"{place}.png") as image:
            assert image.getpixel((1, 1)) == (paper,) * 3
    assert (folder / "classes.txt").read_text(encoding="utf-8") == "moon\nstar, pentagram\n"
    credit = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert credit.count("Author of") == 3 and "| `colours` |" in credit


def test_what_is_shipped_makes_the_same_folders_without_share_alike(
    package, drawn_pairs, folders, tmp_path
):
    for name in ("first", "second"):
        out = tmp_path / name
        out.mkdir()
        shipped = ship.ship(package, drawn_pairs, folders, out, out / "A.md")
    first = files(tmp_path / "first")
    assert first == files(tmp_path / "second")
    assert json.loads(lzma.decompress(first["drawings.json.xz"])) == shipped
    credit = first["A.md"].decode()
    assert "| `lines` | 2 |" in credit  # of lines:star-filled there is no test
    assert "copies" not in credit
    assert "| `seen` | 2 |" in credit.partition("## What the base was trained on")[2]
    data.prepare(tmp_path / "made", shipped=tmp_path / "first")
    for name in ("classes.txt", "templates.txt"):
        assert (tmp_path / "made" / name).read_bytes() == first[name]
    built = files(folders, "*.png")
    rest = {path: image for path, image in built.items() if "copies--" not in path}
    assert files(tmp_path / "made", "*.png") == rest and len(rest) < len(built)


def test_emoji_of_other_names_are_written_in_colour_and_as_lines(tmp_path, classes):
    (tmp_path / "openmoji" / "svg").mkdir(parents=True)
    svg = (
        '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"><g id="color">'
        '<path fill="#f00" d="M10 10h50v50h-50z"/></g><g id="line"><path d="M5 5h20v20h-20z"/></g>'
        '<g id="line-supplement"><path d="M50 50h9v9h-9z"/></g></svg>'
    )
    # A fox; a glowing star, which is a class; a skin tone; a sign below the first; a family.
    for code in ("1F98A", "1F31F", "1F3FB", "2B50", "1F468-200D-1F466"):
        (tmp_path / "openmoji" / "svg" / f"{code}.svg").write_text(svg, encoding="utf-8")
    assert unseen.write_emoji(tmp_path, tmp_path / "out", classes) == 1
    written = files(tmp_path / "out")
    assert set(written) == {"colour/fox face/1F98A.png", "line/fox face/1F98A.png"}
    colours = {}
    for style in ("colour", "line"):
        with Image.open(tmp_path / "out" / style / "fox face" / "1F98A.png") as image:
            colours[style] = set(map(tuple, np.asarray(image).reshape(-1, 3).tolist()))
    red = (255, 0, 0)
    assert red in colours["colour"] and red not in colours["line"]
    assert (0, 0, 0) in colours["line"]
