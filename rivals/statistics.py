"""Leads of a system over another with intervals over images and seeds, and Holm's correction."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

K = TypeVar("K")
Floats = NDArray[np.float64]
Images = list[Floats]  # each image's part of a figure, by set


@dataclass(frozen=True)
class Lead:
    """A lead in points, half of its 95 % interval, and the p-value of no lead.

    The last two are NaN where nothing tells the variance. `claim` is a digest of the differences:
    a copy of a row, and the lead seen from the other system, have the same.
    """

    points: float
    half: float
    p: float
    claim: str

    def __str__(self) -> str:
        if isnan(self.half):
            return f"{self.points:+.1f}"
        return f"{self.points:+.1f} ± {self.half:.1f}"


def lead_of(differences: Sequence[Floats], names: Sequence[NDArray[Any]] | None = None) -> Lead:
    """Compute the mean lead over sets of equal weight, with its interval over images and seeds.

    Images and seeds are crossed random effects. The variance of the mean is that of the seeds'
    means, which holds the images' noise, and that of the images' means without this noise. A single
    seed leaves the images alone. Student's t has Satterthwaite's degrees of freedom for the sum of
    both. With few seeds their own share of it counts 1 + 2/(seeds - 1) times: otherwise, where the
    seeds differ, three seeds cover 92 to 94 % (`tests/rivals/test_statistics.py`).

    Args:
        differences: of each image, float [seeds, images], by set; in [-1, 1] for accuracies.
        names: of the images, by set. Images of the same name count as one in all sets.
    """
    sets = [np.asarray(values, np.float64) for values in differences]
    seeds = len(sets[0])
    if names is None:
        ends = np.cumsum([values.shape[1] for values in sets])
        names = [
            np.arange(end - values.shape[1], end) for end, values in zip(ends, sets, strict=True)
        ]
    by_seed = np.mean([values.mean(axis=1) for values in sets], axis=0)
    points = 100 * float(by_seed.mean())
    claim = _claim(sets)

    # Sum what each image adds to the mean of its sets: its own effect, and its noise by seed.
    _, places = np.unique(np.concatenate(list(names)), return_inverse=True)
    effects = np.zeros(places.max() + 1)
    noise = np.zeros((seeds, len(effects)))
    start = 0
    shares = []  # of each set, its variance over images and its images
    for values in sets:
        count = values.shape[1]
        if count < 2:
            return Lead(points, nan, nan, claim)
        here = places[start : start + count]
        start += count
        weight = 1 / (len(sets) * sqrt(count * (count - 1)))
        of_image = values.mean(axis=0) - values.mean()
        effects[here] += weight * of_image
        shares.append((float(((weight * of_image) ** 2).sum()), count))
        noise[:, here] += weight * (values - values.mean(axis=1, keepdims=True) - of_image)

    # Join both variances and their degrees of freedom.
    of_images = float((effects**2).sum())
    freedom = float(len(effects) - 1)
    if spread := sum(variance**2 / (count - 1) for variance, count in shares):
        freedom = min(freedom, sum(variance for variance, _ in shares) ** 2 / spread)
    if seeds == 1:
        return _tested(points, of_images, freedom, claim)
    few = seeds - 1
    of_seeds = float(by_seed.var(ddof=1)) / seeds
    of_noise = float((noise**2).sum()) / (seeds * few)
    variance = of_seeds + max(0.0, of_images - of_noise)
    spread = (1 + 2 / few) * of_seeds**2 / few
    if of_images > of_noise:
        spread += (of_images**2 + of_noise**2 / few) / freedom
    freedom = max(float(few), variance**2 / spread) if spread else float(few)
    return _tested(points, variance, freedom, claim)


def _tested(points: float, variance: float, freedom: float, claim: str) -> Lead:
    """Make a lead from its variance, in shares, and degrees of freedom."""
    error = 100 * sqrt(variance)
    if not error:
        return Lead(points, 0.0, float(points == 0), claim)
    half = float(stats.t.isf(0.025, freedom)) * error
    return Lead(points, half, float(2 * stats.t.sf(abs(points) / error, freedom)), claim)


def _claim(sets: Sequence[Floats]) -> str:
    """Digest the differences without their common sign."""
    values = np.concatenate([each.ravel() for each in sets]) + 0.0
    signs = np.sign(values[np.flatnonzero(values)[:1]])
    if signs.size:
        values = values * signs[0] + 0.0
    return hashlib.sha256(values.tobytes()).hexdigest()


def lead_over(
    images: Sequence[Mapping[str, Images]], base: Sequence[Mapping[str, Images]], head: str
) -> Lead:
    """Compute the lead in a column over a base, both by seed."""
    pairs = list(zip(images, base, strict=True))
    return lead_of(
        [
            np.stack([of_seed[head][number] - of_base[head][number] for of_seed, of_base in pairs])
            for number in range(len(pairs[0][0][head]))
        ]
    )


def holm(values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Mark the p-values that survive Holm's correction (Scand. Journal of Statistics, 1979); those
    that are NaN do not, and do not count.
    """
    order = sorted(
        (place for place, value in enumerate(values) if not isnan(value)),
        key=lambda place: values[place],
    )
    survives = [False] * len(values)
    for rank, place in enumerate(order):
        if values[place] > level / (len(order) - rank):
            break
        survives[place] = True
    return survives


def corrected(leads: Mapping[K, Lead]) -> dict[K, str]:
    """Format leads, bold if they survive Holm's correction over all of them; each claim counts
    once.
    """
    claims = {lead.claim: lead.p for lead in leads.values()}
    survivors = dict(zip(claims, holm(list(claims.values())), strict=True))
    return {
        place: f"**{lead}**" if survivors[lead.claim] else str(lead)
        for place, lead in leads.items()
    }
