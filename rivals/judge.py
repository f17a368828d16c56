"""The evaluation of any system: the sets of a suite, its metrics, its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import normalised
from radapter_serve.contract.errors import Alpha
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.evaluation.image_sets import EvaluationSet
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.evaluation.models import Candidate, Change, NoSuchWay, in_torch
from radapter_serve.evaluation.rows import Row
from radapter_serve.evaluation.run import evaluate
from rivals.run import Run
from rivals.system import Learned


def judge(
    learned: Learned, run: Run, sets: Sequence[EvaluationSet], alphas: Sequence[float] = (1.0,)
) -> list[Row]:
    """Evaluate a system at points of its line: a plain CLIP as `radapter-eval` does, any other by
    its own embeddings. No system may have started from the run's base.
    """
    weights = learned.at(1.0).clip()
    if weights is None:
        models = systems_of(learned, run.base, alphas)
    else:
        start = run.base.model.state_dict()
        changes = {key: value.float().cpu() - start[key].float() for key, value in weights.items()}
        changes = {key: change for key, change in changes.items() if change.any()}
        line = Change(type(learned.system).__name__, changes)
        crop = run.recipe.mask_crop(run.base.preprocess["mean"])
        models = in_torch(run.base, [line], alphas, crop=crop)
    return [row for data in sets for row in evaluate(models, data)]


def systems_of(learned: Learned, base: Base, alphas: Sequence[float]) -> list[Candidate]:
    """List a system at points of its line, with the preprocessing of a base."""
    encoder = SystemEncoder(learned, base)
    models: list[Candidate] = []
    for model in in_torch(base, [Change(type(learned.system).__name__, {})], alphas):
        assert model.alpha is not None
        scale = learned.at(model.alpha).factor
        release = dataclasses.replace(
            model.loaded.release, dynamic_alpha=True, logit_scale=scale, logit_bias=None
        )
        loaded = LoadedRelease(release, encoder, encoder)
        models.append(SystemModel(model.source, model.alpha, model.facts, loaded))
    return models


class SystemModel(Candidate):
    """A system at a point of its line, which embeds classes all at once: two may have one name."""

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Floats:
        encoder = self.loaded.encoder
        assert isinstance(encoder, SystemEncoder) and self.alpha is not None
        return encoder.classes(self.alpha, tuple(classes), tuple(templates))

    def way(self, dense: str | None) -> str:
        raise NoSuchWay(
            f"{self.source} is no plain CLIP, so it can't segment; leave it out by --only"
        )


class SystemEncoder:
    """The encoder and the tokenizer of a system, whose α is the point on its line.

    Its tokens are the texts themselves, as the system has the tokenizer.
    """

    def __init__(self, learned: Learned, base: Base) -> None:
        self._learned = learned
        self._preprocess = base.preprocess
        self._classes: dict[tuple[Any, ...], Floats] = {}

    @torch.inference_mode()
    def images(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> Floats:
        assert alpha is not None
        system = self._learned.at(float(alpha[0, 0]))
        return _numpy(system.embed_images(normalised(pixels, self._preprocess, system.device)))

    def patches(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> Floats:
        raise NotImplementedError

    @torch.inference_mode()
    def tokens(self, tokens: NDArray[Any], alpha: Alpha | None = None) -> Floats:
        assert alpha is not None
        return _numpy(self._learned.at(float(alpha[0, 0])).embed_texts(list(tokens)))

    @torch.inference_mode()
    def classes(self, alpha: float, classes: tuple[str, ...], templates: tuple[str, ...]) -> Floats:
        """Embed classes by the system at a point, float32 [C, D]."""
        key = (alpha, classes, templates)
        if key not in self._classes:
            embeds = self._learned.at(alpha).embed_classes(list(classes), templates)
            self._classes[key] = _numpy(embeds)
        return self._classes[key]

    def encode(self, texts: Sequence[str]) -> list[Any]:
        return [[text] for text in texts]

    def batch(self, rows: Sequence[Any]) -> NDArray[Any]:
        return np.array([text for (text,) in rows], object)

    def close(self) -> None:
        pass


def _numpy(values: torch.Tensor) -> Floats:
    return np.asarray(values.float().cpu().numpy())
