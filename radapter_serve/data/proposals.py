"""Masks that a proposal network found, from an .npz file for each image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError, reason

MOST = 1000  # masks of one image
_KINDS = "bool, uint8 (255 inside) or float (probabilities from 0 to 1)"


class Proposals:
    """The masks of all images of a data set, by the names of these, in a folder of `STEM.npz`.

    Each file has `masks` [N, H, W], and all of them or none `scores` [N, C], in the order of the
    class file, the background left out.
    """

    def __init__(self, folder: Path, names: Sequence[str], classes: int) -> None:
        self._folder = folder
        self._classes = classes
        paths = [self._path(name) for name in names]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise RAdapterError(
                f"no proposals {missing[0]} ({len(missing)} of {len(paths)} images lack them);"
                " write STEM.npz with masks [N, H, W] for each image"
            )
        self.scored = "scores" in self._load(paths[0])

    def _path(self, name: str) -> Path:
        return self._folder / f"{Path(name).stem}.npz"

    def _load(self, path: Path) -> dict[str, NDArray[Any]]:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as file_arrays:
                arrays = dict(file_arrays)
        except Exception as error:  # zipfile and numpy raise many kinds on broken files
            raise RAdapterError(f"the proposals {path} can't be read: {reason(error)}") from None
        masks = arrays.setdefault("masks", np.zeros(0))
        fits = masks.dtype in (bool, np.uint8) or masks.dtype.kind == "f"
        if masks.ndim != 3 or len(masks) > MOST or not fits:
            raise RAdapterError(
                f"{path} needs masks [N, H, W], N up to {MOST}, {_KINDS}; it holds {masks.dtype}"
                f" {list(masks.shape)}"
            )
        scores = arrays.get("scores")
        wanted = (len(masks), self._classes)
        if scores is not None and (scores.shape != wanted or scores.dtype.kind != "f"):
            raise RAdapterError(
                f"{path} has scores {scores.dtype} {list(scores.shape)}; allowed: float"
                f" {list(wanted)}, a column for each class"
            )
        return arrays

    def read(
        self, name: str, size: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
        """The masks of an image of this height and width, 255 inside, and their scores."""
        path = self._path(name)
        arrays = self._load(path)
        masks = arrays["masks"]
        if masks.shape[1:] != size:
            height, width = masks.shape[1:]
            raise RAdapterError(
                f"the masks of {path} have {width} x {height} pixels but the image as it is shown"
                f" has {size[1]} x {size[0]}; write them at the image's size"
            )
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
        scores = arrays.get("scores")
        if (scores is not None) != self.scored:
            raise RAdapterError(f"some of {self._folder} have scores, and {path} differs from them")
        return masks.astype(np.uint8), None if scores is None else scores.astype(np.float32)

    def raw(self, name: str) -> bytes:
        """All data of an image, to make a digest of."""
        return self._path(name).read_bytes()
