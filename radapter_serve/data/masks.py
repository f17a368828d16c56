"""Images with masks: label maps in a folder, and COCO's panoptic and instance annotations; class
files that name their ids; and segments for training: each pair is the crop of a segment and a
prompt with the name of its class.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from radapter_client.heic import is_heic
from radapter_serve.contract.images import SUFFIXES, orientation_of, oriented
from radapter_serve.contract.labels import join_label, read_label_file, split_label
from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.data.rows import (
    BrokenImage,
    LabelledImages,
    check_share,
    decode_named,
    read_named,
    tracked,
)
from radapter_serve.data.source import DataSource
from radapter_serve.errors import RAdapterError, cause, listed, reason

IGNORE = -1
MAX_ID = 65535  # of a label map, which has at most 16 bits
_IGNORED_NAMES = ("unlabeled", "void", "ignore")
_CLASS_FILES = ("classes.txt", "classes.json", "classes.yaml")
_PANOPTIC = (  # modes of Pillow, and what is said where a mask has another
    ("RGB",),
    "a panoptic mask is a PNG in RGB, whose colour, R + 256 G + 65536 B, is the id of the segment",
)

ClassMask = tuple[int, NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class MaskedImage(ABC):
    """An image with a mask."""

    path: Path
    exif_orientation: bool = field(default=True, kw_only=True)  # turn both as EXIF says

    @property
    def name(self) -> str:
        """The name of the image file."""
        return self.path.name

    def data(self) -> bytes:
        """Read the image file, a HEIC as JPEG."""
        return read_named(self.path.read_bytes, self.path)

    @abstractmethod
    def segments(self) -> list[ClassMask]:
        """Class and mask, bool [H, W], of each segment: of a class, or of each of its instances."""

    @abstractmethod
    def areas(self) -> Sequence[tuple[int, float]]:
        """Class and area in pixels of each of `segments`, in their order."""

    def mask(self) -> NDArray[np.int32]:
        """The class of each pixel, int32 [H, W], or IGNORE; of segments that
        overlap, the smallest.
        """
        segments = self.segments()
        mask = np.full(segments[0][1].shape, IGNORE, np.int32)
        for label, inside in sorted(segments, key=lambda segment: -int(segment[1].sum())):
            mask[inside] = label
        return mask

    def _read(self, path: Path, modes: Sequence[str], kind: str) -> NDArray[np.int32]:
        """Read the PNG of a mask, turned like its image, int32 [H, W] or [H, W, 3]."""
        with _png(path, modes, kind) as mask:
            mask.load()
        return np.asarray(self._fit(mask, f"the mask {path}")).astype(np.int32)

    @cached_property
    def _stored(self) -> tuple[tuple[int, int], int]:
        """Width and height in the image file, and the orientation that turns the image."""
        try:
            with self.path.open("rb") as file:
                start = file.read(16)
                file.seek(0)
                # Pillow reads the header alone; but a HEIC has to be converted.
                with Image.open(io.BytesIO(self.data()) if is_heic(start) else file) as image:
                    return image.size, orientation_of(image) if self.exif_orientation else 1
        except BrokenImage:
            raise
        except UnidentifiedImageError:  # its message is the repr of a Python object
            what = f"{self.path.stat().st_size} bytes are not an image"
            raise BrokenImage(f"image {self.path} can't be read: {what}") from None
        except Exception as error:  # Pillow raises anything on broken files
            raise BrokenImage(f"image {self.path} can't be read: {cause(error)}") from None

    def _fit(self, mask: Image.Image, what: str) -> Image.Image:
        """Turn a mask like its image, unless its size shows that it is upright already."""
        stored, orientation = self._stored
        upright = oriented(mask, orientation) if mask.size == stored else mask
        if upright.size != (stored[::-1] if orientation in (5, 6, 7, 8) else stored):
            raise RAdapterError(
                f"{what} has {mask.width} x {mask.height} pixels but the image {self.path} has"
                f" {stored[0]} x {stored[1]}; make them the same size, or turn both with EXIF"
            )
        return upright


@contextlib.contextmanager
def _png(path: Path, modes: Sequence[str], kind: str) -> Iterator[Image.Image]:
    """Open the PNG of a mask for the block, whose errors are all the file's."""
    try:
        with Image.open(path, formats=("PNG",)) as mask:
            if mask.mode not in modes:
                raise RAdapterError(f"the mask {path} is a picture in {mask.mode}; {kind}")
            yield mask
    except RAdapterError:
        raise
    except Exception as error:  # Pillow raises anything on broken files
        raise RAdapterError(
            f"the mask {path} can't be read: {reason(error)}; it has to be a PNG file"
        ) from None


