"""Random adapters on the text's projection, and what their folds compute with torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from radapter_serve.adapter import Adapter, Metadata, base_digest, fold
from radapter_serve.adapter.tuned import towers_of
from radapter_serve.clip.base import Base
from tests.conftest import export_into

TEXTS = ["a red bicycle", "猫", "two dogs in the snow", "a cat"]
WIDTH = 32


def text_adapter(base: Base, seed: int, rank: int | None = None, alpha: float = 0.5) -> Adapter:
    """An adapter on the text's projection with random values."""
    weights = base.model.state_dict()
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    key = "text_projection"
    tensors = {key: values(WIDTH, WIDTH)}
    if rank is not None:
        tensors = {f"{key}.up": values(WIDTH, rank), f"{key}.down": values(rank, WIDTH)}
    metadata = Metadata(
        architecture=base.name,
        base_digest=base_digest(weights, [key]),
        rank=rank,
        alpha=alpha,
        templates=["a {}", "the {}, twice"],
        recipe={"adapt": "text-projection"},
        classes=["cat, kitty", "dog"],
        text_tower=towers_of(base.model, {})["text_tower"].base,
    )
    return Adapter(tensors, metadata)


@torch.no_grad()
def encoded(base: Base, texts: list[str]) -> np.ndarray:
    """Text embeddings with torch, [N, D]."""
    model: Any = base.model
    return np.asarray(model.encode_text(base.tokenizer(texts), normalize=True))


def folded(base: Base, adapter: Adapter, alpha: float, texts: list[str]) -> np.ndarray:
    """Text embeddings with torch, with the adapter folded into the weights, [N, D]."""
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    base.model.load_state_dict(fold(weights, adapter, alpha))
    try:
        return encoded(base, texts)
    finally:
        base.model.load_state_dict(weights)


def export_base(folder: Path, common: Path, run: Path) -> Path:
    """A release of the base of a run, α 0, with a label set `animals`; returns its repository."""
    labels = folder / "animals.txt"
    labels.write_text("cow\nhorse, pony\nsheep\n")
    export_into(folder, common, run, [0.0], label_sets={"animals": labels})
    return folder / "model_repository"
