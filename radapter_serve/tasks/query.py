"""What a search asks for: texts, images and images of the index, with weights, as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import invalid
from radapter_serve.contract.preprocess import ImageFile

MAX_PARTS = 16
# A sum that is shorter than this, relative to its parts, is mostly their rounding errors.
MIN_LENGTH = 1e-3


@dataclass(frozen=True)
class Query:
    """The parts of a query; at least one.

    Args:
        texts: each with at least one word.
        images: encoded.
        ids: of images of the index.
        weights: of texts, images and ids, in this order; None for 1 each.
    """

    texts: Sequence[str] = ()
    images: Sequence[bytes | ImageFile] = ()
    ids: Sequence[str] = ()
    weights: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.texts) + len(self.images) + len(self.ids)

    @property
    def is_one_text(self) -> bool:
        """Whether it is a text and nothing else, such as scores are calibrated for."""
        return len(self) == len(self.texts) == 1 and self.checked_weights() == [1.0]

    def checked_weights(self) -> list[float]:
        """The weight of each part.

        Raises:
            TaskError: no part, too many, or weights that don't fit them.
        """
        count = len(self)
        if not count:
            raise invalid("nothing to search for; give text, image or id, one or more")
        if count > MAX_PARTS:
            raise invalid(f"{count} texts, images and ids; at most {MAX_PARTS} are allowed")
        if self.weights is None:
            return [1.0] * count
        weights = [float(weight) for weight in self.weights]
        if len(weights) != count:
            raise invalid(
                f"{len(weights)} weights for {count} texts, images and ids; give one for each, or"
                " none"
            )
        for weight in weights:
            if not np.isfinite(weight):
                raise invalid(f"a weight is {weight}; allowed are finite numbers")
        return weights


def combine(
    vectors: Sequence[NDArray[np.float32]], weights: Sequence[float]
) -> NDArray[np.float32]:
    """The weighted sum, of unit length; one vector of weight 1 stays as it is.

    Args:
        vectors: float32 [D] each, unit length.
        weights: finite.

    Raises:
        TaskError: the weights cancel to nothing.
    """
    if list(weights) == [1.0]:
        return vectors[0]
    factors = np.array(weights, np.float64)
    largest = np.abs(factors).max()
    if largest > 0:
        factors /= largest
    total = factors @ np.array(vectors, np.float64)
    length = np.linalg.norm(total)
    if length <= MIN_LENGTH * max(np.abs(factors).sum(), 1.0):
        shown = ", ".join(f"{weight:g}" for weight in weights)
        raise invalid(
            f"the weights {shown} cancel to nothing; change one, so that a direction is left"
        )
    return np.asarray(total / length, np.float32)
