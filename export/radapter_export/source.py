"""What is exported: an adapter, or the average of several, and what goes with it into every release
of one call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radapter_export.settings import CLASSES, ExportSettings
from radapter_serve.adapter import Adapter, average_adapters, load_adapter
from radapter_serve.clip.prompts import templates_of
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.labels import check_labels, read_label_file, split_label
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.contract.names import RULE, is_name
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import chosen


@dataclass(frozen=True)
class Source:
    """An adapter and what goes with it.

    Attributes:
        adapter: to be folded, or to stand beside its layers.
        adapters: digest and weight of each that it is the average of.
        alpha: re-scaling in [0, 1] where none is asked for.
        dynamic_alpha: whether α is an input of the encoders.
        way: how patches are embedded; None if they are not.
        templates: prompt templates.
        label_sets: labels, with their synonyms, by the name of their label set.
        exif_orientation: whether images are turned as their EXIF says.
    """

    adapter: Adapter
    adapters: list[dict[str, Any]]
    alpha: float
    dynamic_alpha: bool
    way: str | None
    templates: list[str]
    label_sets: dict[str, list[str]]
    exif_orientation: bool

    @classmethod
    def read(
        cls, paths: Sequence[str | Path], settings: ExportSettings, *, dynamic_alpha: bool
    ) -> Source:
        """Read adapters, templates and label files.

        Raises:
            RAdapterError: one of them can't be read, or the adapters can't be averaged.
        """
        adapters = [load_adapter(path) for path in paths]
        weights = list(settings.weights) or [1 / len(adapters)] * len(adapters)
        adapter = average_adapters(adapters, weights)
        meta = adapter.metadata
        alpha = meta.alpha
        if dynamic_alpha and len(paths) == 1:
            with contextlib.suppress(RAdapterError):  # none was chosen, or for another adapter
                alpha = chosen(paths[0]).alpha
        way = settings.dense or meta.source.dense
        return cls(
            adapter,
            [
                {"digest": one.digest, "weight": share}
                for one, share in zip(adapters, weights, strict=True)
            ],
            alpha,
            dynamic_alpha,
            None if way == "none" else way,
            templates_of(meta.templates if settings.templates is None else settings.templates),
            _label_sets(settings.label_sets, meta.classes),
            settings.exif_orientation and meta.source.exif_orientation,
        )

    def crop(self, mean: Sequence[float]) -> MaskCrop:
        """How masks are shown to the image encoder, as in training.

        Args:
            mean: RGB in [0, 1] that the encoder subtracts.
        """
        return self.adapter.metadata.source.mask_crop(mean)


def _label_sets(
    files: Mapping[str, str | Path], classes: Sequence[str] | None
) -> dict[str, list[str]]:
    label_sets = {name: read_label_file(path) for name, path in files.items() if _check_name(name)}
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
            where = files.get(name, f"the run's classes (give others with --label-set {name}=FILE)")
            raise RAdapterError(f"{where}: {error.message}") from error
    return label_sets


def _check_name(name: str) -> bool:
    if not is_name(name):
        raise RAdapterError(f"{name!r} can't be the name of a label set; {RULE}")
    return True
