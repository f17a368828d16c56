"""Reads the source of an export: an adapter, an average of several, a checkpoint or a LoRA; with
the templates and label sets, some with images, for every release of one call.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
from PIL import Image
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from radapter_export.settings import AUTO, BEST, OWN, ExportSettings
from radapter_serve.adapter import (
    Adapter,
    Metadata,
    attach_adapter,
    average_adapters,
    fold,
    load_adapter,
)
from radapter_serve.adapter.file import check_base
from radapter_serve.adapter.tuned import Line, load_base_of, load_checkpoint, load_lora
from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import templates_of
from radapter_serve.contract.errors import TaskError, check_alpha
from radapter_serve.contract.images import MAX_BYTES, list_images, verify, without_heic
from radapter_serve.contract.labels import (
    RULE,
    check_names,
    is_name,
    join_label,
    merge_same_names,
    read_label_file,
    split_label,
)
from radapter_serve.contract.preprocess import Preprocess, decode_pixels
from radapter_serve.encoders.labels import MAX_EXAMPLES, Examples
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import Choice, CurvePoint, read_choice
from radapter_serve.files import read_yaml
from radapter_serve.release.release import Share
from radapter_serve.sources import CLASSES

MAX_SHOWN = 2000  # example images of a label set
_WEIGHT = 0.5  # of a label's images, where only other labels of its file have a weight
_FORM = (
    "each entry is a label, or has label, images and weight; labels such as no and 2024 need quotes"
)

T = TypeVar("T")


@dataclass(frozen=True)
class LabelFile:
    """The labels of a file, and images that show some of them."""

    labels: list[str]  # with their synonyms
    images: tuple[Path, ...] = ()
    places: tuple[int, ...] = ()  # index of each image's label
    # Of each label's images against its text, in [0, 1]; None has them chosen with the images.
    weights: tuple[float, ...] | None = None

    def examples(self, preprocess: Preprocess) -> Examples:
        """Decode the images for the encoder: as small PNGs, without the files' metadata."""
        shown = []
        for path in self.images:
            pixels = read_image(path, f"{path}", lambda data: decode_pixels(data, preprocess))
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG", compress_level=1)
            shown.append(file.getvalue())
        return Examples(tuple(shown), self.places, self.weights)


class _Entry(BaseModel, extra="forbid", strict=True):
    """An entry of a YAML file."""

    label: str
    images: str | list[str] = []
    # Weight of the images against the text: 0 takes the text alone, 1 the images alone.
    weight: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None


def read_label_set(path: str | Path, *, dynamic_alpha: bool) -> LabelFile:
    """Read a label file, with fewer images if servers embed them again for each α."""
    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        return LabelFile(read_label_file(path))
    document = read_yaml(path, "the label set")
    if not isinstance(document, list) or not document:
        raise RAdapterError(f"{path} is not a list of labels; {_FORM}")
    labels: list[str] = []
    weights: list[float | None] = []
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
        if entry.weight is not None and not files:
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
        read_image(file, f"{path}: {file}", verify)
    fixed = None
    if any(weight is not None for weight in weights):
        fixed = tuple(_WEIGHT if weight is None else weight for weight in weights)
    return LabelFile(labels, tuple(images), tuple(places), fixed)


def read_image(path: Path, where: str, use: Callable[[bytes], T]) -> T:
    """Apply `use` to the bytes of an image, of a HEIC as JPEG; a file above `MAX_BYTES` is cut off
    one byte later.
    """
    try:
        with path.open("rb") as file:
            return use(without_heic(file.read(MAX_BYTES + 1)))
    except OSError as error:
        raise RAdapterError(f"{where}: cannot be read: {error.strerror}") from None
    except TaskError as error:
        raise RAdapterError(f"{where}: {error.message}") from None


@dataclass(frozen=True)
class Source:
    """The source of the releases of one call, with their templates and label sets."""

    metadata: Metadata  # without facts about training for a checkpoint or a LoRA
    adapter: Adapter | None  # None for a checkpoint or a LoRA
    adapters: list[Share]  # in the average
    alphas: list[float]  # one for each release
    choice: Choice | None  # of `auto`, if it was made for this adapter
    no_choice: str  # why there is none
    dynamic_alpha: bool
    dense: str | None  # method of patch embeddings; None without patch_encoder
    templates: list[str]
    label_sets: dict[str, LabelFile]

    @property
    def curve(self) -> Sequence[CurvePoint]:
        """The figures at each α, if `auto` chose one."""
        return self.choice.curve if self.choice else ()

    def load(self, settings: ExportSettings) -> tuple[Base, Fold | Line]:
        """Load the base and the change that α scales; raises an error if they do not fit."""
        if self.adapter is None:
            if settings.lora is not None:
                base, line = load_lora(settings.lora, settings.base)
            else:
                base, line = load_checkpoint(str(settings.checkpoint), settings.base)
            for alpha in self.alphas:
                line.check(alpha)
            return base, line
        base = load_base_of(self.adapter, settings.base)
        weights = dict(base.model.state_dict())
        check_base(weights, self.adapter)
        return base, Fold(self.adapter, weights)


