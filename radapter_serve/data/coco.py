"""COCO's annotations of masks: panoptic, and of instances."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from radapter_serve.data.class_ids import number_classes, read_class_ids
from radapter_serve.data.masks import IGNORE, ClassMask, Masked, MaskedImage, open_mask
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.extras import install_command


def load_coco(file: Path, classes: Path | None, images: Path | None) -> Masked:
    """Open a file of COCO annotations, panoptic or of instances, as `load_masked` says.

    Raises:
        RAdapterError: it can't be read, names what it does not list, or an image or a mask is
            missing.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise RAdapterError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise RAdapterError(f"{file} is not JSON: {reason(error)}") from None
    folder = images or file.parent / "images"
    try:
        categories = {row["id"]: row["name"] for row in content["categories"]}
        index, entries = number_classes(read_class_ids(classes) if classes else categories)
        listed = {row["id"]: row for row in content["images"]}
        annotations = content["annotations"]
        for row in annotations:
            _check_ids(file, row, categories, listed)
        panoptic = any("segments_info" in row for row in annotations)
        masked = (_panoptic if panoptic else _instances)(file, folder, annotations, listed, index)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RAdapterError(
            f"{file} is no annotation file of COCO ({type(error).__name__}: {reason(error)}); it"
            " needs images, categories and annotations, these with segments_info (panoptic) or"
            " segmentation (instances)"
        ) from None
    if not masked:
        raise RAdapterError(
            f"{file} has no segment of a class that is named; its categories: {_some(categories)}"
        )
    _check_files(
        [image.path for image in masked],
        folder,
        "image",
        "name the folder of the images: --images DIR, or `images` in a suite",
    )
    return Masked(masked, entries)


def _check_ids(
    file: Path, row: dict[str, Any], categories: dict[int, str], listed: dict[int, Any]
) -> None:
    if row["image_id"] not in listed:
        raise RAdapterError(
            f"{file} has an annotation of the image {row['image_id']}, which its images do not list"
        )
    for segment in row.get("segments_info", [row]):
        if segment["category_id"] not in categories:
            raise RAdapterError(
                f"{file} has an annotation of the category {segment['category_id']}, which its"
                f" categories do not list: {_some(categories)}"
            )


def _panoptic(
    file: Path, folder: Path, annotations: Any, listed: Any, index: dict[int, int]
) -> list[MaskedImage]:
    masks = file.with_suffix("")
    found: list[MaskedImage] = []
    for row in annotations:
        path = folder / listed[row["image_id"]]["file_name"]
        labels = {
            segment["id"]: index.get(segment["category_id"], IGNORE)
            for segment in row["segments_info"]
        }
        if any(label != IGNORE for label in labels.values()):
            areas = [segment.get("area") for segment in row["segments_info"]]
            found.append(Panoptic(path.name, path, masks / row["file_name"], labels, areas))
    paths = [masks / row["file_name"] for row in annotations]
    _check_files(paths, masks, "mask", "the masks of a panoptic FILE.json lie in the folder FILE")
    return found


def _instances(
    file: Path, folder: Path, annotations: Any, listed: Any, index: dict[int, int]
) -> list[MaskedImage]:
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError:
        raise RAdapterError(
            f"the instances of {file} need pycocotools, which is not installed;"
            f" {install_command('train')}"
        ) from None
    objects: dict[int, list[tuple[int, bytes]]] = {}
    for row in annotations:
        if row["category_id"] in index:
            image = listed[row["image_id"]]
            runs = rle_of(row["segmentation"], image["file_name"], image["width"], image["height"])
            objects.setdefault(row["image_id"], []).append((index[row["category_id"]], runs))
    found: list[MaskedImage] = []
    for id_, some in objects.items():
        path = folder / listed[id_]["file_name"]
        found.append(
            Instances(path.name, path, (listed[id_]["width"], listed[id_]["height"]), some)
        )
    return found


