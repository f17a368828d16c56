"""Other trainings of R-Adapter: dropout, drop path, a learned scale that folds, other averages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from radapter_serve.adapter import (
    Adapters,
    Metadata,
    attach,
    base_digest,
    find_sites,
    fold,
    load_adapter,
)
from radapter_serve.clip.base import load_base
from radapter_serve.clip.towers import encode_image
from radapter_serve.errors import RAdapterError
from radapter_serve.training import Recipe
from rivals.loop import train
from rivals.variants import Variant
from tests.helpers.by_hand import assert_same, train_by_hand
from tests.training.test_wiring import labelled
from tests.training.test_wiring import recipe as recipe

P = 0.25


@pytest.fixture
def model(tiny_clip_dir: str) -> nn.Module:
    return load_base(tiny_clip_dir).model


def ablated(
    model: nn.Module, rank: int | None = None, form: Any = "activation", **fields: Any
) -> Adapters:
    """Adapters of random values, in training."""
    adapters = Variant(**fields).attach(model, rank, form=form)
    torch.manual_seed(0)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    adapters.sample_drop()
    return adapters


def linear_output(adapters: Adapters, x: Tensor) -> Tensor:
    """What the feed-forward layer of the first block says, with its adapter."""
    found: Tensor = adapters.sites[1].output(x)
    return found


@torch.no_grad()
def test_dropout_leaves_out_values_of_what_an_adapter_adds_and_acts_in_training_only(
    model: nn.Module,
) -> None:
    x = torch.randn(200, 5, adapted_inputs(model))
    plain = linear_output(adapters := attach(model), x)
    adapters.remove()
    adapters = ablated(model, dropout=P)
    trained = linear_output(adapters, x) - plain
    adapters.stop_drop()
    added = linear_output(adapters, x) - plain
    kept = trained.abs() > 1e-5
    assert kept.float().mean().item() == pytest.approx(1 - P, abs=0.01)
    torch.testing.assert_close(trained, kept * added / (1 - P), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", ["activation", "weight"])
def test_drop_path_leaves_out_whole_branches_of_single_images(model: nn.Module, form: str) -> None:
    x = torch.randn(2000, 3, adapted_inputs(model))
    adapters = ablated(model, form=form, drop_path=P)
    trained = linear_output(adapters, x)
    adapters.stop_drop()
    whole = linear_output(adapters, x)
    kept = trained.abs().sum((1, 2)) > 0
    assert kept.float().mean().item() == pytest.approx(1 - P, abs=0.03)  # three deviations
    torch.testing.assert_close(trained[kept], whole[kept] / (1 - P))
    attention = adapters.sites[0].output
    y = x[:50, :, : adapters.sites[0].layer.in_features]
    adapters.sample_drop()
    left_out = attention(y, y, y, need_weights=False)[0].abs().sum((1, 2)) == 0
    assert 0 < left_out.sum() < 50
    adapters.remove()
    again = adapters.sites[1].output(x)
    assert (
        again.shape == whole.shape and (again.abs().sum((1, 2)) > 0).all()
    )  # nothing is left behind


@torch.no_grad()
@pytest.mark.parametrize("form", ["activation", "weight"])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_learned_scale_starts_at_a_tenth_and_folds(
    model: nn.Module, rank: int | None, form: str
) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = Variant(learned_scale=True).attach(model, rank)
    scales = {
        name: value for name, value in fresh.named_tensors().items() if name.endswith(".scale")
    }
    assert [value.item() for value in scales.values()] == pytest.approx([0.1] * len(fresh.sites))
    assert all(value.requires_grad for value in scales.values())
    fresh.remove()
    adapters = ablated(model, rank, form, learned_scale=True)
    pixels = torch.randn(2, 3, 32, 32)
    expected = encode_image(model, pixels)
    digest = base_digest(state, [site.key for site in adapters.sites])
    adapter = adapters.adapter(Metadata(architecture="tiny", base_digest=digest, rank=rank))
    adapters.remove()
    model.load_state_dict(
        fold(state, adapter, 1.0)
    )  # which refuses tensors that no adapter file has
    torch.testing.assert_close(encode_image(model, pixels), expected, rtol=0, atol=1e-5)


def adapted_inputs(model: nn.Module) -> int:
    """Width of what goes into the feed-forward layer that is adapted."""
    return find_sites(model)[1].layer.in_features


@pytest.mark.parametrize(
    "variant", [Variant(learned_scale=True), Variant(average="trajectory", falling=True)]
)
def test_training_is_that_by_hand(recipe: Recipe, tmp_path: Path, variant: Variant) -> None:
    data, pairs = labelled(tmp_path / "data", 11, seed=0)
    recipe = dataclasses.replace(recipe, data=data)
    found = load_adapter(train(recipe, variant)).tensors
    assert_same(found, train_by_hand(recipe, pairs, variant=variant))


def test_what_does_not_go_together() -> None:
    for variant, fields, message in (
        (Variant(dropout=0.1), {"form": "weight"}, "allowed with it: form activation or auto"),
        (Variant(average="trajectory"), {"rank": 4}, "average is trajectory at rank 4"),
    ):
        with pytest.raises(RAdapterError, match=message):
            variant.check(Recipe(**fields))
