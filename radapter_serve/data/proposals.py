"""Masks that a proposal network found, from its files: COCO's results, or an .npz file for each
image.
"""

from __future__ import annotations

import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.data.masks import rle_of
from radapter_serve.errors import RAdapterError, reason

MOST = 1000  # masks of one image
_KINDS = "bool, uint8 (255 inside) or float (probabilities from 0 to 1)"
Found = tuple[NDArray[np.uint8], NDArray[np.float32] | None]


class ProposalFiles(ABC):
    """Masks of a proposal network for the images of a data set."""

    scored: bool  # they have scores

    @abstractmethod
    def read(self, name: str, size: tuple[int, int]) -> Found:
        """The masks of an image, and their scores."""

    @abstractmethod
    def raw(self, name: str) -> bytes:
        """All that is known of an image, as bytes to make a digest of."""


def load_proposals(path: Path, names: Sequence[str], classes: int) -> ProposalFiles:
    """Open the proposals for all images of a data set, by the names of their files, and refuse what
    is missing.

    `path` is a folder of `STEM.npz` with `masks` [N, H, W] and perhaps `scores` [N, C] or [N]; or a
    JSON file of COCO's results, a list of `{"image_id", "segmentation"}` with perhaps a `score`, or
    `scores` of all classes. An image_id is the image's file name without its ending, or its number.
    Categories are not read: a network has others than the set. One score counts for all classes
    alike; several are in the order of the class file, the background left out.
    """
    stems = [Path(name).stem for name in names]
    kind = _Results if path.suffix == ".json" else _Arrays
    return kind(path, stems, classes)


class _Arrays(ProposalFiles):
    """A file for each image."""

    def __init__(self, folder: Path, stems: Sequence[str], classes: int) -> None:
        self._folder = folder
        self._classes = classes
        missing = [stem for stem in stems if not (folder / f"{stem}.npz").is_file()]
        if missing:
            raise RAdapterError(
                f"no proposals {folder / missing[0]}.npz ({len(missing)} of {len(stems)} images"
                " lack them); write STEM.npz with masks [N, H, W] for each image, or name a JSON"
                " file of COCO's results"
            )
        checked = {stem: self._check(folder / f"{stem}.npz") for stem in stems}
        self._sizes = {stem: size for stem, (size, _) in checked.items()}
        lacking = [stem for stem, (_, scored) in checked.items() if not scored]
        self.scored = len(lacking) < len(checked)
        if self.scored and lacking:
            raise RAdapterError(
                f"{folder / lacking[0]}.npz has no scores but others have; give all of them scores,"
                " or none"
            )

    def _check(self, path: Path) -> tuple[Sequence[int], bool]:
        """Height and width, and whether there are scores; reads no values, so that what is wrong is
        refused early.
        """
        try:
            arrays = _headers(path)
        except Exception as error:  # zipfile and numpy raise many kinds on broken files
            raise _broken(path, error) from None
        shape, dtype = arrays.get("masks", ((), np.dtype(bool)))
        readable = dtype in (bool, np.uint8) or dtype.kind == "f"
        if len(shape) != 3 or shape[0] > MOST or not readable:
            held = f"only {', '.join(arrays) or 'nothing'}"
            if "masks" in arrays:
                held = f"{dtype} {list(shape)}"
            raise RAdapterError(
                f"{path} needs masks [N, H, W], N up to {MOST}, {_KINDS}; it holds {held}"
            )
        if "scores" not in arrays:
            return shape[1:], False
        scores, dtype = arrays["scores"]
        if scores not in ((shape[0],), (shape[0], self._classes)) or dtype.kind != "f":
            raise RAdapterError(
                f"{path} has scores {dtype} {list(scores)}; allowed: float [{shape[0]},"
                f" {self._classes}], a column for each class, or [{shape[0]}], one for all"
            )
        return shape[1:], True

    def read(self, name: str, size: tuple[int, int]) -> Found:
        stem = Path(name).stem
        path = self._folder / f"{stem}.npz"
        height, width = self._sizes[stem]
        if (height, width) != size:
            raise RAdapterError(
                f"the masks of {path} have {width} x {height} pixels but the image as it is shown"
                f" has {size[1]} x {size[0]}; write them at the image's size"
            )
        try:
            with np.load(path, allow_pickle=False) as arrays:
                masks = arrays["masks"]
                scores = arrays.get("scores")
        except Exception as error:  # zipfile and numpy raise many kinds on broken files
            raise _broken(path, error) from None
        if masks.dtype.kind == "f":
            if not ((masks >= 0) & (masks <= 1)).all():
                raise RAdapterError(
                    f"the masks of {path} hold a value outside 0 to 1; allowed: {_KINDS}"
                )
            masks = np.round(masks * 255)
        elif masks.dtype == bool:
            masks = masks * np.uint8(255)
        elif masks.size and masks.max() == 1:
            raise RAdapterError(f"no value of the masks of {path} is above 1; allowed: {_KINDS}")
        return masks.astype(np.uint8), None if scores is None else _of_all(scores, self._classes)

    def raw(self, name: str) -> bytes:
        return (self._folder / f"{Path(name).stem}.npz").read_bytes()


