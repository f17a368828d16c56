"""What a task brings to training: its data, and how the adapters are judged on the way."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from radapter_serve.adapter import Adapters
from radapter_serve.base import Base
from radapter_serve.data import Labelled, LabelledImages, evaluation_batches, load_labelled
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.classification import count_hits, zero_shot_classifier
from radapter_serve.prompts import templates_of
from radapter_serve.training.recipe import Recipe


def open_data(recipe: Recipe, spec: str, *, streaming: bool = False) -> Labelled:
    """Open data for training or validation, as the recipe's task reads it.

    Args:
        recipe: names task, columns and classes.
        spec: `recipe.data` or `recipe.val_data`.
        streaming: read row by row.

    Raises:
        RAdapterError: it can't be read, or is no data for this task.
    """
    if recipe.task != "classification":
        raise RAdapterError(f"task {recipe.task} can't be trained yet; allowed: classification")
    return load_labelled(
        spec,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        classes=recipe.classes,
        templates=templates_of(recipe.templates),
        streaming=streaming,
    )


def validate(
    base: Base, adapters: Adapters, val: LabelledImages, recipe: Recipe, accelerator: Accelerator
) -> dict[str, float]:
    """Zero-shot accuracy in per cent at the recipe's α and at 1, over all processes, in one pass over the images."""
    alphas = sorted({recipe.alpha, 1.0})
    classifiers, hits, total = [], [0] * len(alphas), 0
    for alpha in alphas:
        adapters.alpha = alpha
        classifiers.append(zero_shot_classifier(base.model, base.tokenizer, val.classes, val.templates))
    broken: list[str] | None = [] if recipe.on_broken == "skip" else None
    rank, world = accelerator.process_index, accelerator.num_processes
    for batch in evaluation_batches(base, val, rank=rank, world=world, broken=broken):
        total += len(batch[1])
        for index, alpha in enumerate(alphas):
            adapters.alpha = alpha
            hits[index] += count_hits(base.model, classifiers[index], [batch])[0]
    adapters.alpha = 1.0
    *hits, total = accelerator.reduce(torch.tensor([*hits, total], device=accelerator.device)).tolist()
    return {f"acc1@alpha={a:g}": round(100 * n / max(total, 1), 2) for a, n in zip(alphas, hits, strict=True)}