@dataclass(frozen=True)
class Masked:
    """A data set of images with masks, which are not decoded yet."""

    images: Sequence[MaskedImage]
    classes: list[str]  # with synonyms after commas

    def held_out(self, fraction: float, seed: int) -> tuple[Masked, Masked]:
        """Split off a fraction of the images, drawn with the seed; returns both parts."""
        order = np.random.default_rng(seed).permutation(len(self.images))
        count = check_share(len(order), fraction)
        kept, held = (
            replace(self, images=[self.images[index] for index in sorted(part)])
            for part in (order[count:], order[:count])
        )
        return kept, held


@dataclass(frozen=True, eq=False)
class LabelMap(MaskedImage):
    """A mask whose pixel values are class ids; each class is one segment."""

    mask_path: Path  # PNG
    table: NDArray[np.int32]  # class of each id, or IGNORE; the last entry is for all higher ids

    def mask(self) -> NDArray[np.int32]:
        ids = self._read(
            self.mask_path,
            ("1", "L", "P", "I", "I;16"),
            "a label map is a PNG, gray, palette or 16 bit, whose value is the class id (for COCO's"
            " panoptic masks, which are coloured, use coco:FILE.json)",
        )
        return self.table.take(ids, mode="clip")

    def segments(self) -> list[ClassMask]:
        mask = self.mask()
        return [(label, mask == label) for label, _ in _areas_of(mask)]

    def areas(self) -> list[tuple[int, int]]:
        return _areas_of(self.mask())


def _areas_of(mask: NDArray[np.int32]) -> list[tuple[int, int]]:
    counts = np.bincount(mask.ravel() - IGNORE)[-IGNORE:]  # ten times as fast as np.unique
    return [(int(label), int(counts[label])) for label in np.flatnonzero(counts)]


@dataclass(frozen=True, eq=False)
class Panoptic(MaskedImage):
    """A mask whose colours are segment ids, R + 256 G + 65536 B; 0 is unlabeled."""

    mask_path: Path  # PNG
    labels: dict[int, tuple[int, float]]  # class, or IGNORE, and area of each segment id

    def segments(self) -> list[ClassMask]:
        colours = self._read(self.mask_path, *_PANOPTIC)
        ids = colours @ np.array([1, 256, 65536], np.int32)
        segments = [(label, ids == id_) for id_, (label, _) in self.labels.items()]
        areas = [int(inside.sum()) for _, inside in segments]
        if sum(areas) + int((ids == 0).sum()) != ids.size or 0 in areas:
            wrong = sorted(set(np.unique(ids).tolist()) - {0} ^ set(self.labels))
            raise RAdapterError(
                f"the mask {self.mask_path} and its annotation do not belong together: the segments"
                f" {', '.join(map(str, wrong[:5]))} are in only one of them"
            )
        return [segment for segment in segments if segment[0] != IGNORE]

    def areas(self) -> list[tuple[int, float]]:
        # The annotation has the areas. Compare the checksums of the PNG without decoding it, so
        # that a broken file is found before a training and not in the middle of it.
        with _png(self.mask_path, *_PANOPTIC) as mask:
            mask.verify()
        return [pair for pair in self.labels.values() if pair[0] != IGNORE]