class _Results(ProposalFiles):
    """One file for all images."""

    def __init__(self, path: Path, stems: Sequence[str], classes: int) -> None:
        self._path = path
        self._classes = classes
        self._of: dict[str, list[dict[str, Any]]] = {_key(stem): [] for stem in stems}
        try:
            rows = json.loads(path.read_bytes())
        except OSError as error:
            raise RAdapterError(f"cannot read the proposals {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise _broken(path, error) from None
        kinds = {self._take(row) for row in (rows if isinstance(rows, list) else [rows])}
        if len(kinds) > 1:
            raise RAdapterError(
                f"{path}: some proposals have a score, or scores of all classes, and others"
                " have not"
            )
        self.scored = kinds not in (set(), {None})
        missing = [stem for stem in stems if not self._of[_key(stem)]]
        if missing:
            raise RAdapterError(
                f"{path} has no proposal for the image {missing[0]} ({len(missing)} of {len(stems)}"
                " images lack some); an image_id is the name of the image's file without its"
                " ending, or its number"
            )

    def _take(self, row: Any) -> str | None:
        """Keep a proposal of one of the images; returns which kind of score it has."""
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("image_id"), str | int)
            or "segmentation" not in row
        ):
            raise RAdapterError(
                f"{self._path} is no list of COCO's results, each with image_id and segmentation:"
                f" {str(row)[:60]}"
            )
        kind = "scores" if "scores" in row else "score" if "score" in row else None
        values = row.get("scores", [row.get("score", 0)])
        numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if not numbers or (kind == "scores" and len(values) != self._classes):
            raise RAdapterError(
                f"{self._path}: a proposal of the image {row['image_id']} has {kind}"
                f" {str(row[kind])[:60]}; allowed: score, a number, or scores, a list of"
                f" {self._classes} numbers, one for each class"
            )
        known = self._of.get(_key(row["image_id"]))
        if known is not None:
            known.append(row)
            if len(known) > MOST:
                raise RAdapterError(
                    f"{self._path}: the image {row['image_id']} has more than {MOST} proposals"
                )
        return kind

    def read(self, name: str, size: tuple[int, int]) -> Found:
        from pycocotools import mask as coco

        rows = self._of[_key(Path(name).stem)]
        height, width = size
        coded = [
            {"size": [height, width], "counts": rle_of(row["segmentation"], name, width, height)}
            for row in rows
        ]
        masks = np.stack([coco.decode(runs) for runs in coded]) * np.uint8(255)
        if not self.scored:
            return masks, None
        values = np.array([row["scores"] if "scores" in row else row["score"] for row in rows])
        return masks, _of_all(values, self._classes)

    def raw(self, name: str) -> bytes:
        return json.dumps(self._of[_key(Path(name).stem)]).encode()


def _key(name: str | int) -> str:
    """What an image is called: 139, "139" and "000000000139" are the same image."""
    text = str(name)
    return text.lstrip("0") or "0" if text.isascii() and text.isdecimal() else text


def _of_all(scores: NDArray[Any], classes: int) -> NDArray[np.float32]:
    """Scores of each class, [N, C], of those or of one for all, [N]."""
    table = scores if scores.ndim == 2 else np.broadcast_to(scores[:, None], (len(scores), classes))
    return np.ascontiguousarray(table, np.float32)


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of each array of an .npz file."""
    arrays = {}
    of_version = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
                shape, _, dtype = of_version[version](file)  # type: ignore[no-untyped-call]
                arrays[name.removesuffix(".npy")] = shape, dtype
    return arrays


def _broken(path: Path, error: Exception) -> RAdapterError:
    return RAdapterError(f"the proposals {path} can't be read: {reason(error)}")
