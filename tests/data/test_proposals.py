"""Masks of a proposal network from files made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from radapter_serve.data.proposals import Proposals
from radapter_serve.errors import RAdapterError

SIZE = (3, 4)
INSIDE = np.random.default_rng(0).random((2, *SIZE)) < 0.5
SCORES = np.array([[0.25, 0.5, 0.125], [1, 0, 0.75]], np.float32)


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
def test_masks_and_scores(masks: NDArray[Any], expected: NDArray[Any], tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", masks=masks)
    files = Proposals(tmp_path, ["a.jpg"], 3)
    read, scores = files.read("a.jpg", SIZE)
    assert read.dtype == np.uint8 and scores is None and not files.scored
    np.testing.assert_array_equal(read, expected)
    np.savez(tmp_path / "a.npz", masks=masks, scores=SCORES[: len(masks)])
    files = Proposals(tmp_path, ["a.jpg"], 3)
    scores = files.read("a.jpg", SIZE)[1]
    assert files.scored and scores is not None
    np.testing.assert_array_equal(scores, SCORES[: len(masks)])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": INSIDE}, r"needs masks \[N, H, W\], N up to 1000, bool, uint8"),
        ({"masks": INSIDE[0]}, r"it holds bool \[3, 4\]"),
        ({"masks": INSIDE.astype(int)}, "it holds int64"),
        ({"masks": np.zeros((1001, *SIZE), bool)}, "it holds bool"),
        ({"masks": np.array([None])}, "it holds object"),
        ({"masks": np.zeros((2, 4, 3))}, "3 x 4 pixels but the image as it is shown has 4 x 3"),
        ({"masks": INSIDE * 2.0}, "outside 0 to 1"),
        ({"masks": INSIDE * np.nan}, "outside 0 to 1"),
        ({"masks": INSIDE.astype(np.uint8)}, "is above 1; allowed: bool, uint8"),
        ({"masks": INSIDE, "scores": SCORES[:, :2]}, r"has scores float32 \[2, 2\]"),
    ],
)
def test_files_that_can_not_be_used(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(RAdapterError, match=message):
        Proposals(tmp_path, ["a.jpg"], 3).read("a.jpg", SIZE)


def test_files_that_are_missing_broken_or_of_two_kinds(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", masks=INSIDE)
    with pytest.raises(RAdapterError, match=r"no proposals .*b.npz \(1 of 2 images lack them\)"):
        Proposals(tmp_path, ["a.jpg", "b.jpg"], 3)
    np.savez(tmp_path / "b.npz", masks=INSIDE, scores=SCORES)
    with pytest.raises(RAdapterError, match="have scores"):
        Proposals(tmp_path, ["b.jpg", "a.jpg"], 3)
    np.savez(tmp_path / "b.npz", masks=INSIDE[0])
    with pytest.raises(RAdapterError, match="b.npz needs masks"):
        Proposals(tmp_path, ["a.jpg", "b.jpg"], 3)
    whole = (tmp_path / "a.npz").read_bytes()
    for content in (b"PK no archive", whole[: len(whole) // 2]):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(RAdapterError, match="the proposals .*a.npz can't be read"):
            Proposals(tmp_path, ["a.jpg"], 3)