def read_source(
    paths: Sequence[str | Path],
    alphas: Sequence[float | str] | Literal["dynamic"] | None,
    settings: ExportSettings,
) -> Source:
    """Read the one thing to export, templates and label files, and choose the α; `alphas` may have
    the names `auto` and `best`.
    """
    dynamic_alpha = alphas == "dynamic"
    _check_one_source(paths, settings, dynamic_alpha=dynamic_alpha)

    # Read the adapter, or average several.
    adapter = None
    metadata = Metadata(architecture="unknown", base_digest="unknown", alpha=1.0)
    shares: list[Share] = []
    if paths:
        adapters = [load_adapter(path) for path in paths]
        weights = list(settings.weights) or [1 / len(adapters)] * len(adapters)
        adapter = average_adapters(adapters, weights)
        metadata = adapter.metadata
        pairs = zip(adapters, weights, strict=True)
        shares = [Share(each.digest, weight) for each, weight in pairs]

    # Choose the α: by default the one that `auto` chose on validation data, else the adapter's own.
    values = [] if alphas is None or isinstance(alphas, str) else list(alphas)
    choice = None
    no_choice = ""
    if adapter is not None and len(paths) == 1:
        try:
            choice = read_choice(paths[0], adapter.digest)
        except RAdapterError as error:  # no choice, or one for another adapter
            if AUTO in values or BEST in values:
                raise
            no_choice = str(error)
    if alphas is None or isinstance(alphas, str):
        values = [AUTO if choice else metadata.alpha]

    dense = settings.dense or metadata.source.dense
    templates = metadata.templates if settings.templates is None else settings.templates
    return Source(
        metadata=metadata,
        adapter=adapter,
        adapters=shares,
        alphas=_numbers(values, choice),
        choice=choice,
        no_choice=no_choice,
        dynamic_alpha=dynamic_alpha,
        dense=None if dense == "none" else dense,
        templates=templates_of(templates),
        label_sets=_label_sets(settings.label_sets, metadata.classes, dynamic_alpha=dynamic_alpha),
    )


def _check_one_source(
    paths: Sequence[str | Path], settings: ExportSettings, *, dynamic_alpha: bool
) -> None:
    """Check that there is one thing to export, and that the settings are for such."""
    flags = {"--adapter": paths, "--checkpoint": settings.checkpoint, "--lora": settings.lora}
    named = [flag for flag, value in flags.items() if value]
    if len(named) != 1:
        raise RAdapterError(
            f"{' and '.join(named)} don't go together; export one thing a call"
            if named
            else "nothing to export; give --adapter, --checkpoint or --lora"
        )
    if not paths:
        for flag, is_given in (
            ("--weights", bool(settings.weights)),
            ("--validation own", settings.validation == OWN),
            ("--alpha dynamic", dynamic_alpha),
        ):
            if is_given:
                raise RAdapterError(f"{flag} is for adapters; leave it out with {named[0]}")
    if dynamic_alpha and settings.calibration is not None:
        raise RAdapterError(
            "--calibration finds ranges at one alpha, and --alpha dynamic has all; leave one of"
            " them out"
        )


def _numbers(values: Sequence[float | str], choice: Choice | None) -> list[float]:
    """Replace names of α by the choice's numbers, and check that all differ and are allowed."""
    by_name = {AUTO: choice.alpha, BEST: choice.best} if choice else {}
    numbers = [by_name[value] if isinstance(value, str) else value for value in values]
    for alpha in numbers:
        check_alpha(alpha)
    shown = [f"{alpha:g}" for alpha in numbers]
    if not numbers or len(set(shown)) < len(shown):
        raise RAdapterError(
            f"alpha is {' '.join(shown) or 'empty'}; give one number from 0 to 1, or several that"
            " differ"
        )
    return numbers


def _label_sets(
    paths: Mapping[str, str | Path], classes: Sequence[str] | None, *, dynamic_alpha: bool
) -> dict[str, LabelFile]:
    """Read label sets from files, and from the run's classes if no file has their name."""
    label_sets = {}
    for name, path in paths.items():
        if not is_name(name):
            raise RAdapterError(f"{name!r} can't be the name of a label set; {RULE}")
        label_sets[name] = read_label_set(path, dynamic_alpha=dynamic_alpha)
    if classes and CLASSES not in label_sets:
        label_sets[CLASSES] = LabelFile(merge_same_names(classes))
    for name, file in label_sets.items():
        try:
            check_names(file.labels, distinct=name in paths)
        except TaskError as error:
            where = paths.get(name, f"the run's classes (give others with --label-set {name}=FILE)")
            raise RAdapterError(f"{where}: {error.message}") from error
    return label_sets


@dataclass(frozen=True)
class Fold:
    """An adapter for the weights of its base, with the interface of `Line`."""

    adapter: Adapter
    weights: Mapping[str, Tensor]
    made_of: None = None

    @property
    def digest(self) -> str:
        """Digest of the adapter."""
        return self.adapter.digest

    @property
    def base_digest(self) -> str:
        """Digest of the base's adapted tensors."""
        return self.adapter.metadata.base_digest

    @property
    def changes(self) -> Mapping[str, Tensor]:
        """The adapter's tensors."""
        return self.adapter.tensors

    def at(self, alpha: float) -> dict[str, Tensor]:
        """The folded weights at an α."""
        return fold(self.weights, self.adapter, alpha)


def put_reference(base: Base, change: Fold | Line) -> Callable[[float], None]:
    """Put the change into the base's model without a fold; returns a function that sets its α."""
    if isinstance(change, Fold):
        adapters = attach_adapter(base.model, change.adapter, change.adapter.metadata.alpha)
        return partial(setattr, adapters, "alpha")
    start = change.tuned if change.base is None else change.base

    @torch.no_grad()
    def set_alpha(alpha: float) -> None:
        # torch.lerp, to check against code other than `Line`'s.
        for name, tensor in base.model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.lerp(start[name], change.tuned[name], alpha))

    return set_alpha
