"""What is exported: an adapter, an average of several, a checkpoint or a LoRA; and what goes
into every release of one call with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radapter_export.label_sets import LabelFile, read_label_set
from radapter_export.settings import CLASSES, OWN, ExportSettings
from radapter_serve.adapter import (
    Adapter,
    Metadata,
    attach_adapter,
    average_adapters,
    fold,
    load_adapter,
)
from radapter_serve.adapter.file import check_base
from radapter_serve.adapter.tuned import Line, load_checkpoint, load_lora
from radapter_serve.clip.base import Base, load_base, split_name
from radapter_serve.clip.towers import templates_of
from radapter_serve.contract.errors import TaskError, check_alpha
from radapter_serve.contract.labels import RULE, check_names, is_name, split_label
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import chosen


@dataclass(frozen=True)
class Source:
    """What was learned, and what goes with it into the releases of one call."""

    metadata: Metadata  # of a checkpoint or a LoRA without anything about training
    adapter: Adapter | None  # to be folded; None for a checkpoint or a LoRA
    adapters: list[dict[str, Any]]  # digest and weight of each adapter in the average
    alpha: float  # by default
    curve: list[dict[str, float]]  # the figures of the choice of `auto`, an α each
    dynamic_alpha: bool
    dense: str | None  # method of patch embeddings; None without patch_encoder
    templates: list[str]
    label_sets: dict[str, LabelFile]
    exif_orientation: bool

    def load(self, settings: ExportSettings) -> tuple[Base, Fold | Line]:
        """Load the base, and what α scales; refuses those that do not fit."""
        if settings.lora is not None:
            tuned = load_lora(settings.lora, settings.base, settings.pretrained)
            return tuned.base, tuned.line
        if settings.checkpoint is not None:
            tuned = load_checkpoint(str(settings.checkpoint), settings.base, settings.pretrained)
            return tuned.base, tuned.line
        assert self.adapter is not None
        name = self.metadata.architecture
        tag = settings.pretrained
        if settings.base is not None:
            name, tag = split_name(settings.base, settings.pretrained)
        base = load_base(name, tag or self.metadata.pretrained)
        weights = dict(base.model.state_dict())
        check_base(weights, self.adapter)
        return base, Fold(self.adapter, weights)


def read_source(
    paths: Sequence[str | Path], settings: ExportSettings, *, dynamic_alpha: bool
) -> Source:
    """Read adapters, templates and label files; refuses more or less than one thing to export."""
    # One thing to export.
    flags = {"--adapter": paths, "--checkpoint": settings.checkpoint, "--lora": settings.lora}
    named = [flag for flag, value in flags.items() if value]
    if not named:
        raise RAdapterError("nothing to export; give --adapter, --checkpoint or --lora")
    if len(named) > 1:
        raise RAdapterError(f"{' and '.join(named)} don't go together; export one thing a call")
    if not paths and settings.weights:
        raise RAdapterError(f"--weights is for several adapters; leave it out with {named[0]}")
    if not paths and settings.validation == OWN:
        raise RAdapterError(
            f"--validation own is for runs; with {named[0]} name some data, such as --validation"
            " imagefolder:val"
        )
    if not paths and dynamic_alpha:
        raise RAdapterError(
            "--alpha dynamic is for adapters: a checkpoint or a LoRA has other weights at each"
            " alpha, so give numbers, such as --alpha 0.5 1, each a release"
        )

    # The adapter or the average, and its α.
    adapter = None
    metadata = Metadata(architecture="unknown", base_digest="unknown", alpha=1.0)
    shares: list[dict[str, Any]] = []
    curve: list[dict[str, float]] = []
    if paths:
        adapters = [load_adapter(path) for path in paths]
        weights = list(settings.weights) or [1 / len(adapters)] * len(adapters)
        adapter = average_adapters(adapters, weights)
        metadata = adapter.metadata
        shares = [
            {"digest": each.digest, "weight": weight}
            for each, weight in zip(adapters, weights, strict=True)
        ]
    alpha = metadata.alpha
    if len(paths) == 1:
        with contextlib.suppress(RAdapterError):  # no choice, or one for another adapter
            choice = chosen(paths[0])
            alpha = choice.alpha
            curve = choice.curve

    dense = settings.dense or metadata.source.dense
    templates = metadata.templates if settings.templates is None else settings.templates
    return Source(
        metadata=metadata,
        adapter=adapter,
        adapters=shares,
        alpha=alpha,
        curve=curve,
        dynamic_alpha=dynamic_alpha,
        dense=None if dense == "none" else dense,
        templates=templates_of(templates),
        label_sets=_label_sets(settings.label_sets, metadata.classes, dynamic_alpha=dynamic_alpha),
        exif_orientation=settings.exif_orientation and metadata.source.exif_orientation,
    )


def _label_sets(
    paths: Mapping[str, str | Path], classes: Sequence[str] | None, *, dynamic_alpha: bool
) -> dict[str, LabelFile]:
    """The label sets of files, and of the run's classes where no file has their name."""
    label_sets = {}
    for name, path in paths.items():
        if not is_name(name):
            raise RAdapterError(f"{name!r} can't be the name of a label set; {RULE}")
        label_sets[name] = read_label_set(path, dynamic_alpha=dynamic_alpha)
    if classes and CLASSES not in label_sets:
        # Two classes of one name are one label, as an image scores both alike.
        lines: dict[str, str] = {}
        for line in classes:
            lines.setdefault((split_label(line) or [""])[0], line)
        label_sets[CLASSES] = LabelFile(list(lines.values()))
    for name, file in label_sets.items():
        try:
            check_names(file.labels)
        except TaskError as error:
            where = paths.get(name, f"the run's classes (give others with --label-set {name}=FILE)")
            raise RAdapterError(f"{where}: {error.message}") from error
    return label_sets


@dataclass(frozen=True)
class Fold:
    """An adapter on the weights of its base, with the interface of `Line`."""

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

    def check(self, alpha: float) -> None:
        """Refuse an α outside of [0, 1]."""
        check_alpha(alpha)

    def at(self, alpha: float) -> dict[str, Tensor]:
        """The folded weights."""
        return fold(self.weights, self.adapter, alpha)


def put_reference(base: Base, change: Fold | Line) -> Callable[[float], None]:
    """Put the change into the base's model without a fold; returns the setter of its α."""
    if isinstance(change, Fold):
        adapters = attach_adapter(base.model, change.adapter, change.adapter.metadata.alpha)
        return partial(setattr, adapters, "alpha")
    start = change.tuned if change.base is None else change.base

    @torch.no_grad()
    def set_alpha(alpha: float) -> None:
        # By torch's own interpolation, where the line multiplies and adds.
        for name, tensor in base.model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.lerp(start[name], change.tuned[name], alpha))

    return set_alpha
