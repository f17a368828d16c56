"""Images with masks: label maps in a folder, COCO's panoptic annotations, COCO's instance
annotations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from radapter_serve.contract.image_files import SUFFIXES
from radapter_serve.contract.preprocess import oriented
from radapter_serve.data.class_ids import find_class_file, number_classes, read_class_ids
from radapter_serve.data.rows import BrokenImage, share_of
from radapter_serve.errors import RAdapterError, reason

IGNORE = -1
_ORIENTATION = ExifTags.Base.Orientation
MAX_ID = 65535  # of a label map, which has 16 bits at most

ClassMask = tuple[int, NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class MaskedImage(ABC):
    """An image with a mask.

    Attributes:
        name: what to call it in a message.
        path: its file.
        exif_orientation: turn image and mask as the image's EXIF says.
    """

    name: str
    path: Path
    exif_orientation: bool = field(default=True, kw_only=True)

    def data(self) -> bytes:
        """The bytes of the image file.

        Raises:
            BrokenImage: it is missing; says which.
        """
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise BrokenImage(
                f"image {self.path} can't be read: {error.strerror or error}"
            ) from None

    @abstractmethod
    def segments(self) -> list[ClassMask]:
        """Class and mask, bool [H, W], of each segment; instances of a class stay apart where the
        data has them.

        Raises:
            RAdapterError: the mask can't be read, or is of another size than the image.
            BrokenImage: the image is missing, or no image.
        """

    def mask(self) -> NDArray[np.int32]:
        """The class of every pixel, int32 [H, W]: an index into `Masked.classes`, or IGNORE.

        Where segments overlap, the smaller lies on top.

        Raises:
            RAdapterError, BrokenImage: as `segments`.
        """
        segments = self.segments()
        mask = np.full(segments[0][1].shape, IGNORE, np.int32)
        for label, inside in sorted(segments, key=lambda segment: -int(segment[1].sum())):
            mask[inside] = label
        return mask

    def areas(self) -> list[tuple[int, int]]:
        """Class and area in pixels of each of `segments`, in their order."""
        return [(label, int(mask.sum())) for label, mask in self.segments()]

    def _fit(self, mask: Image.Image, what: str) -> Image.Image:
        """Turn a mask as its image is turned, unless it stands upright already.

        Args:
            mask: without an EXIF orientation it may be upright, which its size tells, or lie as the
                image is stored.
            what: what to call it in a message.

        Raises:
            RAdapterError: its size is not that of the image.
        """
        try:
            with Image.open(self.path) as image:
                orientation = image.getexif().get(_ORIENTATION, 1) if self.exif_orientation else 1
                stored = image.size
        except Exception as error:  # Pillow raises anything on broken files
            raise BrokenImage(f"image {self.path} can't be read: {reason(error)}") from None
        size = stored[::-1] if orientation in (5, 6, 7, 8) else stored
        upright = oriented(mask) if self.exif_orientation else mask
        if upright is mask and mask.size == stored and orientation != 1:
            mask.getexif()[_ORIENTATION] = orientation
            upright = oriented(mask)
        if upright.size != size:
            raise RAdapterError(
                f"{what} has {mask.width} x {mask.height} pixels but the image {self.path} has"
                f" {stored[0]} x {stored[1]}; make them the same size"
                + (
                    "; the image is not turned as its EXIF says"
                    if mask.size == stored[::-1]
                    else ""
                )
            )
        return upright


@dataclass(frozen=True)
class Masked:
    """A data set of images with masks.

    Attributes:
        images: not decoded, the masks neither.
        classes: one entry a class, synonyms after commas.
    """

    images: Sequence[MaskedImage]
    classes: list[str]

    def held_out(self, fraction: float, seed: int) -> tuple[Masked, Masked]:
        """The data without a share of the images, drawn by the seed, and that share.

        Raises:
            RAdapterError: there is one image alone.
        """
        order = np.random.default_rng(seed).permutation(len(self.images))
        count = share_of(len(order), fraction)
        if not count:
            raise RAdapterError(
                f"val_fraction is {fraction} but there is one image; name validation data"
            )
        kept, held = (
            [self.images[index] for index in sorted(part)]
            for part in (order[count:], order[:count])
        )
        return replace(self, images=kept), replace(self, images=held)


@dataclass(frozen=True, eq=False)
class LabelMap(MaskedImage):
    """The value of a pixel is the id of its class: one segment a class.

    Attributes:
        mask_path: PNG.
        table: class of each id, or IGNORE; the last entry is for all higher ids.
    """

    mask_path: Path
    table: NDArray[np.int32]

    def mask(self) -> NDArray[np.int32]:
        image = open_mask(self.mask_path)
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise RAdapterError(
                f"the mask {self.mask_path} is a picture in {image.mode}; a label map is a PNG,"
                " gray, palette or 16 bit, whose value is the class id (for COCO's panoptic masks,"
                " which are coloured, use coco:FILE.json)"
            )
        image = self._fit(image, f"the mask {self.mask_path}")
        return self.table.take(np.asarray(image).astype(np.int32), mode="clip")

    def segments(self) -> list[ClassMask]:
        mask = self.mask()
        return [(label, mask == label) for label, _ in _areas(mask)]

    def areas(self) -> list[tuple[int, int]]:
        return _areas(self.mask())


def _areas(mask: NDArray[np.int32]) -> list[tuple[int, int]]:
    counts = np.bincount(mask.ravel() - IGNORE)[-IGNORE:]  # a tenth of the time of np.unique
    return [(int(label), int(counts[label])) for label in np.flatnonzero(counts)]


def open_mask(path: Path) -> Image.Image:
    """Decode the PNG of a mask.

    Raises:
        RAdapterError: it is missing, broken or no PNG.
    """
    try:
        image = Image.open(path, formats=("PNG",))
        image.load()
    except Exception as error:  # Pillow raises anything on broken files
        raise RAdapterError(
            f"the mask {path} can't be read: {reason(error)}; it has to be a PNG file"
        ) from None
    return image


def load_label_maps(folder: Path, classes: Path | None, images: Path | None) -> Masked:
    """Open a folder of images with label maps, as `load_masked` says.

    Raises:
        RAdapterError: an image or a mask is missing, or there is no class file.
    """
    names = read_class_ids(classes or find_class_file(folder))
    if max(names) > MAX_ID:
        raise RAdapterError(
            f"the class id {max(names)} is too high for a label map; allowed: 0 to {MAX_ID}"
        )
    index, entries = number_classes(names)
    table = np.full(max(index) + 2, IGNORE, np.int32)
    for id_, label in index.items():
        table[id_] = label
    masks = {path.stem: path for path in _files(folder / "masks", (".png",), "label maps")}
    found = _files(images or folder / "images", SUFFIXES, "images")
    missing = [path for path in found if path.stem not in masks]
    if missing:
        raise RAdapterError(
            f"the image {missing[0]} has no mask {folder / 'masks' / missing[0].stem}.png "
            f"({len(missing)} of {len(found)} images lack one); add it or take the image out"
        )
    return Masked([LabelMap(path.name, path, masks[path.stem], table) for path in found], entries)


def _files(folder: Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
    try:
        found = sorted(
            p
            for p in folder.iterdir()
            if p.suffix.lower() in suffixes and not p.name.startswith(".")
        )
    except OSError as error:
        raise RAdapterError(
            f"cannot read {folder}, the folder of the {what}: {error.strerror}"
        ) from None
    if not found:
        raise RAdapterError(f"{folder} holds no {what}; allowed: {', '.join(suffixes)}")
    return found
