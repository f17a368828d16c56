"""Karpathy's splits of COCO and Flickr: `dataset_coco.json`, `dataset_flickr30k.json`, `dataset_flickr8k.json`."""

from __future__ import annotations

import json
from pathlib import Path

import datasets

from radapter_serve.data import Captioned, CaptionedImage
from radapter_serve.errors import RAdapterError


def load_karpathy(path: Path, split: str, images: Path) -> Captioned:
    """Open the images of one split with their captions.

    Args:
        path: the JSON file: `images`, each with `filename`, perhaps `filepath`, `split` and `sentences` with `raw`.
        split: such as `test`.
        images: folder of the images, that of `filepath` where the file has it.

    Raises:
        RAdapterError: it can't be read, or has no such split.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["images"]
        rows = [
            {
                "image": str(Path(image.get("filepath", ""), image["filename"])),
                "caption": [sentence["raw"] for sentence in image["sentences"]],
            }
            for image in found
            if image["split"] == split
        ]
    except OSError as error:
        raise RAdapterError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RAdapterError(f"could not read {path} as a file of Karpathy's splits: {error!r}") from error
    if not rows:
        names = ", ".join(sorted({str(image["split"]) for image in found}))
        raise RAdapterError(f"{path} has no images of the split {split!r}; it has {names or 'no images at all'}")
    first = [CaptionedImage(number, tuple(row["caption"])) for number, row in enumerate(rows)]
    return Captioned(datasets.Dataset.from_list(rows), first, "image", "caption", images)
