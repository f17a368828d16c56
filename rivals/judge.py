"""Any system behind the evaluation of the house: the sets of a suite, its metrics, its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2

from radapter_serve.clip.base import Base
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.embedder import Embedder, NoSuchWay, SegmentImage, SegmentQuery, Variant
from radapter_serve.evaluation.evaluate import evaluate
from radapter_serve.evaluation.evaluation_set import EvaluationSet, Known
from radapter_serve.evaluation.image_sets import ClassificationSet
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.evaluation.results import Row, harmonic_means
from radapter_serve.evaluation.sets import open_set
from radapter_serve.evaluation.suite import Suite
from radapter_serve.inputs.mask_crop import MaskCrop
from radapter_serve.inputs.preprocess import Preprocess, decode
from rivals.system import Learned, System

TEMPLATES = ["a photo of a {}."]  # for sets that bring none


def judge(
    learned: Learned,
    base: Base,
    suite: Suite,
    *,
    split: str = "test",
    alphas: Sequence[float | None] = (None,),
    limit: int | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Row]:
    """Evaluate a system on the sets of one split of a suite.

    Args:
        learned: from `learned`.
        base: a fresh copy of what it started from, for its preprocessing.
        suite: from `load_suite`.
        split: `test` or `validation`.
        alphas: points on the line from the start to the end to evaluate at; None is the end.
        limit: images of a set at most.
        say: called with a line about each set.

    Returns:
        Rows as of `radapter_serve.evaluation.evaluate`, a set after the other.
    """
    embedder = SystemEmbedder(learned, base, alphas)
    rows: list[Row] = []
    for entry in suite.of_split(split):
        if say:
            say(f"{entry.name}: {entry.data}")
        data = open_set(suite, entry, limit=limit)
        rows += evaluate(embedder, data, known=embedder.known(data))
    return rows + harmonic_means(rows, suite.pairs(split))


class SystemEmbedder(Embedder):
    """A system at points of its line, as evaluation asks for models; the arguments are those of `judge`."""

    def __init__(self, learned: Learned, base: Base, alphas: Sequence[float | None]) -> None:
        self._learned, self._transform = learned, image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
        preprocess = Preprocess.from_dict(base.preprocess)
        self.templates, self.size, self.exif_orientation = TEMPLATES, preprocess.size[0], preprocess.exif_orientation
        self.crop = MaskCrop.from_recipe({}, base.preprocess["mean"])
        facts = {"model": base.name, "pretrained": base.pretrained}
        self.variants = [Variant(type(learned.system).__name__, alpha, facts) for alpha in alphas]

    @property
    def system(self) -> System:
        """As it is selected now."""
        return self._learned.system

    def select(self, variant: Variant) -> None:
        self._learned.at(1.0 if variant.alpha is None else variant.alpha)

    def prepare(self, data: bytes) -> Any:
        return self._transform(decode(data))  # type: ignore[arg-type]

    @torch.inference_mode()
    def embed_images(self, items: Sequence[Any]) -> Floats:
        return _numpy(self.system.embed_images(torch.stack(list(items)).to(self.system.device)))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Floats:
        return _numpy(self.system.embed_texts(texts))

    @torch.inference_mode()
    def known(self, data: EvaluationSet) -> dict[tuple[str, float | None], Known]:
        """The set's classes as the system at each point embeds them, in the form that `evaluate` knows them by."""
        known: dict[tuple[str, float | None], Known] = {}
        if isinstance(data, ClassificationSet):
            templates = tuple(data.templates or self.templates)
            for variant in self.variants:
                self.select(variant)
                embeds = _numpy(self.system.embed_classes(data.classes, templates))
                pairs = zip(data.classes, embeds, strict=True)
                known[variant.source, variant.alpha] = {(templates, name): embed for name, embed in pairs}
        return known

    def way(self, dense: str | None) -> str:
        raise NoSuchWay(f"{type(self.system).__name__} is no plain CLIP, so it has no dense embeddings")

    def segmenter(self, query: SegmentQuery, known: dict[Any, Floats]) -> SegmentImage:
        raise RAdapterError(f"{type(self.system).__name__} can't segment")

    def close(self) -> None:
        """Nothing is held."""


def _numpy(values: torch.Tensor) -> Floats:
    return np.asarray(values.float().cpu().numpy())
