"""Groups of images that are nearly the same, against a comparison pair by pair."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.cli.index import main
from radapter_serve.index import duplicates
from radapter_serve.index.build import build
from radapter_serve.index.duplicates import find_duplicates
from radapter_serve.index.index import open_index
from tests.index.test_index import FakeRelease, embeds_of, write


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], NDArray[np.float32]]:
    """An index of 60 images, of which some are alike; its ids and embeddings."""
    folder = tmp_path_factory.mktemp("duplicates")
    for number in range(40):
        write(folder / "photos" / f"{number:02}.png", number)
    for number in range(20):
        write(folder / "photos" / f"copy {number:02}.jpg", number % 7)
    release = FakeRelease()
    build(str(folder / "photos"), folder / "index", release)
    files = sorted((folder / "photos").iterdir(), key=lambda file: file.name)
    return folder / "index", [file.name for file in files], embeds_of(release, files)


def by_hand(ids: list[str], embeds: NDArray[np.float32], threshold: float) -> list[list[str]]:
    near = embeds @ embeds.T >= threshold
    left = set(range(len(ids)))
    groups = []
    while left:
        group = {left.pop()}
        while more := {other for one in group for other in left if near[one, other]}:
            group |= more
            left -= more
        if len(group) > 1:
            groups.append(sorted(ids[one] for one in group))
    return sorted(groups, key=lambda group: (-len(group), group[0]))


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.99])
@pytest.mark.parametrize("tile", [7, 64])
def test_groups_are_those_of_a_comparison_pair_by_pair(
    made: tuple[Path, list[str], NDArray[np.float32]],
    threshold: float,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, ids, embeds = made
    monkeypatch.setattr(duplicates, "_TILE", tile)
    monkeypatch.setattr(duplicates, "_MAX_EDGES", 5)
    groups = find_duplicates(open_index(folder), threshold)
    assert [group.ids for group in groups] == by_hand(ids, embeds, threshold)
    scores = embeds @ embeds.T - 2 * np.eye(60)
    for group in groups:
        rows = [ids.index(id) for id in group.ids]
        expected = scores[np.ix_(rows, rows)].max(axis=1)
        np.testing.assert_allclose(group.scores, expected, atol=1e-6)


def test_the_command_writes_a_table_and_a_picture(
    made: tuple[Path, list[str], NDArray[np.float32]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, ids, embeds = made
    out = tmp_path / "same.csv"
    picture = tmp_path / "same.png"
    call = ["duplicates", str(folder), "--threshold", "0.99", "--out", str(out)]
    assert main([*call, "--picture", str(picture)]) == 0
    groups = by_hand(ids, embeds, 0.99)
    said = capsys.readouterr().out
    assert f"{len(groups)} groups of {sum(map(len, groups))} images, of 60" in said
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    read = [[row["id"] for row in rows if row["group"] == str(n + 1)] for n in range(len(groups))]
    assert read == groups
    assert min(float(row["score"]) for row in rows) >= 0.99
    sheet = Image.open(picture)
    assert sheet.size == (128 * max(map(len, groups)), 156 * len(groups))
    assert len(sheet.getcolors(2**20) or []) > 20
    # Where nothing is alike, there is no picture.
    write(tmp_path / "photos" / "1.png", 1)
    build(str(tmp_path / "photos"), tmp_path / "index", FakeRelease())
    none = tmp_path / "none.png"
    assert (
        main(["duplicates", str(tmp_path / "index"), "--out", str(out), "--picture", str(none)])
        == 0
    )
    assert out.read_text(encoding="utf-8").splitlines() == ["group,id,score"]
    assert not none.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *((["--threshold", value], f"--threshold is {value}") for value in ("nan", "0", "1.01")),
        (["--out", "same.txt"], "--out same.txt does not end in .csv"),
        (["--picture", "same.gif"], "--picture same.gif does not end in .png or .jpg"),
        (["--out", "nowhere/same.csv"], "nowhere is no folder"),
        (["--picture", "same.png"], "has no thumbnails to draw; leave out --picture"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "photos" / "1.png", 3)
    build("photos", tmp_path / "index", FakeRelease(), thumbnails=0)
    assert main(["duplicates", "index", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "index"}
