"""The demo's data: what is held out is held out, and the folders are what the trainer reads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radapter_serve.demo import data
from radapter_serve.errors import RAdapterError

HELD_OUT = ("test", "val")
SIDE = 32  # pixels, fewer than the demo's


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, dtype=float)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> data.DemoData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SIDE", SIDE)
        return data.prepare(tmp_path_factory.mktemp("demo") / "images", quiet=True)


def test_held_out_concepts_are_in_no_other_split() -> None:
    split_of: dict[str, set[str]] = {}
    for concept in data.concepts():
        split_of.setdefault(concept.concept, set()).add(concept.split)
    for name, splits in split_of.items():
        assert len(splits) == 1 or not splits & set(HELD_OUT), name
    codes = Counter(concept.hexcode for concept in data.concepts())
    assert max(codes.values()) == 1
    assert all(concept.class_name for concept in data.concepts() if concept.split in ("train", *HELD_OUT))


def test_no_held_out_drawing_is_a_training_drawing_under_another_name() -> None:
    for style in data.STYLES:
        drawn = [(c.split in HELD_OUT, svg) for c in data.concepts() if (svg := data.drawing(c, style)) is not None]
        held, seen = ({svg for out, svg in drawn if out is side} for side in (True, False))
        assert not held & seen, style


def test_every_class_is_in_every_folder(demo: data.DemoData) -> None:
    classes = demo.classes.read_text(encoding="utf-8").splitlines()
    assert classes == sorted(classes) == data.class_names()
    for folder in (demo.train, demo.val, *demo.test.values()):
        assert sorted(path.name for path in folder.iterdir()) == classes, folder
        assert all(any(path.glob("*.png")) for path in folder.iterdir())
    assert set(demo.test) == {data.FINE_TUNED, *data.SHIFTS}
    assert all("{}" in line for line in demo.templates.read_text(encoding="utf-8").splitlines())


def test_styles_show_the_same_held_out_concepts(demo: data.DemoData) -> None:
    def shown(folder: Path) -> set[str]:
        return {f"{path.parent.name}/{path.name}" for path in folder.glob("*/*.png")}

    reference = shown(demo.test[data.FINE_TUNED])
    assert len(reference) > 200
    for style in data.SHIFTS:
        assert shown(demo.test[style]) <= reference
        assert len(shown(demo.test[style])) > 0.85 * len(reference), style
    assert not reference & (shown(demo.train) | shown(demo.val))


def test_line_drawings_have_lost_their_colours(demo: data.DemoData) -> None:
    def colourfulness(style: str) -> float:
        pixels = [pixels_of(path) for path in sorted(demo.test[style].glob("fruit/*.png"))]
        return float(np.mean([np.ptp(image, axis=2).mean() for image in pixels]))

    assert colourfulness("line") < 1 < 20 < colourfulness("color")
    assert pixels_of(next(demo.test["line"].glob("*/*.png"))).shape == (SIDE, SIDE, 3)


def test_a_finished_folder_is_taken_as_it_is(demo: data.DemoData) -> None:
    image = next(demo.train.glob("*/*.png"))
    changed = image.stat().st_mtime_ns
    assert data.prepare(demo.classes.parent, quiet=True) == demo
    assert image.stat().st_mtime_ns == changed


def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RAdapterError, match="could not make the demo's images"):
        data.prepare(tmp_path / "file" / "images", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
