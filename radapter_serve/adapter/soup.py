"""Soups: several adapters of one base become one, their average."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from radapter_serve.adapter.file import Adapter, Metadata
from radapter_serve.errors import RAdapterError


def average_adapters(
    adapters: Sequence[Adapter], weights: Sequence[float] | None = None
) -> Adapter:
    """Average adapters in weight space, `F = Σ wᵢ·Fᵢ`, so that the average folds to the average of
    the folds.

    A soup (Wortsman et al., ICML 2022) of what was added to one base. Low ranks add up, `up =
    [w₁·up₁ w₂·up₂ …]` over `down` stacked, which is exact, until they are no longer low; then, and
    where a full rank is among them, F is full.

    Args:
        adapters: of one base, with the same adapted layers; the first gives task, templates,
            default α and recipe.
        weights: one an adapter, each at least 0, sum 1; equal ones if None.

    Raises:
        RAdapterError: the bases or the adapted layers differ, or the weights are no average.
    """
    if not adapters:
        raise RAdapterError("no adapters to average; give at least one")
    weights = _checked([1 / len(adapters)] * len(adapters) if weights is None else weights)
    if len(weights) != len(adapters):
        raise RAdapterError(
            f"{len(weights)} weights for {len(adapters)} adapters; give one for each"
        )
    first, *others = adapters
    for number, other in enumerate(others, 2):
        _check_same_base(first, other, number)
    if not others:
        return first
    weighted = list(zip(weights, adapters, strict=True))
    rank = _rank_of_sum(adapters)
    tensors = {}
    for key in first.keys:
        if rank is None:
            matrices = [weight * adapter.matrix(key) for weight, adapter in weighted]
            tensors[key] = torch.stack(matrices).sum(0)
        else:
            layers = [(weight, adapter.layer(key)) for weight, adapter in weighted]
            ups = [weight * layer["up"].float() for weight, layer in layers]
            tensors[f"{key}.up"] = torch.cat(ups, dim=1)
            tensors[f"{key}.down"] = torch.cat([layer["down"].float() for _, layer in layers])
    return Adapter(tensors, _metadata(adapters, rank))


def _checked(weights: Sequence[float]) -> list[float]:
    sums_up = math.isclose(sum(weights), 1, abs_tol=1e-6)
    if not sums_up or not all(weight >= 0 for weight in weights):
        shown = " ".join(f"{weight:g}" for weight in weights)
        raise RAdapterError(
            f"weights are {shown}; allowed: numbers from 0 whose sum is 1, such as 0.5 0.5"
        )
    return list(weights)


def _rank_of_sum(adapters: Sequence[Adapter]) -> int | None:
    """The sum of the ranks; None, which is full rank, where a layer is no larger."""
    ranks = [adapter.metadata.rank for adapter in adapters]
    if None in ranks:
        return None
    rank = sum(rank or 0 for rank in ranks)
    tensors = adapters[0].tensors.items()
    narrowest = min(len(tensor) for name, tensor in tensors if not name.endswith(".down"))
    return rank if rank < narrowest else None


def _metadata(adapters: Sequence[Adapter], rank: int | None) -> Metadata:
    """Those of the first, without what holds for it alone."""
    metadata = dataclasses.replace(adapters[0].metadata, rank=rank, metrics={})
    if all(other.metadata.held_out == metadata.held_out for other in adapters):
        return metadata
    # What one held out, another learned.
    recipe = {name: value for name, value in metadata.recipe.items() if name != "val_fraction"}
    return dataclasses.replace(metadata, held_out=None, recipe=recipe)


def _check_same_base(first: Adapter, other: Adapter, number: int) -> None:
    # A digest covers the adapted layers alone: with other layers, one base could not be told from
    # two.
    one = first.metadata
    two = other.metadata
    differing = sorted(set(first.keys) ^ set(other.keys))
    if differing and one.architecture == two.architecture:
        has, lacks = (1, number) if differing[0] in first.keys else (number, 1)
        raise RAdapterError(
            f"adapter {has} adapts {differing[0]} and adapter {lacks} does not; only adapters of"
            " the same layers can be averaged (were both trained with the same --adapt-text?)"
        )
    if one.base_digest != two.base_digest:
        raise RAdapterError(
            f"adapter 1 was trained on {one.base_digest} ({one.architecture}, pretrained"
            f" {one.pretrained}), adapter {number} on {two.base_digest} ({two.architecture},"
            f" pretrained {two.pretrained}); only adapters of one base can be averaged"
        )
