"""The regularizers of Table 5: dropout and drop path; and the loop that trains with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from radapter_serve.adapter import (
    Adapters,
    attach,
    find_sites,
    load_adapter,
)
from radapter_serve.clip.base import load_base
from radapter_serve.errors import RAdapterError
from radapter_serve.training import Recipe
from rivals.radapter import Variant, train_variant
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


def additions(model: nn.Module, x: Tensor, **fields: Any) -> tuple[Tensor, Tensor]:
    """What an ablated adapter adds to a layer's output in training, and after it."""
    plain = linear_output(adapters := attach(model), x)
    adapters.remove()
    adapters = ablated(model, **fields)
    trained = linear_output(adapters, x) - plain
    adapters.stop_drop()
    return trained, linear_output(adapters, x) - plain


@torch.no_grad()
def test_dropout_leaves_out_values_of_what_an_adapter_adds_and_acts_in_training_only(
    model: nn.Module,
) -> None:
    x = torch.randn(200, 5, adapted_inputs(model))
    trained, added = additions(model, x, dropout=P)
    kept = trained.abs() > 1e-5
    assert kept.float().mean().item() == pytest.approx(1 - P, abs=0.01)
    torch.testing.assert_close(trained, kept * added / (1 - P), rtol=0, atol=1e-4)


@torch.no_grad()
def test_dropping_by_token_leaves_an_adapter_out_at_the_same_positions_of_a_batch(
    model: nn.Module,
) -> None:
    x = torch.randn(5, 400, adapted_inputs(model))
    trained, added = additions(model, x, token_drop=P)
    kept = trained.abs().sum((0, 2)) > 1e-3
    assert kept.float().mean().item() == pytest.approx(1 - P, abs=0.07)
    torch.testing.assert_close(trained, kept[:, None] * added / (1 - P), rtol=0, atol=1e-4)


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


def adapted_inputs(model: nn.Module) -> int:
    """Width of what goes into the feed-forward layer that is adapted."""
    return find_sites(model)[1].layer.in_features


def test_without_a_change_training_is_the_methods_own(recipe: Recipe, tmp_path: Path) -> None:
    data, pairs = labelled(tmp_path / "data", 11, seed=0)
    recipe = dataclasses.replace(recipe, data=data)
    adapter = load_adapter(train_variant(recipe, Variant()))
    assert_same(adapter.tensors, train_by_hand(recipe, pairs))


def test_dropout_needs_the_outputs_of_adapters() -> None:
    for variant in (Variant(dropout=0.1), Variant(token_drop=0.1)):
        with pytest.raises(RAdapterError, match="allowed with it: form activation or auto"):
            variant.check(Recipe(form="weight"))
