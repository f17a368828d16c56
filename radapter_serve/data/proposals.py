"""Masks of a proposal network, from an .npz file for each image."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import read_arrays

MOST = 1000  # most masks of an image
_KINDS = "bool, uint8 (255 inside) or float (probabilities from 0 to 1)"


class Proposals:
    """Masks [N, H, W] of all images of a data set, from a folder of `STEM.npz`; all files or none
    have `scores` [N, C].
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
        self.scored = self._check(paths[0])
        for path in paths[1:]:
            if self._check(path) != self.scored:
                raise RAdapterError(f"some of {folder} have scores, and {path} differs from them")

    def _path(self, name: str) -> Path:
        return self._folder / f"{Path(name).stem}.npz"

    def _check(self, path: Path) -> bool:
        """Check a file with its headers, before its arrays are read; True if it has scores."""
        headers = {}
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        try:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    with archive.open(name) as file:
                        version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
                        shape, _, dtype = read_header[version](file)  # type: ignore[no-untyped-call]
                        headers[name.removesuffix(".npy")] = shape, dtype
        except Exception as error:  # zipfile and numpy raise many kinds of errors on broken files
            raise RAdapterError(f"the proposals {path} can't be read: {reason(error)}") from None
        shape, dtype = headers.get("masks", ((0,), np.dtype(float)))
        fits = dtype in (bool, np.uint8) or dtype.kind == "f"
        if len(shape) != 3 or shape[0] > MOST or not fits:
            raise RAdapterError(
                f"{path} needs masks [N, H, W], N up to {MOST}, {_KINDS}; it holds {dtype}"
                f" {list(shape)}"
            )
        wanted = (shape[0], self._classes)
        shape, dtype = headers.get("scores", (wanted, np.dtype(float)))
        if shape != wanted or dtype.kind != "f":
            raise RAdapterError(
                f"{path} has scores {dtype} {list(shape)}; allowed: float {list(wanted)}, a column"
                " for each class"
            )
        return "scores" in headers

    def read(
        self, name: str, size: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
        """Read the masks of an image of this height and width, 255 inside, and their scores."""
        path = self._path(name)
        try:
            arrays = read_arrays(path)
            masks = arrays["masks"]
            scores = arrays["scores"].astype(np.float32) if self.scored else None
        except (OSError, ValueError, KeyError) as error:
            raise RAdapterError(f"the proposals {path} can't be read: {reason(error)}") from None
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
        return masks.astype(np.uint8), scores

    def raw(self, name: str) -> bytes:
        """Read the file of an image, for a digest."""
        return self._path(name).read_bytes()
