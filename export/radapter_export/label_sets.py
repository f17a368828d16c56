"""Label sets of an export: their files, with images that show some of the labels."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.image_files import list_images
from radapter_serve.contract.labels import join_label, read_label_file, split_label
from radapter_serve.contract.preprocess import MAX_BYTES, Preprocess, decode_pixels, verify
from radapter_serve.encoders.labels import DEFAULT_WEIGHT, MAX_EXAMPLES, Examples
from radapter_serve.errors import RAdapterError
from radapter_serve.files import read_yaml

MAX_SHOWN = 2000  # examples of a label set
_FORM = "each entry is a label, or has label, images and weight"

T = TypeVar("T")


@dataclass(frozen=True)
class LabelFile:
    """The labels of a file, and the images that show some of them."""

    labels: list[str]  # with their synonyms
    images: tuple[Path, ...] = ()
    places: tuple[int, ...] = ()  # of each image, the index of its label
    weights: tuple[float, ...] = ()  # of each label, the share of its images, in [0, 1]

    def examples(self, preprocess: Preprocess) -> Examples:
        """The images as the encoder takes them: small PNGs, without the files' metadata."""
        shown = []
        for path in self.images:
            pixels = _read_image(path, f"{path}", lambda data: decode_pixels(data, preprocess))
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG", compress_level=1)
            shown.append(file.getvalue())
        return Examples(tuple(shown), self.places, self.weights)


def read_label_set(path: str | Path, *, dynamic_alpha: bool) -> LabelFile:
    """Read a label file: a class a line, or YAML with images for some of them. With `dynamic_alpha`
    servers embed the images again for each α, so fewer are allowed.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        return LabelFile(read_label_file(path))
    document = read_yaml(path, "the label set")
    if not isinstance(document, list) or not document:
        raise RAdapterError(f"{path} is not a list of labels; {_FORM}")
    labels: list[str] = []
    weights: list[float] = []
    images: list[Path] = []
    places: list[int] = []
    for number, entry in enumerate(document):
        where = f"{path}, entry {number + 1}"
        fields = entry if isinstance(entry, dict) else {"label": entry}
        if unknown := [key for key in fields if key not in ("label", "images", "weight")]:
            raise RAdapterError(f"{where}: {unknown[0]!r:.80} is unknown; {_FORM}")
        label = fields.get("label")
        if not isinstance(label, str):  # such as 2024 and no, which YAML makes numbers and truth of
            raise RAdapterError(
                f"{where}: the label is {label!r:.80}, not text; write it in quotes"
            )
        if not (names := split_label(label)):
            raise RAdapterError(f"{where}: {label!r} names no class")
        files = _files(fields.get("images", []), path.parent, where)
        weight = fields.get("weight", DEFAULT_WEIGHT)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
            raise RAdapterError(
                f"{where}: weight is {weight!r:.80}; allowed: numbers from 0 (the text alone) to 1"
                " (the images alone)"
            )
        if "weight" in fields and not files:
            raise RAdapterError(f"{where}: weight is for images, and there are none")
        labels.append(join_label(names))
        weights.append(float(weight))
        images += files
        places += [number] * len(files)
    if not images:
        return LabelFile(labels)
    most = MAX_EXAMPLES if dynamic_alpha else MAX_SHOWN
    if len(images) > most:
        why = ", as servers embed them again at each alpha" if dynamic_alpha else ""
        raise RAdapterError(f"{path} has {len(images)} images; at most {most} are allowed{why}")
    for file in images:
        _read_image(file, f"{path}: {file}", verify)
    return LabelFile(labels, tuple(images), tuple(places), tuple(weights))


def _files(value: Any, folder: Path, where: str) -> list[Path]:
    """The image files of an entry, with those of the folders that it names."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RAdapterError(f"{where}: images is {value!r:.80}; allowed: files and folders")
    files: list[Path] = []
    for name in names:
        path = folder / name
        inside = [Path(file) for file in list_images(path).images] if path.is_dir() else [path]
        if not inside:
            raise RAdapterError(f"{where}: {path} holds no image")
        files += inside
    return files


def _read_image(path: Path, where: str, use: Callable[[bytes], T]) -> T:
    """Use the bytes of an image; of a larger file than any image may be, only the first."""
    try:
        with path.open("rb") as file:
            return use(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise RAdapterError(f"{where}: cannot be read: {error.strerror}") from None
    except TaskError as error:
        raise RAdapterError(f"{where}: {error.message}") from None