@dataclass(frozen=True, eq=False)
class Panoptic(MaskedImage):
    """The colour of a pixel is the id of its segment, R + 256 G + 65536 B; 0 is unlabeled.

    Attributes:
        mask_path: PNG.
        labels: class of each segment id, or IGNORE.
        listed_areas: what the file says of each id's area; None where it says nothing.
    """

    mask_path: Path
    labels: dict[int, int]
    listed_areas: list[int | None]

    def segments(self) -> list[ClassMask]:
        image = open_mask(self.mask_path)
        if image.mode != "RGB":
            raise RAdapterError(
                f"the mask {self.mask_path} is a picture in {image.mode}; a panoptic mask is a PNG"
                " in RGB, whose colour, R + 256 G + 65536 B, is the id of the segment"
            )
        image = self._fit(image, f"the mask {self.mask_path}")
        ids = np.asarray(image).astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        segments = [(label, ids == id_) for id_, label in self.labels.items()]
        areas = [int(inside.sum()) for _, inside in segments]
        if sum(areas) + int((ids == 0).sum()) != ids.size or 0 in areas:
            wrong = sorted(set(np.unique(ids).tolist()) - {0} ^ set(self.labels))
            raise RAdapterError(
                f"the mask {self.mask_path} and its annotation do not belong together: the segments"
                f" {', '.join(map(str, wrong[:5]))} are in one of them alone"
            )
        return [(label, inside) for label, inside in segments if label != IGNORE]

    def areas(self) -> list[tuple[int, int]]:
        if None in self.listed_areas:
            return super().areas()
        pairs = zip(self.labels.values(), self.listed_areas, strict=True)
        return [(label, area) for label, area in pairs if label != IGNORE and area is not None]


@dataclass(frozen=True, eq=False)
class Instances(MaskedImage):
    """Run lengths, one for each object; where objects overlap, the smaller lies on top.

    Attributes:
        size: width and height that the file says the image has.
        objects: class and compressed run lengths; JSON's polygons, 860,000 in COCO, would fill
            gigabytes.
    """

    size: tuple[int, int]
    objects: list[tuple[int, bytes]]

    def segments(self) -> list[ClassMask]:
        from pycocotools import mask as coco

        what = f"the annotation of {self.name}"
        masks = [(label, Image.fromarray(coco.decode(runs))) for label, runs in self._coded()]
        return [(label, np.asarray(self._fit(mask, what), bool)) for label, mask in masks]

    def areas(self) -> list[tuple[int, int]]:
        from pycocotools import mask as coco

        return [(label, int(coco.area(runs))) for label, runs in self._coded()]

    def _coded(self) -> list[tuple[int, dict[str, Any]]]:
        return [
            (label, {"size": list(self.size[::-1]), "counts": runs}) for label, runs in self.objects
        ]


def rle_of(segmentation: Any, name: str, width: int, height: int) -> bytes:
    """The compressed run lengths of what JSON has: polygons, or run lengths as a list or
    compressed.
    """
    from pycocotools import mask as coco

    try:
        if isinstance(segmentation, list):
            if not segmentation or any(
                len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation
            ):
                raise ValueError("a polygon needs three points or more")
            runs = coco.merge(coco.frPyObjects(segmentation, height, width))
        elif list(segmentation["size"]) != [height, width]:
            raise ValueError(f"size is {segmentation['size']}")
        elif isinstance(counts := segmentation["counts"], list):
            if sum(counts) != width * height or min(counts) < 0:
                raise ValueError(f"counts are for {sum(counts)} pixels")
            runs = coco.frPyObjects(segmentation, height, width)
        else:
            runs = {"size": [height, width], "counts": counts.encode()}
            coco.decode(runs)  # which alone finds out whether they are whole
    except Exception as error:  # pycocotools raises many kinds on values that are not as it expects
        raise RAdapterError(
            f"a segmentation of the image {name} is broken ({reason(error)}); allowed: polygons "
            f"[[x, y, x, y, x, y, ...], ...], or run lengths of size [{height}, {width}]"
        ) from None
    return bytes(runs["counts"])


def _check_files(paths: list[Path], folder: Path, what: str, hint: str) -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise RAdapterError(
            f"no {what} {missing[0]} ({len(missing)} of {len(paths)} are missing in {folder});"
            f" {hint}"
        )


def _some(names: dict[int, str]) -> str:
    return ", ".join(list(names.values())[:8]) + (", ..." if len(names) > 8 else "")
