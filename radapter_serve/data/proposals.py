"""Masks that a proposal network found, from its files: COCO's results, or an .npz file for each
image.
"""

from __future__ import annotations

import json
import zipfile
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


class ArrayFiles:
    """Masks and perhaps scores in one .npz file for each image."""

    def __init__(self, folder: Path, stems: Sequence[str], classes: int) -> None:
        self._paths = {stem: folder / f"{stem}.npz" for stem in stems}
        self._classes = classes
        self._sizes: dict[str, tuple[int, ...]] = {}
        missing = [path for path in self._paths.values() if not path.is_file()]
        if missing:
            raise RAdapterError(
                f"no proposals {missing[0]} ({len(missing)} of {len(stems)} images"
                " lack them); write STEM.npz with masks [N, H, W] for each image, or name a JSON"
                " file of COCO's results"
            )
        # Read the headers alone, so that what is wrong is refused early.
        unscored = []
        for stem, path in self._paths.items():
            try:
                arrays = _headers(path)
            except Exception as error:  # zipfile and numpy raise many kinds on broken files
                raise _broken(path, error) from None
            shape, dtype = arrays.get("masks", ((), np.dtype(bool)))
            readable = dtype in (bool, np.uint8) or dtype.kind == "f"
            if len(shape) != 3 or shape[0] > MOST or not readable:
                has = f"only {', '.join(arrays) or 'nothing'}"
                if "masks" in arrays:
                    has = f"{dtype} {list(shape)}"
                raise RAdapterError(
                    f"{path} needs masks [N, H, W], N up to {MOST}, {_KINDS}; it holds {has}"
                )
            self._sizes[stem] = shape[1:]
            if "scores" not in arrays:
                unscored.append(path)
                continue
            scores, dtype = arrays["scores"]
            if scores not in ((shape[0],), (shape[0], classes)) or dtype.kind != "f":
                raise RAdapterError(
                    f"{path} has scores {dtype} {list(scores)}; allowed: float [{shape[0]},"
                    f" {classes}], a column for each class, or [{shape[0]}], one for all"
                )
        self.scored = len(unscored) < len(self._paths)
        if self.scored and unscored:
            raise RAdapterError(
                f"{unscored[0]} has no scores but others have; give all of them scores, or none"
            )

    def read(self, name: str, size: tuple[int, int]) -> Found:
        """The masks of an image of this height and width, and their scores."""
        stem = Path(name).stem
        path = self._paths[stem]
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
        return masks.astype(np.uint8), None if scores is None else _table(scores, self._classes)

    def raw(self, name: str) -> bytes:
        """All data of an image, to make a digest of."""
        return self._paths[Path(name).stem].read_bytes()


class ResultsFile:
    """Proposals of all images in one file of COCO's results."""

    def __init__(self, path: Path, stems: Sequence[str], classes: int) -> None:
        self._classes = classes
        self._rows: dict[str, list[dict[str, Any]]] = {_key(stem): [] for stem in stems}
        try:
            rows = json.loads(path.read_bytes())
        except OSError as error:
            raise RAdapterError(f"cannot read the proposals {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise _broken(path, error) from None
        kinds = set()  # of scores
        for row in rows if isinstance(rows, list) else [rows]:
            if (
                not isinstance(row, dict)
                or not isinstance(row.get("image_id"), str | int)
                or "segmentation" not in row
            ):
                raise RAdapterError(
                    f"{path} is no list of COCO's results, each with image_id and segmentation:"
                    f" {str(row)[:60]}"
                )
            kind = "scores" if "scores" in row else "score" if "score" in row else None
            values = row.get("scores", [row.get("score", 0)])
            if (
                not isinstance(values, list)
                or not all(type(value) in (int, float) for value in values)
                or (kind == "scores" and len(values) != classes)
            ):
                raise RAdapterError(
                    f"{path}: a proposal of the image {row['image_id']} has {kind}"
                    f" {str(row[kind])[:60]}; allowed: score, a number, or scores, a list of"
                    f" {classes} numbers, one for each class"
                )
            kinds.add(kind)
            of_image = self._rows.get(_key(row["image_id"]), [])
            of_image.append(row)
            if len(of_image) > MOST:
                raise RAdapterError(
                    f"{path}: the image {row['image_id']} has more than {MOST} proposals"
                )
        if len(kinds) > 1:
            raise RAdapterError(
                f"{path}: some proposals have a score, or scores of all classes, and others"
                " have not"
            )
        self.scored = kinds not in (set(), {None})
        missing = [stem for stem in stems if not self._rows[_key(stem)]]
        if missing:
            raise RAdapterError(
                f"{path} has no proposal for the image {missing[0]} ({len(missing)} of {len(stems)}"
                " images lack some); an image_id is the name of the image's file without its"
                " ending, or its number"
            )

    def read(self, name: str, size: tuple[int, int]) -> Found:
        """The masks of an image of this height and width, and their scores."""
        from pycocotools import mask as coco

        rows = self._rows[_key(Path(name).stem)]
        height, width = size
        coded = [
            {"size": [height, width], "counts": rle_of(row["segmentation"], name, width, height)}
            for row in rows
        ]
        masks = np.stack([coco.decode(runs) for runs in coded]) * np.uint8(255)
        if not self.scored:
            return masks, None
        values = np.array([row["scores"] if "scores" in row else row["score"] for row in rows])
        return masks, _table(values, self._classes)

    def raw(self, name: str) -> bytes:
        """All data of an image, to make a digest of."""
        return json.dumps(self._rows[_key(Path(name).stem)]).encode()


ProposalFiles = ArrayFiles | ResultsFile


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
    kind = ResultsFile if path.suffix == ".json" else ArrayFiles
    return kind(path, stems, classes)


def _key(name: str | int) -> str:
    """What an image is called: 139, "139" and "000000000139" are the same image."""
    text = str(name)
    return text.lstrip("0") or "0" if text.isascii() and text.isdecimal() else text


def _table(scores: NDArray[Any], classes: int) -> NDArray[np.float32]:
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
