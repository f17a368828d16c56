"""Masks of a proposal network from files made by hand: .npz for each image, and COCO's results."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco

from radapter_serve.data.proposals import load_proposals
from radapter_serve.errors import RAdapterError

SIZE = (3, 4)
INSIDE = np.random.default_rng(0).random((2, *SIZE)) < 0.5
SCORES = np.array([[0.25, 0.5, 0.125], [1, 0, 0.75]], np.float32)


def result(inside: NDArray[Any], image: Any, **more: Any) -> dict[str, Any]:
    runs = coco.encode(np.asfortranarray(inside, np.uint8))
    coded = {**runs, "counts": runs["counts"].decode()}
    return {"image_id": image, "category_id": 7, "segmentation": coded, **more}


def save_results(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        (INSIDE, INSIDE * 255),
        (INSIDE.astype(np.uint8) * 200, INSIDE * 200),
        (INSIDE.astype(np.float32), INSIDE * 255),
        (INSIDE * np.float16(0.4), INSIDE * 102),
        (np.zeros((0, *SIZE), bool), np.zeros((0, *SIZE))),
    ],
)
def test_arrays_of_each_image(masks: NDArray[Any], expected: NDArray[Any], tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", masks=masks)
    files = load_proposals(tmp_path, ["a.jpg"], 3)
    found, scores = files.read("a.jpg", SIZE)
    assert found.dtype == np.uint8 and scores is None and not files.scored
    np.testing.assert_array_equal(found, expected)


def test_scores_are_of_each_class_or_of_all_alike(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", masks=INSIDE, scores=SCORES)
    np.savez(tmp_path / "b.npz", masks=INSIDE, scores=SCORES[:, 0])
    files = load_proposals(tmp_path, ["a.jpg", "b.png"], 3)
    assert files.scored
    for name, expected in (("a.jpg", SCORES), ("b.png", np.repeat(SCORES[:, :1], 3, axis=1))):
        scores = files.read(name, SIZE)[1]
        assert scores is not None and scores.dtype == np.float32
        np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize(
    "more", [[{}, {}], [{"score": 0.25}, {"score": 1}], [{"scores": s} for s in SCORES.tolist()]]
)
def test_cocos_results(more: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [result(inside, 139, **also) for inside, also in zip(INSIDE, more, strict=True)]
    rows.insert(1, result(INSIDE[0], "another", **more[0]))  # of an image that is not in the set
    files = load_proposals(save_results(tmp_path / "r.json", rows), ["000000000139.jpg"], 3)
    masks, scores = files.read("000000000139.jpg", SIZE)
    np.testing.assert_array_equal(masks, INSIDE * 255)
    assert files.scored == (scores is not None) == bool(more[0])
    if "score" in more[0]:
        np.testing.assert_array_equal(scores, [[0.25] * 3, [1] * 3])  # type: ignore[arg-type]
    elif scores is not None:
        np.testing.assert_array_equal(scores, SCORES)
    assert files.raw("000000000139.jpg") == json.dumps([rows[0], rows[2]]).encode()


ROW = result(INSIDE[0], "a", scores=[0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{", "r.json can't be read: "),
        ({"annotations": []}, "is no list of COCO's results, each with image_id and segmentation:"),
        ([{"image_id": 1.5, "segmentation": {}}], "is no list"),
        ([result(INSIDE[0], "9" * 5000)], "has no proposal for the image a (1 of 1 images lack"),
        ([{**ROW, "scores": [0.1, 0.2]}], "has scores [0.1, 0.2]; allowed: score, a number, or"),
        ([{**ROW, "scores": [0.1, 0.2, "b"]}], "has scores"),
        ([result(INSIDE[0], "a", score="high")], "has score high"),
        ([ROW, result(INSIDE[1], "a")], "some proposals have a score, or scores of all classes"),
        ([result(INSIDE[0], "a")] * 1001, "the image a has more than 1000 proposals"),
    ],
)
def test_results_that_can_not_be_used(rows: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    with pytest.raises(RAdapterError) as error:
        load_proposals(path, ["a.jpg"], 3)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_masks_of_another_size_or_broken_runs_name_the_image(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", masks=INSIDE)
    with pytest.raises(RAdapterError, match=r"a.npz have 4 x 3 pixels but the image .* has 3 x 4"):
        load_proposals(tmp_path, ["a.jpg"], 3).read("a.jpg", (4, 3))
    broken = {"image_id": "a", "segmentation": {"size": [3, 4], "counts": "PPPPPPPP4"}}
    for row, size in ((result(INSIDE[0], "a"), (4, 3)), (broken, SIZE)):
        files = load_proposals(save_results(tmp_path / "r.json", [row]), ["a.jpg"], 3)
        with pytest.raises(RAdapterError, match="segmentation of the image a.jpg is broken"):
            files.read("a.jpg", size)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": INSIDE}, "a.npz needs masks [N, H, W], N up to 1000, bool, uint8 (255 inside)"),
        ({"masks": INSIDE[0]}, "it holds bool [3, 4]"),
        ({"masks": INSIDE.astype(int)}, "it holds int64 [2, 3, 4]"),
        ({"masks": np.zeros((1001, 1, 1), bool)}, "it holds bool [1001, 1, 1]"),
        ({"masks": np.array([None])}, "it holds object [1]"),
        ({"masks": INSIDE, "scores": SCORES[:, :2]}, "has scores float32 [2, 2]; allowed: float"),
    ],
)
def test_arrays_that_can_not_be_used(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(RAdapterError) as error:
        load_proposals(tmp_path, ["a.jpg"], 3)
    assert message in str(error.value)


def test_files_that_are_missing_broken_or_of_two_kinds(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", masks=INSIDE)
    with pytest.raises(RAdapterError, match=r"no proposals .*b.npz \(1 of 2 images lack them\)"):
        load_proposals(tmp_path, ["a.jpg", "b.jpg"], 3)
    np.savez(tmp_path / "b.npz", masks=INSIDE, scores=SCORES)
    with pytest.raises(RAdapterError, match="a.npz has no scores but others have"):
        load_proposals(tmp_path, ["a.jpg", "b.jpg"], 3)
    (tmp_path / "a.npz").write_bytes(b"PK no archive")
    with pytest.raises(RAdapterError, match="the proposals .*a.npz can't be read"):
        load_proposals(tmp_path, ["a.jpg"], 3)
    np.savez(tmp_path / "a.npz", masks=np.zeros((2, *SIZE)))
    whole = (tmp_path / "a.npz").read_bytes()
    with zipfile.ZipFile(
        tmp_path / "a.npz", "w"
    ) as archive:  # the header is whole, the values are cut off
        archive.writestr("masks.npy", zipfile.ZipFile(io.BytesIO(whole)).read("masks.npy")[:-9])
    files = load_proposals(tmp_path, ["a.jpg"], 3)
    with pytest.raises(RAdapterError, match="the proposals .*a.npz can't be read"):
        files.read("a.jpg", SIZE)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (INSIDE * 2.0, "outside 0 to 1"),
        (INSIDE * np.nan, "outside 0 to 1"),
        (INSIDE.astype(np.uint8), "is above 1; allowed: bool, uint8"),
    ],
)
def test_values_that_are_no_masks(masks: NDArray[Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", masks=masks)
    with pytest.raises(RAdapterError, match=message):
        load_proposals(tmp_path, ["a.jpg"], 3).read("a.jpg", SIZE)
