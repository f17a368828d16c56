"""The α curve: every α from one adapter, without training or loading again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from radapter_serve.adapter import Adapter, attach_adapter
from radapter_serve.base import Base
from radapter_serve.data import Labelled, evaluation_batches
from radapter_serve.evaluation.classification import count_hits, zero_shot_classifier


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
        sets: name to data set; each is decoded once.
        templates: prompt templates; the adapter's own if None.

    Returns:
        A row an α: `alpha`, and the accuracy by the name of the data set.
    """
    prompts = templates or adapter.metadata.templates
    pixels: dict[str, list[tuple[Tensor, Tensor]]] = {
        name: list(evaluation_batches(base, s)) for name, s in sets.items()
    }
    adapters = attach_adapter(base.model, adapter, 1.0)
    rows = []
    try:
        for alpha in alphas:
            adapters.alpha = alpha
            row = {"alpha": alpha}
            classifiers: dict[tuple[str, ...], Tensor] = {}
            for name, data in sets.items():
                classes = tuple(data.classes)
                if classes not in classifiers:
                    classifiers[classes] = zero_shot_classifier(base.model, base.tokenizer, classes, prompts)
                hits, total = count_hits(base.model, classifiers[classes], pixels[name])
                row[name] = 100 * hits / total
            rows.append(row)
    finally:
        adapters.remove()
    return rows
