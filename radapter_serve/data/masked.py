"""Opening a data set of images with masks, of any of the kinds that are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from radapter_serve.data.coco import load_coco
from radapter_serve.data.masks import Masked, load_label_maps
from radapter_serve.errors import RAdapterError


def load_masked(
    spec: str,
    *,
    classes: Path | None = None,
    images: Path | None = None,
    exif_orientation: bool = True,
) -> Masked:
    """Open a data set of images with masks.

    Args:
        spec: `masks:DIR` for the images DIR/images/* with the label maps DIR/masks/STEM.png (gray,
            palette or 16 bit; the value is the class id), or `coco:FILE.json` for COCO's panoptic
            annotations (their PNGs in the folder FILE) or instance annotations (polygons or run
            lengths).
        classes: file of the class ids: text with one class a line, the first of which is id 0, or
            JSON or YAML that maps id to name; None takes DIR/classes.txt, .json or .yaml, the same
            beside DIR, or COCO's categories. Ids without a name (255 by custom) and those named
            unlabeled, void or ignore are ignored; ids of one name are one class.
        images: folder of the images; None takes DIR/images, or `images` beside FILE.json.
        exif_orientation: turn images as their EXIF says. A mask turns with its image unless it
            stands upright already: then it has the size of the turned image, or an EXIF orientation
            of its own.

    Raises:
        RAdapterError: it can't be read, an image or a mask is missing, there is no class file, or
            ids do not match.
    """
    reader, _, place = spec.partition(":")
    if reader == "masks" and place:
        masked = load_label_maps(Path(place), classes, images)
    elif reader == "coco" and place:
        masked = load_coco(Path(place), classes, images)
    else:
        raise RAdapterError(f"could not read the masks {spec}; allowed: masks:DIR, coco:FILE.json")
    images_ = [replace(image, exif_orientation=exif_orientation) for image in masked.images]
    return Masked(images_, masked.classes)
