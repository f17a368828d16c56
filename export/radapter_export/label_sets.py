"""Label sets of an export: their files, with images that show some of the labels."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import MAX_BYTES, list_images, verify
from radapter_serve.contract.labels import join_label, read_label_file, split_label
from radapter_serve.contract.preprocess import Preprocess, decode_pixels
from radapter_serve.encoders.labels import DEFAULT_WEIGHT, MAX_EXAMPLES, Examples
from radapter_serve.errors import RAdapterError
from radapter_serve.files import read_yaml

MAX_SHOWN = 2000  # examples of a label set
_FORM = (
    "each entry is a label, or has label, images and weight; labels such as no and 2024 need quotes"
)

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


class _Entry(BaseModel, extra="forbid", strict=True):
    """An entry of a YAML file."""

    label: str
    images: str | list[str] = []
    # The share of the images beside the text: 0 is the text alone, 1 the images alone.
    weight: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = DEFAULT_WEIGHT


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
    for number, value in enumerate(document):
        where = f"{path}, entry {number + 1}"
        try:
            entry = _Entry.model_validate(value if isinstance(value, dict) else {"label": value})
        except ValidationError as error:
            first = error.errors()[0]
            raise RAdapterError(
                f"{where}: {first['loc'][0]!r:.80} is {first['input']!r:.80}: {first['msg']};"
                f" {_FORM}"
            ) from None
        if not (names := split_label(entry.label)):
            raise RAdapterError(f"{where}: {entry.label!r} names no class")
        files = []
        for name in [entry.images] if isinstance(entry.images, str) else entry.images:
            file = path.parent / name
            inside = (
                [Path(image) for image in list_images(file).images] if file.is_dir() else [file]
            )
            if not inside:
                raise RAdapterError(f"{where}: {file} holds no image")
            files += inside
        if "weight" in entry.model_fields_set and not files:
            raise RAdapterError(f"{where}: weight is for images, and there are none")
        labels.append(join_label(names))
        weights.append(entry.weight)
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


def _read_image(path: Path, where: str, use: Callable[[bytes], T]) -> T:
    """Use the bytes of an image; of a larger file than any image may be, only the first."""
    try:
        with path.open("rb") as file:
            return use(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise RAdapterError(f"{where}: cannot be read: {error.strerror}") from None
    except TaskError as error:
        raise RAdapterError(f"{where}: {error.message}") from None
