"""The α curve: every α from one adapter, without training or loading again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from radapter_serve.adapter import Adapter
from radapter_serve.base import Base
from radapter_serve.data import Labelled
from radapter_serve.evaluation.judge import judge
from radapter_serve.evaluation.results import curve
from radapter_serve.evaluation.sets import classification_set
from radapter_serve.evaluation.suite import Entry
from radapter_serve.evaluation.torch_embedder import embedder_of


def alpha_sweep(
    base: Base,
    adapter: Adapter,
    alphas: Sequence[float],
    sets: Mapping[str, Labelled],
    templates: Sequence[str] | None = None,
) -> list[dict[str, float]]:
    """Zero-shot accuracy in per cent for every α on every data set.

    Args:
        base: what the adapter was trained on.
        adapter: from `load_adapter`.
        alphas: re-scalings in [0, 1].
        sets: name to data set; each image is decoded once.
        templates: prompt templates; the adapter's own if None.

    Returns:
        A row an α, ascending: `alpha`, and the accuracy by the name of the data set.
    """
    embedder = embedder_of(base, adapter, alphas)
    prompts = None if templates is None else list(templates)
    try:
        opened = [classification_set(Entry(name, name), data, prompts) for name, data in sets.items()]
        return curve([row for data in opened for row in judge(embedder, data)])
    finally:
        embedder.close()
