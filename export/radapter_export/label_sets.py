"""Label sets of an export: labels by their texts, and by images that show them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.image_files import list_images
from radapter_serve.contract.labels import join_label, read_label_file, split_label
from radapter_serve.contract.preprocess import MAX_BYTES, Preprocess, decode_pixels, verify
from radapter_serve.encoders.labels import DEFAULT_WEIGHT, MAX_EXAMPLES, Examples
from radapter_serve.errors import RAdapterError
from radapter_serve.files import read_yaml

MAX_SHOWN = 2000  # examples of a label set
YAML = (".yaml", ".yml")
_KEYS = ("label", "images", "weight")
_FORM = "each entry is a label, or has label, images and weight"


@dataclass(frozen=True)
class Shown:
    """Images that show labels of a label set.

    Attributes:
        files: of the images.
        labels: of each image, the place of its label, from 0.
        weights: of the examples of each label beside its text, in [0, 1].
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    weights: tuple[float, ...]

    def examples(self, preprocess: Preprocess) -> Examples:
        """The images as the encoder takes them, which is small, without the files' metadata."""
        return Examples(
            tuple(_encoder_image(path, preprocess) for path in self.files),
            self.labels,
            self.weights,
        )


@dataclass(frozen=True)
class LabelFile:
    """What the file of a label set holds.

    Attributes:
        labels: with their synonyms.
        shown: images for some of them; None where there are none.
    """

    labels: list[str]
    shown: Shown | None = None


def read_label_set(path: str | Path, *, dynamic_alpha: bool) -> LabelFile:
    """Read a label file: a class a line, or YAML with images for some of them.

    Args:
        path: of the file.
        dynamic_alpha: whether servers embed the images again, for each α.

    Raises:
        RAdapterError: it can't be read, or is none; an image is missing or broken; too many images.
    """
    path = Path(path)
    if path.suffix not in YAML:
        return LabelFile(read_label_file(path))
    document = read_yaml(path, "the label set")
    if not isinstance(document, list) or not document:
        raise RAdapterError(f"{path} is no list of labels; {_FORM}")
    labels: list[str] = []
    weights: list[float] = []
    files: list[Path] = []
    places: list[int] = []
    for number, entry in enumerate(document):
        where = f"{path}, entry {number + 1}"
        one = _entry(entry, where)
        labels.append(_label(one["label"], where))
        weights.append(_weight(one, where))
        found = _images(one.get("images", []), path.parent, where)
        files += found
        places += [number] * len(found)
        if "weight" in one and not found:
            raise RAdapterError(f"{where}: weight is for images, and there are none")
    if not files:
        return LabelFile(labels)
    most = MAX_EXAMPLES if dynamic_alpha else MAX_SHOWN
    if len(files) > most:
        why = ", as servers embed them again at each alpha" if dynamic_alpha else ""
        raise RAdapterError(f"{path} has {len(files)} images; at most {most} are allowed{why}")
    for file in files:
        _check_image(file, path)
    return LabelFile(labels, Shown(tuple(files), tuple(places), tuple(weights)))


def _entry(entry: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(entry, dict):
        return {"label": entry}
    unknown = [key for key in entry if key not in _KEYS]
    if unknown or "label" not in entry:
        what = f"{unknown[0]!r:.80} is unknown" if unknown else "label is missing"
        raise RAdapterError(f"{where}: {what}; {_FORM}")
    return entry


def _label(value: Any, where: str) -> str:
    # YAML makes numbers and truth of 2024 and no, which people mean as they wrote them.
    if not isinstance(value, str):
        raise RAdapterError(f"{where}: the label is {value!r:.80}, no text; write it in quotes")
    names = split_label(value)
    if not names:
        raise RAdapterError(f"{where}: {value!r} names no class")
    return join_label(names)


def _weight(entry: Mapping[str, Any], where: str) -> float:
    value = entry.get("weight", DEFAULT_WEIGHT)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RAdapterError(
            f"{where}: weight is {value!r:.80}; allowed: numbers from 0 (the text alone) to 1 (the"
            " images alone)"
        )
    return float(value)


def _images(value: Any, folder: Path, where: str) -> list[Path]:
    """The files that an entry names, those of folders among them."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RAdapterError(f"{where}: images is {value!r:.80}; allowed: files and folders")
    found: list[Path] = []
    for name in names:
        path = folder / name
        if not path.is_dir():
            found.append(path)
            continue
        inside = [Path(file) for file in list_images(path).images]
        if not inside:
            raise RAdapterError(f"{where}: {path} holds no image")
        found += inside
    return found


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _check_image(path: Path, label_file: Path) -> None:
    try:
        verify(_read(path))
    except OSError as error:
        raise RAdapterError(f"{label_file}: cannot read {path}: {error.strerror}") from None
    except TaskError as error:
        raise RAdapterError(f"{label_file}: {path}: {error.message}") from None


def _encoder_image(path: Path, preprocess: Preprocess) -> bytes:
    """An image as a PNG that preprocessing leaves as it is."""
    try:
        pixels = decode_pixels(_read(path), preprocess)
    except OSError as error:
        raise RAdapterError(f"cannot read {path}: {error.strerror}") from None
    except TaskError as error:
        raise RAdapterError(f"{path}: {error.message}") from None
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
