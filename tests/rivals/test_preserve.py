"""Our regularizers in other methods, and full fine-tuning that can name other classes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from radapter_serve.clip.towers import zero_shot_classifier
from rivals.method import Method, Run, System, learned, with_rate
from rivals.preserve import ImageTowerFineTuning, Preserving, preserving
from rivals.tables import METHODS

FULL = with_rate(ImageTowerFineTuning(), 1e-2)


def moved(method: Method, run: Run, pixels: Tensor) -> float:
    """Mean distance of images from their embeddings by the base, after training."""
    result = learned(method, run)
    with torch.no_grad():
        base = System(run.of({}).base).eval().embed_images(pixels)
        return float((1 - (base * result.system.embed_images(pixels)).sum(dim=1)).mean())


@pytest.mark.parametrize(
    "method",
    [
        FULL,
        pytest.param(with_rate(METHODS["flyp"], 1e-2), marks=pytest.mark.slow),
        pytest.param(with_rate(METHODS["lora"], 1e-1), marks=pytest.mark.slow),
        pytest.param(with_rate(METHODS["clip-svd"], 1e-1), marks=pytest.mark.slow),
    ],
    ids=["full", "flyp", "lora", "clip-svd"],
)
def test_a_method_with_them_stays_closer_to_the_base(
    method: Method, make_run: Callable[..., Run]
) -> None:
    run = make_run(steps=6)
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = moved(method, run, pixels)
    kept = moved(preserving(method), run, pixels)
    assert 0 < kept < 0.9 * plain


def test_with_weights_of_zero_a_method_learns_as_alone(make_run: Callable[..., Run]) -> None:
    run = make_run()
    plain = learned(FULL, run)
    zero = learned(Preserving(FULL.settings, FULL.alpha, FULL, 0.0, 0.0), run)
    assert plain.end.keys() == zero.end.keys()
    for name, value in plain.end.items():
        torch.testing.assert_close(zero.end[name], value)


def test_without_its_head_full_fine_tuning_names_any_class(make_run: Callable[..., Run]) -> None:
    run = make_run()
    result = learned(FULL, run)
    base = run.of({}).base
    texts = zero_shot_classifier(base.model, base.tokenizer, ["a zebra"], ["{}"])
    torch.testing.assert_close(result.system.embed_classes(["a zebra"], ["{}"]), texts)
    weights = result.system.clip()
    assert weights is not None and weights.keys() == base.model.state_dict().keys()
    pixels = torch.randn(2, 3, 32, 32)
    zero_shot = System(base).eval().embed_images(pixels)
    torch.testing.assert_close(result.at(0.0).embed_images(pixels), zero_shot)
    assert not torch.allclose(result.at(1.0).embed_images(pixels), zero_shot, atol=1e-4)
