"""The evaluation of any system: the sets of a suite, its metrics, its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2

from radapter_serve.clip.base import Base
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.contract.preprocess import Preprocess, decode
from radapter_serve.contract.probabilities import class_probabilities
from radapter_serve.evaluation.embedder import (
    Embedder,
    NoSuchWay,
    SegmentImage,
    SegmentQuery,
    Variant,
)
from radapter_serve.evaluation.evaluate import evaluate
from radapter_serve.evaluation.evaluation_set import EvaluationSet, Known
from radapter_serve.evaluation.image_sets import ClassificationSet
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.evaluation.row import ModelFacts, Row
from radapter_serve.evaluation.torch_embedder import Interpolation, TorchEmbedder
from rivals.run import Run
from rivals.system import Learned, System

TEMPLATES = ["a photo of a {}."]  # for sets that bring none


def judge(
    learned: Learned, run: Run, sets: Sequence[EvaluationSet], alphas: Sequence[float] = (1.0,)
) -> list[Row]:
    """Evaluate a system: a plain CLIP as `radapter-eval` does, any other by the embeddings that it
    gives itself.

    Args:
        learned: from `rivals.method.learned`.
        run: of its method, whose base nothing has started from.
        sets: from `radapter_serve.evaluation.sets.open_set`.
        alphas: points on the line from the start, 0, to the end, 1.

    Returns:
        Rows as of `radapter_serve.evaluation.evaluate`, a set after the other, for each α.
    """
    embedder = embedder_of(learned, run, alphas)
    if embedder is None:
        own = SystemEmbedder(learned, run.base, alphas)
        return [row for data in sets for row in evaluate(own, data, known=own.known(data))]
    return [row for data in sets for row in evaluate(embedder, data)]


def embedder_of(learned: Learned, run: Run, alphas: Sequence[float]) -> TorchEmbedder | None:
    """Points on the line of a system that is a plain CLIP, as `radapter-eval` embeds by it; None
    where it is none.

    Args:
        learned, run, alphas: as of `judge`.
    """
    base = run.base
    weights = learned.at(1.0).clip()
    if weights is None:
        return None
    start = base.model.state_dict()
    changes = {key: value.float().cpu() - start[key].float() for key, value in weights.items()}
    line = Interpolation(
        type(learned.system).__name__,
        {key: change for key, change in changes.items() if change.any()},
    )
    crop = run.recipe.mask_crop(base.preprocess["mean"])
    return TorchEmbedder(base, [line], alphas, TEMPLATES, crop=crop)


class SystemEmbedder(Embedder):
    """A system at points of its line, as evaluation asks for models.

    Args:
        learned, alphas: as of `judge`.
        base: whose preprocessing is used.
    """

    def __init__(self, learned: Learned, base: Base, alphas: Sequence[float]) -> None:
        self._learned = learned
        self._transform = image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
        preprocess = Preprocess.from_dict(base.preprocess)
        self.templates = TEMPLATES
        self.size = preprocess.size[0]
        self.exif_orientation = preprocess.exif_orientation
        self.crop = MaskCrop.filled_with(base.preprocess["mean"])
        facts = ModelFacts(model=base.name, pretrained=base.pretrained, precision="fp32")
        self.variants = [Variant(type(learned.system).__name__, alpha, facts) for alpha in alphas]

    @property
    def system(self) -> System:
        """As it is selected now."""
        return self._learned.system

    def select(self, variant: Variant) -> None:
        assert variant.alpha is not None
        self._learned.at(variant.alpha)

    def prepare(self, data: bytes) -> Any:
        return self._transform(decode(data))  # type: ignore[arg-type]

    @torch.inference_mode()
    def embed_images(self, items: Sequence[Any]) -> Floats:
        return _numpy(self.system.embed_images(torch.stack(list(items)).to(self.system.device)))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Floats:
        return _numpy(self.system.embed_texts(texts))

    @torch.inference_mode()
    def known(self, data: EvaluationSet) -> dict[Any, Known]:
        """The set's classes as the system at each point embeds them, all at once: two of one name
        may differ.
        """
        known: dict[Any, Known] = {}
        if isinstance(data, ClassificationSet):
            templates = tuple(data.templates or self.templates)
            for variant in self.variants:
                self.select(variant)
                embeds = _numpy(self.system.embed_classes(data.prompted, templates))
                known[variant.key] = {(templates, tuple(data.prompted)): embeds}
        return known

    def probabilities(self, scores: Floats) -> Floats:
        """Scores [N, C] to probabilities, float32 [N, C]."""
        return class_probabilities(scores, self.system.factor)

    def way(self, dense: str | None) -> str:
        raise NoSuchWay(
            f"{type(self.system).__name__} is no plain CLIP, so it can't segment; leave it out by"
            " --only"
        )

    def segmenter(self, query: SegmentQuery, known: dict[Any, Floats]) -> SegmentImage:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held."""


def _numpy(values: torch.Tensor) -> Floats:
    return np.asarray(values.float().cpu().numpy())
