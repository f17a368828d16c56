"""Soups: several adapters of one base become one, their average."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from radapter_serve.adapter.file import Adapter
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
    if weights is None:
        weights = [1 / len(adapters)] * len(adapters)
    sums_up = math.isclose(sum(weights), 1, abs_tol=1e-6)
    if not sums_up or not all(weight >= 0 for weight in weights):
        shown = " ".join(f"{weight:g}" for weight in weights)
        raise RAdapterError(
            f"weights are {shown}; allowed: numbers from 0 whose sum is 1, such as 0.5 0.5"
        )
    if len(weights) != len(adapters):
        raise RAdapterError(
            f"{len(weights)} weights for {len(adapters)} adapters; give one for each"
        )
    first, *others = adapters
    for number, other in enumerate(others, 2):
        _check_same_base(first, other, number)
    if not others:
        return first

    # The sum of the ranks, or full rank where a layer is no larger.
    ranks = [adapter.metadata.rank for adapter in adapters]
    rank = None if None in ranks else sum(rank or 0 for rank in ranks)
    narrowest = min(
        len(first.tensors[key if key in first.tensors else f"{key}.up"]) for key in first.keys
    )
    if rank is not None and rank >= narrowest:
        rank = None
    weighted = list(zip(weights, adapters, strict=True))
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

    # The first adapter's metadata, without its run-specific fields.
    metadata = dataclasses.replace(first.metadata, rank=rank, metrics={})
    if any(other.metadata.held_out != metadata.held_out for other in others):
        # What one held out, another learned.
        recipe = {name: value for name, value in metadata.recipe.items() if name != "val_fraction"}
        metadata = dataclasses.replace(metadata, held_out=None, recipe=recipe)
    return Adapter(tensors, metadata)


def _check_same_base(first: Adapter, other: Adapter, number: int) -> None:
    # A digest covers the adapted layers alone: with other layers, one base could not be told from
    # two.
    meta = first.metadata
    theirs = other.metadata
    differing = sorted(set(first.keys) ^ set(other.keys))
    if differing and meta.architecture == theirs.architecture:
        has, lacks = (1, number) if differing[0] in first.keys else (number, 1)
        raise RAdapterError(
            f"adapter {has} adapts {differing[0]} and adapter {lacks} does not; only adapters of"
            " the same layers can be averaged (were both trained with the same --adapt-text?)"
        )
    if meta.base_digest != theirs.base_digest:
        raise RAdapterError(
            f"adapter 1 was trained on {meta.base_digest} ({meta.architecture}, pretrained"
            f" {meta.pretrained}), adapter {number} on {theirs.base_digest} ({theirs.architecture},"
            f" pretrained {theirs.pretrained}); only adapters of one base can be averaged"
        )