@dataclass(frozen=True, eq=False)
class Instances(MaskedImage):
    """A mask of run lengths for each object; where objects overlap, the smaller is on top."""

    size: list[int]  # height and width of the image according to the annotation file
    # Class and compressed run lengths; COCO's 860,000 polygons would fill gigabytes.
    objects: list[tuple[int, bytes]]

    def segments(self) -> list[ClassMask]:
        from pycocotools import mask as coco

        what = f"the annotation of {self.name}"
        segments = []
        for label, counts in self.objects:
            mask = Image.fromarray(coco.decode({"size": self.size, "counts": counts}))
            segments.append((label, np.asarray(self._fit(mask, what), bool)))
        return segments

    def areas(self) -> list[tuple[int, int]]:
        from pycocotools import mask as coco

        return [
            (label, int(coco.area({"size": self.size, "counts": counts})))
            for label, counts in self.objects
        ]


def load_masked(source: DataSource) -> Masked:
    """Open images with masks, `masks:DIR` or `coco:FILE.json`, as docs/train.md describes them."""
    reader, _, place = source.data.partition(":")
    readers = {"masks": _load_label_maps, "coco": _load_coco}
    if reader not in readers or not place:
        raise RAdapterError(
            f"could not read the masks {source.data}; allowed: masks:DIR, coco:FILE.json"
        )
    masked = readers[reader](Path(place), source.classes, source.images)
    turned = source.exif_orientation
    return replace(masked, images=[replace(of, exif_orientation=turned) for of in masked.images])


def _load_label_maps(folder: Path, classes: Path | None, images: Path | None) -> Masked:
    if classes is None:
        places = [parent / name for parent in (folder, folder.parent) for name in _CLASS_FILES]
        classes = next((place for place in places if place.is_file()), None)
    if classes is None:
        raise RAdapterError(
            f"no {', '.join(_CLASS_FILES)} in {folder} or beside it; write one (one class a line,"
            " the first is id 0), or name a file: --classes FILE, or `classes` in a suite"
        )
    names = _read_class_ids(classes)
    if max(names) > MAX_ID:
        raise RAdapterError(
            f"the class id {max(names)} is too high for a label map; allowed: 0 to {MAX_ID}"
        )
    index, entries = _number_classes(names)
    table = np.full(max(index) + 2, IGNORE, np.int32)
    for id_, label in index.items():
        table[id_] = label

    def files(place: Path, suffixes: Sequence[str], what: str) -> list[Path]:
        try:
            paths = [path for path in place.iterdir() if path.suffix.lower() in suffixes]
        except OSError as error:
            raise RAdapterError(
                f"cannot read {place}, the folder of the {what}: {error.strerror}"
            ) from None
        shown = sorted(path for path in paths if not path.name.startswith("."))
        if not shown:
            raise RAdapterError(f"{place} holds no {what}; allowed: {', '.join(suffixes)}")
        return shown

    masks = {path.stem: path for path in files(folder / "masks", (".png",), "label maps")}
    paths = files(images or folder / "images", SUFFIXES, "images")
    missing = [path for path in paths if path.stem not in masks]
    if missing:
        raise RAdapterError(
            f"the image {missing[0]} has no mask {folder / 'masks' / missing[0].stem}.png "
            f"({len(missing)} of {len(paths)} images lack one); add it or take the image out"
        )
    return Masked([LabelMap(path, masks[path.stem], table) for path in paths], entries)


