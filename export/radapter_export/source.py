"""What is exported: an adapter, the average of several, a checkpoint or a LoRA; and what goes with
it into every release of one call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from radapter_export.change import ALPHA_IS_FOLDED, AdapterChange, Change, LineChange
from radapter_export.label_sets import LabelFile, Shown, read_label_set
from radapter_export.settings import CLASSES, OWN, ExportSettings
from radapter_serve.adapter import Adapter, Metadata, average_adapters, load_adapter
from radapter_serve.adapter.checkpoint import load_checkpoint
from radapter_serve.adapter.file import check_base
from radapter_serve.adapter.line import Tuned
from radapter_serve.adapter.lora import load_lora
from radapter_serve.clip.base import Base, load_base, split_name
from radapter_serve.clip.prompts import templates_of
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.labels import check_labels, split_label
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.contract.names import RULE, is_name
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import chosen


@dataclass(frozen=True)
class Source:
    """What was learned, and what goes with it.

    Attributes:
        metadata: of the adapter; of a checkpoint or a LoRA, with nothing about training.
        adapter: to be folded, or to stand beside its layers; None for a checkpoint or a LoRA.
        adapters: digest and weight of each that it is the average of.
        alpha: re-scaling in [0, 1] where none is asked for: what `auto` chose for this very
            adapter, or else its own.
        dynamic_alpha: whether α is an input of the encoders.
        way: how patches are embedded; None if they are not.
        templates: prompt templates.
        label_sets: labels, with their synonyms, by the name of their label set.
        shown: images that show labels of some label sets, by its name.
        exif_orientation: whether images are turned as their EXIF says.
        curve: of each α what validation data said, where α was chosen; see `Choice`.
    """

    metadata: Metadata
    adapter: Adapter | None
    adapters: list[dict[str, Any]]
    alpha: float
    dynamic_alpha: bool
    way: str | None
    templates: list[str]
    label_sets: dict[str, list[str]]
    exif_orientation: bool
    curve: list[dict[str, float]] = field(default_factory=list)
    shown: dict[str, Shown] = field(default_factory=dict)

    @classmethod
    def read(
        cls, paths: Sequence[str | Path], settings: ExportSettings, *, dynamic_alpha: bool
    ) -> Source:
        """Read adapters, templates and label files.

        Args:
            paths: of the adapters; none where the settings name a checkpoint or a LoRA.
            settings: of the call.
            dynamic_alpha: whether α shall be an input of the encoders.

        Raises:
            RAdapterError: one of them can't be read, the adapters can't be averaged, or there is
                not one thing to export.
        """
        _check_one_thing(paths, settings)
        if not paths:
            if dynamic_alpha:
                raise RAdapterError(ALPHA_IS_FOLDED)
            nothing = Metadata(architecture="unknown", base_digest="unknown", alpha=1.0)
            return cls._with(settings, nothing, None, [], nothing.alpha, dynamic_alpha=False)
        adapters = [load_adapter(path) for path in paths]
        weights = list(settings.weights) or [1 / len(adapters)] * len(adapters)
        adapter = average_adapters(adapters, weights)
        alpha = adapter.metadata.alpha
        curve: list[dict[str, float]] = []
        if len(paths) == 1:
            with contextlib.suppress(RAdapterError):  # none was chosen, or for another adapter
                choice = chosen(paths[0])
                curve = choice.curve
                alpha = choice.alpha
        shares = [
            {"digest": one.digest, "weight": share}
            for one, share in zip(adapters, weights, strict=True)
        ]
        found = cls._with(
            settings, adapter.metadata, adapter, shares, alpha, dynamic_alpha=dynamic_alpha
        )
        return replace(found, curve=curve)

    @classmethod
    def _with(
        cls,
        settings: ExportSettings,
        meta: Metadata,
        adapter: Adapter | None,
        adapters: list[dict[str, Any]],
        alpha: float,
        *,
        dynamic_alpha: bool,
    ) -> Source:
        way = settings.dense or meta.source.dense
        files = {
            name: read_label_set(path, dynamic_alpha=dynamic_alpha)
            for name, path in settings.label_sets.items()
            if _check_name(name)
        }
        return cls(
            metadata=meta,
            adapter=adapter,
            adapters=adapters,
            alpha=alpha,
            dynamic_alpha=dynamic_alpha,
            way=None if way == "none" else way,
            templates=templates_of(
                meta.templates if settings.templates is None else settings.templates
            ),
            label_sets=_label_sets(files, settings.label_sets, meta.classes),
            shown={name: file.shown for name, file in files.items() if file.shown is not None},
            exif_orientation=settings.exif_orientation and meta.source.exif_orientation,
        )

    def load(self, settings: ExportSettings) -> tuple[Base, Change]:
        """Load the base, and what α scales.

        Raises:
            RAdapterError: one of them can't be had, or they do not fit.
        """
        if self.adapter is None:
            tuned = _tuned(settings)
            return tuned.base, LineChange(tuned.line)
        if settings.base is None:
            name = self.metadata.architecture
            tag = settings.pretrained or self.metadata.pretrained
        else:
            name, tag = split_name(settings.base, settings.pretrained)
            tag = tag or self.metadata.pretrained
        base = load_base(name, tag)
        weights = dict(base.model.state_dict())
        check_base(weights, self.adapter)
        return base, AdapterChange(self.adapter, weights)

    def crop(self, mean: Sequence[float]) -> MaskCrop:
        """How masks are shown to the image encoder, as in training.

        Args:
            mean: RGB in [0, 1] that the encoder subtracts.
        """
        return self.metadata.source.mask_crop(mean)


def _check_one_thing(paths: Sequence[str | Path], settings: ExportSettings) -> None:
    named = [
        flag
        for flag, given in (
            ("--adapter", paths),
            ("--checkpoint", settings.checkpoint),
            ("--lora", settings.lora),
        )
        if given
    ]
    if not named:
        raise RAdapterError("nothing to export; give --adapter, --checkpoint or --lora")
    if len(named) > 1:
        raise RAdapterError(f"{' and '.join(named)} don't go together; export one thing a call")
    if settings.weights and not paths:
        raise RAdapterError(f"--weights is for several adapters; leave it out beside {named[0]}")
    if settings.validation == OWN and not paths:
        raise RAdapterError(
            f"--validation own is for runs; beside {named[0]} name some data, such as"
            " --validation imagefolder:val"
        )


def _tuned(settings: ExportSettings) -> Tuned:
    if settings.lora is not None:
        return load_lora(settings.lora, settings.base, settings.pretrained)
    assert settings.checkpoint is not None  # as `_check_one_thing` has seen
    return load_checkpoint(str(settings.checkpoint), settings.base, settings.pretrained)


def _label_sets(
    files: Mapping[str, LabelFile],
    paths: Mapping[str, str | Path],
    classes: Sequence[str] | None,
) -> dict[str, list[str]]:
    label_sets = {name: file.labels for name, file in files.items()}
    if classes and CLASSES not in label_sets:
        first: dict[
            str, str
        ] = {}  # two classes of one name are one label: an image scores both alike
        for line in classes:
            first.setdefault((split_label(line) or [""])[0], line)
        label_sets[CLASSES] = list(first.values())
    for name, labels in label_sets.items():
        try:
            check_labels(labels)
        except TaskError as error:
            where = paths.get(name, f"the run's classes (give others with --label-set {name}=FILE)")
            raise RAdapterError(f"{where}: {error.message}") from error
    return label_sets


def _check_name(name: str) -> bool:
    if not is_name(name):
        raise RAdapterError(f"{name!r} can't be the name of a label set; {RULE}")
    return True
