"""The regularizers of Table 5: dropout, drop path, and dropping per token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from radapter_serve.adapter import Adapters, attach, find_sites
from radapter_serve.clip.base import load_base
from rivals.method import Run
from rivals.radapter import RAdapter, Variant

P = 0.25


@pytest.fixture
def model(tiny_clip_dir: str) -> nn.Module:
    return load_base(tiny_clip_dir).model


def ablated(model: nn.Module, form: Any = "activation", **fields: float) -> Adapters:
    """Adapters of random values, in training."""
    adapters = Variant(**fields).attach(model, None, form=form)
    torch.manual_seed(0)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    adapters.sample_drop()
    return adapters


@torch.no_grad()
@pytest.mark.parametrize(
    ("field", "shape", "dims"), [("dropout", (200, 5), ()), ("token_drop", (5, 400), (0, 2))]
)
def test_outputs_of_an_adapter_are_dropped_in_training_only(
    field: str, shape: tuple[int, int], dims: tuple[int, ...], model: nn.Module
) -> None:
    """A number each, or a token position of the whole batch."""
    x = torch.randn(*shape, find_sites(model)[1].weight.shape[1])

    def output(adapters: Adapters) -> Tensor:
        output: Tensor = adapters.sites[1].output(x)
        return output

    plain = output(adapters := attach(model))
    adapters.remove()
    adapters = ablated(model, "weight", **{field: P})
    trained = output(adapters) - plain
    adapters.stop_drop()
    added = output(adapters) - plain
    kept = trained.abs().sum(dims, keepdim=True) > 1e-3 if dims else trained.abs() > 1e-5
    assert kept.float().mean().item() == pytest.approx(1 - P, abs=0.07 if dims else 0.01)
    torch.testing.assert_close(trained, kept * added / (1 - P), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", ["activation", "weight"])
def test_drop_path_leaves_out_whole_branches_of_single_images(model: nn.Module, form: str) -> None:
    x = torch.randn(2000, 3, find_sites(model)[1].weight.shape[1])
    adapters = ablated(model, form, drop_path=P)
    attention, linear = (site.output for site in adapters.sites[:2])
    trained = linear(x)
    y = x[:50, :, : adapters.sites[0].layer.in_features]
    left_out = attention(y, y, y, need_weights=False)[0].abs().sum((1, 2)) == 0
    assert 0 < left_out.sum() < 50
    adapters.stop_drop()
    whole = linear(x)
    kept = trained.abs().sum((1, 2)) > 0
    assert kept.float().mean().item() == pytest.approx(1 - P, abs=0.03)  # three deviations
    torch.testing.assert_close(trained[kept], whole[kept] / (1 - P))
    adapters.remove()
    assert (linear(x).abs().sum((1, 2)) > 0).all()  # nothing is left behind


def test_training_uses_the_variant(make_run: Callable[..., Run]) -> None:
    run = make_run(form="weight")

    def end(variant: Variant) -> dict[str, Tensor]:
        method = RAdapter({"drop": 0.0}, variant=variant)
        return method.learn(run.of(method.settings)).system.state_dict()

    plain = end(Variant())
    torch.testing.assert_close(dict(end(Variant())), dict(plain), rtol=0, atol=0)
    for field in dataclasses.fields(Variant):
        changed = end(Variant(**{field.name: 0.5}))
        assert any(not torch.equal(value, plain[name]) for name, value in changed.items())