def _load_coco(file: Path, classes: Path | None, images: Path | None) -> Masked:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise RAdapterError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise RAdapterError(f"{file} is not JSON: {reason(error)}") from None
    folder = images or file.parent / "images"
    masks = file.with_suffix("")
    masked: list[MaskedImage] = []
    files = []
    try:
        categories = {row["id"]: row["name"] for row in content["categories"]}
        index, entries = _number_classes(_read_class_ids(classes) if classes else categories)
        index = {id_: index.get(id_, IGNORE) for id_ in categories}
        named = {row["id"]: row for row in content["images"]}
        annotations = content["annotations"]
        if any("segments_info" in row for row in annotations):  # panoptic: a row for each image
            for row in annotations:
                files.append(masks / row["file_name"])
                labels = {}
                for segment in row["segments_info"]:
                    area = segment.get("area")
                    if not isinstance(area, int | float):
                        raise ValueError(f"a segment of {row['file_name']} has the area {area!r}")
                    labels[segment["id"]] = index[segment["category_id"]], area
                if any(label != IGNORE for label, _ in labels.values()):
                    path = folder / named[row["image_id"]]["file_name"]
                    masked.append(Panoptic(path, files[-1], labels))
        else:  # instances: a row for each object
            objects: dict[int, list[tuple[int, bytes]]] = {}
            for row in annotations:
                label = index[row["category_id"]]
                image = named[row["image_id"]]
                if label != IGNORE:
                    runs = _runs_of(row["segmentation"], image)
                    objects.setdefault(row["image_id"], []).append((label, runs))
            for id_, of_image in objects.items():
                image = named[id_]
                size = [image["height"], image["width"]]
                masked.append(Instances(folder / image["file_name"], size, of_image))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RAdapterError(
            f"{file} is not an annotation file of COCO ({type(error).__name__}: {reason(error)});"
            " it needs images, categories and annotations of these, with segments_info and the area"
            " of each (panoptic), or segmentation (instances)"
        ) from None
    if not masked:
        known = ", ".join(map(str, [*categories.values()][:8]))
        raise RAdapterError(
            f"{file} has no segment of a class that is named; its categories: {known}"
        )
    for paths, place, what, hint in (
        (files, masks, "mask", "the masks of a panoptic FILE.json lie in the folder FILE"),
        (
            [image.path for image in masked],
            folder,
            "image",
            "name the folder of the images: --images DIR, or `images` in a suite",
        ),
    ):
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise RAdapterError(
                f"no {what} {missing[0]} ({len(missing)} of {len(paths)} are missing in {place});"
                f" {hint}"
            )
    return Masked(masked, entries)


def _runs_of(segmentation: Any, image: Mapping[str, Any]) -> bytes:
    """Compressed run lengths from JSON: polygons, a list of run lengths, or compressed ones."""
    from pycocotools import mask as coco

    size = [image["height"], image["width"]]
    try:
        if isinstance(segmentation, list):
            if not segmentation or any(
                len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation
            ):
                raise ValueError("a polygon needs three points or more")
            return bytes(coco.merge(coco.frPyObjects(segmentation, *size))["counts"])
        if list(segmentation["size"]) != size:
            raise ValueError(f"size is {segmentation['size']}")
        counts = segmentation["counts"]
        if isinstance(counts, list):
            if sum(counts) != size[0] * size[1] or min(counts) < 0:
                raise ValueError(f"counts are for {sum(counts)} pixels")
            return bytes(coco.frPyObjects(segmentation, *size)["counts"])
        runs = {"size": size, "counts": counts.encode()}
        coco.decode(runs)  # only decoding shows whether they are complete
        return bytes(runs["counts"])
    except Exception as error:  # pycocotools raises many kinds of errors
        raise RAdapterError(
            f"a segmentation of the image {image['file_name']} is broken ({reason(error)});"
            f" allowed: polygons [[x, y, x, y, x, y, ...], ...], or run lengths of size {size}"
        ) from None


