"""The names that the classes of a data set get in prompts."""

from __future__ import annotations

import random
from pathlib import Path

import open_clip
import pytest
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from radapter_serve.data.labelled import load_labelled, prompt_names
from radapter_serve.data.source import DataSource
from radapter_serve.errors import RAdapterError
from radapter_serve.training import Recipe
from radapter_serve.training.data import open_run

# from the list of ImageNet's classes: id, number
MISSILE = "n03773504"
PROJECTILE = "n04008634"
TENCH = "n01440764"
SUNGLASS = "n04355933"
SUNGLASSES = "n04356056"


def folders(root: Path, *names: str) -> str:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / "a.png")
    return f"imagefolder:{root}"


def prompts(data: object) -> dict[str, str]:
    """The prompt of each image, by its folder."""
    prompts = {}
    for row in data.rows:  # type: ignore[attr-defined]
        _, _, prompt = data.pair(row, random.Random(0))  # type: ignore[attr-defined]
        prompts[Path(data.name(row)).parent.name] = prompt  # type: ignore[attr-defined]
    return prompts


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def table(folder: Path, *labels: object) -> str:
    lines = [f'a.png,"{label}"' for label in labels]
    return f"csv:{write(folder / 't.csv', 'image,label', *lines)}"


@pytest.mark.parametrize(
    ("lines", "truck", "car"),
    [
        (None, "fire truck", "car"),
        (["fire_truck: fire engine, truck", "car: automobile"], "fire engine", "automobile"),
        (["car: automobile", "fire_truck: fire engine, truck"], "fire engine", "automobile"),
        (["automobile, car", "fire engine, Fire truck"], "fire engine", "automobile"),
        (["fire engine, fire-truck", "car: automobile"], "fire engine", "automobile"),
    ],
)
def test_lines_of_a_class_file_find_their_folders_in_any_order(
    tmp_path: Path, lines: list[str] | None, truck: str, car: str
) -> None:
    classes = None if lines is None else write(tmp_path / "c.txt", *lines)
    data = load_labelled(DataSource(folders(tmp_path / "d", "fire_truck", "car"), classes=classes))
    assert data.keys == ["car", "fire_truck"]
    assert prompts(data) == {"fire_truck": f"a photo of a {truck}.", "car": f"a photo of a {car}."}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["the truck", "the car"], "without a line: car, fire_truck; without a class: the truck"),
        (["fire_truck", "car", "bus"], "without a line: none; without a class: bus"),
        (["lorry: x", "car"], "without a line: fire_truck; without a class: lorry"),
        (["fire_truck: ,", "car"], "names no class|without a line"),
    ],
)
def test_a_class_file_that_does_not_match_is_refused(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    data = folders(tmp_path / "d", "fire_truck", "car")
    with pytest.raises(RAdapterError, match=message):
        load_labelled(DataSource(data, classes=write(tmp_path / "c.txt", *lines)))


@pytest.mark.parametrize(
    ("lines", "labels", "classes", "numbers"),
    [
        (["T1: truck", "C7: car, auto"], ["C7", "T1"], ["truck", "car, auto"], [1, 0]),
        (["Mission: Impossible", "b"], ["Mission: Impossible", "b"], None, [0, 1]),
        (["0: car", "1: bus"], [0, 1], ["car", "bus"], [0, 1]),
        (["red, dark", "dark, night"], ["red", "dark", "night", "red, dark"], None, [0, 1, 1, 0]),
        (["red, dark", "dark, night"], [0.0, 1.0], None, [0, 1]),
    ],
)
def test_a_class_file_for_a_table(
    tmp_path: Path,
    lines: list[str],
    labels: list[object],
    classes: list[str] | None,
    numbers: list[int],
) -> None:
    """Labels by key, line, first name, synonym and number; None keeps the lines."""
    file = write(tmp_path / "c.txt", *lines)
    data = load_labelled(DataSource(table(tmp_path, *labels), classes=file))
    assert data.classes == (classes or lines) and data.labels().tolist() == numbers


@pytest.mark.parametrize(
    ("lines", "labels", "message"),
    [
        (["blue", "green"], ["blue", "purple"], "label 'purple' is none of the 2 classes"),
        (["blue", "green"], [0, 0.9], "label 0.9 is none of the 2 classes"),
        (["blue", "green"], ["blue", ""], "label None is none of the 2 classes"),
        (["blue", "green"], ["blue"], "1 of 2 classes have no image in .*: 'green'; add"),
        (["1: car", "0: bus"], [0, 1], "must number its lines from 0 on"),
    ],
)
def test_labels_of_a_table_that_do_not_fit_a_class_file(
    tmp_path: Path, lines: list[str], labels: list[object], message: str
) -> None:
    file = write(tmp_path / "c.txt", *lines)
    with pytest.raises(RAdapterError, match=message):
        load_labelled(DataSource(table(tmp_path, *labels), classes=file))


def test_imagenet_names_its_folders_as_clip_does(tmp_path: Path) -> None:
    spec = folders(tmp_path / "d", MISSILE, PROJECTILE, TENCH)
    data = load_labelled(DataSource(spec, classes=Path("imagenet")))
    assert data.classes == ["tench", "missile", "missile"]
    assert data.labels().tolist() == [0, 1, 2]  # the two missiles are two classes
    with pytest.raises(RAdapterError, match="WordNet ids .*--classes imagenet"):
        open_run(Recipe(data=spec), images=False)
    glasses = table(tmp_path, SUNGLASS, SUNGLASSES, SUNGLASS)
    named = load_labelled(DataSource(glasses, classes=Path("imagenet")))
    assert named.classes == ["sunglasses", "sunglasses"] and named.labels().tolist() == [0, 1, 0]


def test_imagenet_by_numbers_and_by_the_hub_s_names(tmp_path: Path) -> None:
    data = load_labelled(DataSource(table(tmp_path, *range(1000)), classes=Path("imagenet")))
    assert data.classes == list(open_clip.IMAGENET_CLASSNAMES)
    assert data.labels().tolist() == list(range(1000))
    words = ImageNetInfo("imagenet-1k").label_descriptions()  # type: ignore[no-untyped-call]
    hub = ["crane bird" if index == 134 else name for index, name in enumerate(words)]
    assert prompt_names(hub, Path("imagenet"), "hub", by_name=False) == (hub, data.classes)
    with pytest.raises(RAdapterError, match="'cat' .*no class of ImageNet"):
        load_labelled(DataSource(folders(tmp_path / "d", "cat", TENCH), classes=Path("imagenet")))
