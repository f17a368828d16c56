"""The average of adapters, by its definition: folding it is averaging the folds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from radapter_serve.adapter import Adapter, Metadata, average_adapters, base_digest, fold
from radapter_serve.errors import RAdapterError

WIDTHS = {"a.out_proj": 6, "b.c_proj": 8}
BASE = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(number))
    for number, (key, width) in enumerate(WIDTHS.items())
    for name, shape in ((f"{key}.weight", (width, 5)), (f"{key}.bias", (width,)))
}


def make(seed: int, rank: int | None, **metadata: object) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = {}
    for key, width in WIDTHS.items():
        if rank is None:
            shapes[key] = (width, width)
        else:
            shapes |= {f"{key}.up": (width, rank), f"{key}.down": (rank, width)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    digest = base_digest(BASE, WIDTHS)
    return Adapter(tensors, Metadata("x", digest, rank=rank, **metadata))  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.sampled_from([None, 1, 2, 3]), min_size=1, max_size=4),
    parts=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    alpha=st.floats(0, 1),
)
@example(ranks=[3, 3], parts=[1, 2, 0, 0], alpha=0.5)  # as wide as the narrowest layer
def test_the_fold_of_the_average_is_the_average_of_the_folds(
    ranks: list[int | None], parts: list[int], alpha: float
) -> None:
    adapters = [make(seed, rank) for seed, rank in enumerate(ranks)]
    parts = parts[: len(adapters)]
    weights = [part / sum(parts) for part in parts] if sum(parts) else None
    average = average_adapters(adapters, weights)
    found = fold(BASE, average, alpha)
    folds = [fold(BASE, adapter, alpha) for adapter in adapters]
    shares = weights or [1 / len(adapters)] * len(adapters)
    for name, base in BASE.items():
        expected = sum(
            share * each[name].double() for share, each in zip(shares, folds, strict=True)
        )
        np.testing.assert_allclose(found[name], expected, atol=1e-4 * (1 + float(base.abs().max())))
    total = None if None in ranks else sum(rank or 0 for rank in ranks)
    assert average.metadata.rank == (
        total if total is not None and total < min(WIDTHS.values()) else None
    )


def test_a_soup_says_what_was_held_out_where_all_held_out_the_same() -> None:
    recipe = {"seed": 1, "val_fraction": 0.2}
    one = make(0, None, held_out="sha256:1", recipe=recipe)
    same = make(1, None, held_out="sha256:1", recipe={**recipe, "seed": 2})
    other = make(2, None, held_out="sha256:2", recipe=recipe)
    soup = average_adapters([one, same]).metadata
    assert (soup.held_out, soup.recipe) == ("sha256:1", recipe)
    soup = average_adapters([one, same, other]).metadata
    assert (soup.held_out, soup.recipe) == (None, {"seed": 1})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.6], "weights are 0.5 0.6; allowed: .* sum is 1"),
        ([float("nan"), 1], "weights are nan 1"),
        ([1], "1 weights for 2 adapters"),
    ],
)
def test_weights_that_are_no_average(weights: list[float], message: str) -> None:
    with pytest.raises(RAdapterError, match=message):
        average_adapters([make(0, None), make(1, 2)], weights)


def test_adapters_of_other_bases_or_layers_are_refused() -> None:
    first = make(0, None)
    other = dataclasses.replace(first.metadata, base_digest="sha256:0123", architecture="ViT-B-16")
    with pytest.raises(
        RAdapterError, match=f"{first.metadata.base_digest}.*adapter 3 on sha256:0123 .ViT-B-16"
    ):
        average_adapters([first, first, Adapter(first.tensors, other)])
    fewer = Adapter(
        {"a.out_proj": first.tensors["a.out_proj"]}, dataclasses.replace(other, architecture="x")
    )
    with pytest.raises(
        RAdapterError, match=r"adapter 1 adapts b.c_proj and adapter 2 does not.*--adapt-text"
    ):
        average_adapters([first, fewer])
    with pytest.raises(RAdapterError, match="no adapters"):
        average_adapters([])