def _read_class_ids(path: Path) -> dict[int, str]:
    """Read a class file: one class a line, from id 0, or JSON or YAML that maps id to name."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        names = dict(enumerate(read_label_file(path)))
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                raise RAdapterError(
                    f"{path}, line {number} is blank: fill it (an id without a class is"
                    " `unlabeled`), or remove it"
                )
        return names
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))  # JSON is YAML
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RAdapterError(f"cannot read the classes {path}: {reason(error)}") from None
    wrong = f'{path} must map class ids to names, such as {{"0": "unlabeled", "1": "cat, kitty"}}'
    if not isinstance(values, dict) or not values:
        raise RAdapterError(wrong)
    for id_, name in values.items():
        if not str(id_).isdecimal() or not isinstance(name, str) or not split_label(name):
            raise RAdapterError(f"{wrong}; it has {id_!r}: {name!r}")
    return {int(id_): name for id_, name in values.items()}


def _number_classes(names: Mapping[int, str]) -> tuple[dict[int, int], list[str]]:
    """Class number of each id, and the classes by number, with synonyms after commas."""
    entries: dict[str, str] = {}
    index: dict[int, int] = {}
    for id_, name in names.items():
        first = split_label(name)[0]
        if first.lower() in _IGNORED_NAMES:
            continue
        entries.setdefault(first, join_label(split_label(name)))
        index[id_] = list(entries).index(first)
    if not index:
        raise RAdapterError("the classes name nothing but what is ignored; name one class or more")
    return index, list(entries.values())


@dataclass
class SegmentCrops(LabelledImages):
    """Segments of images, one in each row, for training and validation."""

    rows: NDArray[np.int32]  # [N, 3]: number of the image, of its segment, and of the class
    images: Sequence[MaskedImage]
    classes: list[str]
    crop: MaskCrop = field(default_factory=MaskCrop)  # how a segment is cropped
    templates: Sequence[str] = ("a photo of a {}.",)
    _last: tuple[int, Image.Image, list[ClassMask]] | None = field(
        default=None, init=False, repr=False
    )

    def labels_of(self, row: Any) -> tuple[int, ...]:
        """The number of a segment's class."""
        return (int(row[2]),)

    def image(self, row: Any) -> Image.Image:
        """The crop of a segment."""
        number = int(row[0])
        # Keep the last image, so that rows in order, as in validation, decode each image once.
        if self._last is None or self._last[0] != number:
            masked = self.images[number]
            image = decode_named(
                masked.data(), masked.path, exif_orientation=masked.exif_orientation
            )
            self._last = number, image, masked.segments()
        _, image, segments = self._last
        return self.crop(image, segments[int(row[1])][1])


def list_segments(
    masked: Masked, min_area: int, broken: list[str] | None = None, *, progress: bool = True
) -> SegmentCrops:
    """List the segments of at least `min_area` pixels; reads every label map once."""
    rows: list[tuple[int, int, int]] = []
    wrong: list[str] = []
    largest: float = 0
    progress = progress and os.environ.get("LOCAL_RANK", "0") == "0"  # in one of several processes
    images = tracked(masked.images, len(masked.images), "reading the masks of", progress)
    for number, image in enumerate(images):
        try:
            areas = image.areas()
        except RAdapterError as error:
            left_out = wrong if broken is None or not isinstance(error, BrokenImage) else broken
            left_out.append(str(error))
            continue
        rows += [
            (number, segment, label)
            for segment, (label, area) in enumerate(areas)
            if area >= min_area
        ]
        largest = max([largest, *(area for _, area in areas)])
    if len(wrong) == 1:
        raise RAdapterError(wrong[0])
    if wrong:
        raise RAdapterError(
            f"{len(wrong)} of {len(masked.images)} images can't be used with their"
            f" masks:{listed(wrong)}"
        )
    if not rows:
        raise RAdapterError(
            f"no segment of {', '.join(masked.classes[:5])}, ... has {min_area} pixels, the largest"
            f" {largest}; lower --mask-min-area, or check the ids in the class file"
        )
    return SegmentCrops(np.array(rows, np.int32), masked.images, masked.classes)
