"""Samples with torch's embeddings, stored with each encoder of a release. They check a graph on any
machine and in any runtime, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import Alpha, Encode
from radapter_serve.errors import RAdapterError
from radapter_serve.files import read_arrays

SAMPLES = "samples.npz"
# Lower bound of every minimum cosine, however wide the tolerance: an embedding that points
# elsewhere is another one, even if its components are small.
LEAST_COSINE = 0.9


@dataclass(frozen=True)
class Tolerance:
    """Largest distance of a graph from torch in fp32, in the terms of `Agreement`."""

    max_error: float
    min_cosine: float = LEAST_COSINE

    def widened(self, max_error: float | None) -> Tolerance:
        """Bounds for another `max_error`, if given; 1 − `min_cosine` grows with its square."""
        if max_error is None:
            return self
        angle = (1 - self.min_cosine) * max(1.0, max_error / self.max_error) ** 2
        return Tolerance(max_error, max(1 - angle, LEAST_COSINE))

    def __str__(self) -> str:
        return f"{self.max_error:.0e} (and {1 - self.min_cosine:.0e})"


# By precision: twice the worst of small random models of every family, about ten times that of
# ViT-B-32. int8 keeps 7 bits of a weight and 8 of an activation, bf16 8 of each, fp16 11.
TOLERANCES = {
    "fp32": Tolerance(1e-4, 0.999999),
    "fp16": Tolerance(2e-3, 0.99999),
    "bf16": Tolerance(1e-2, 0.999),
    "int8": Tolerance(5e-2, 0.99),
}


@dataclass(frozen=True)
class Agreement:
    """Distance of a graph from torch, over all rows of all batches.

    `max_error` is the largest absolute difference of a component of the unit-length embeddings,
    `min_cosine` the smallest cosine between an embedding and its reference.
    """

    max_error: float
    min_cosine: float

    @classmethod
    def worst(cls, *parts: Agreement) -> Agreement:
        """The largest distance of several graphs."""
        return cls(max(part.max_error for part in parts), min(part.min_cosine for part in parts))


@dataclass(frozen=True, kw_only=True)
class Agreements:
    """Distance of each encoder of a release from torch, over batches of these sizes, and the bounds
    that it was checked with.
    """

    image_encoder: Agreement | None = None
    patch_encoder: Agreement | None = None
    text_encoder: Agreement | None = None
    batches: list[int]
    tolerance: float
    min_cosine: float

    @property
    def encoders(self) -> dict[str, Agreement]:
        """Those that were measured, by name."""
        return {name: each for name, each in vars(self).items() if isinstance(each, Agreement)}


@dataclass(frozen=True)
class Samples:
    """Batches of inputs of an encoder, uint8 [B, S, S, 3] or int32 [B, L], and torch's embeddings
    of them, float32 [B, D] or [B, g, g, D]; `alphas` are float32 [B, 1] if α is an input.
    """

    inputs: Sequence[NDArray[np.generic]]
    references: Sequence[NDArray[np.float32]]
    alphas: Sequence[Alpha] = ()

    def batches(self) -> Iterator[tuple[list[NDArray[Any]], NDArray[np.float32]]]:
        """Yield the arguments of an encoder, one or two arrays, and the expected result."""
        for number, (values, reference) in enumerate(
            zip(self.inputs, self.references, strict=True)
        ):
            yield [values, *self.alphas[number : number + 1]], reference

    def save(self, folder: Path) -> None:
        """Write `samples.npz` next to a graph."""
        arrays: dict[str, NDArray[np.generic]] = {}
        fields = {"input": self.inputs, "reference": self.references, "alpha": self.alphas}
        for kind, batches in fields.items():
            arrays |= {f"{kind}_{number}": batch for number, batch in enumerate(batches)}
        np.savez(folder / SAMPLES, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: Path) -> Samples:
        """Read `samples.npz` from a folder."""
        try:
            arrays = read_arrays(folder / SAMPLES)
            fields = []
            for kind in ("input", "reference", "alpha"):
                count = sum(name.startswith(f"{kind}_") for name in arrays)
                fields.append([arrays[f"{kind}_{number}"] for number in range(count)])
            return cls(*fields)
        except (OSError, ValueError, KeyError) as error:
            raise RAdapterError(
                f"{folder / SAMPLES}: {error}; export the release again with radapter-export"
            ) from error


def compare(
    name: str, encoder: Encode, samples: Samples, bounds: Tolerance, *, is_fixed: bool = False
) -> Agreement:
    """Run a graph on every batch and compare the results with the references, within bounds;
    `is_fixed` is for bounds that no --tolerance changes.
    """
    max_error = 0.0
    least = 1.0
    for inputs, reference in samples.batches():
        try:
            embeds = encoder(*inputs)
        except Exception as error:
            raise RAdapterError(
                f"{name} fails on a batch of shape {inputs[0].shape}: {error}"
            ) from error
        if embeds.shape != reference.shape:
            raise RAdapterError(f"{name} gives {embeds.shape} where torch gives {reference.shape}")
        if not (np.isfinite(embeds).all() and np.isfinite(reference).all()):
            raise RAdapterError(
                f"{name} gives values that are not finite at batch {len(reference)}"
            )
        a = embeds.astype(np.float64)
        b = reference.astype(np.float64)
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosine = (a * b).sum(-1) / np.maximum(lengths, 1e-12)  # 0 for a zero vector
        max_error = max(max_error, float(np.abs(a - b).max()))
        least = min(least, float(cosine.min()))
    if max_error > bounds.max_error or least < bounds.min_cosine:
        advice = (
            f"fp32 is the closest --precision; no --tolerance allows a cosine below {LEAST_COSINE}"
        )
        if is_fixed:
            advice = "please report this model"
        elif least > LEAST_COSINE:
            needed = max(
                max_error, bounds.max_error * math.sqrt((1 - least) / (1 - bounds.min_cosine))
            )
            advice = (
                "fp32 is the closest --precision; to accept this, export with --tolerance"
                f" {min(1.5 * needed, 1.0):.0e}"
            )
        raise RAdapterError(
            f"{name} differs from torch by up to {max_error:.2e} (1 - cosine up to"
            f" {1 - least:.1e}), and {bounds} is allowed; {advice}"
        )
    return Agreement(max_error, least)
