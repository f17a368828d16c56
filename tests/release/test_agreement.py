"""How far a graph is from torch: over all batches, wherever the worst row is."""

from __future__ import annotations

import numpy as np
import pytest

from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Samples, compare

TURNS = (0.0, 0.3, 0.1)  # radians; of each batch's second row


def turned(angle: float) -> np.ndarray:
    """Two unit vectors; the second is turned by an angle."""
    return np.array([[1, 0], [np.cos(angle), np.sin(angle)]], np.float32)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)], ids=["middle", "first", "last"])
def test_the_worst_batch_counts_wherever_it_is(order: tuple[int, ...]) -> None:
    inputs = [np.array([[number]], np.int32) for number in order]
    samples = Samples(inputs, [turned(0.0)] * len(order))

    def encoder(tokens: np.ndarray) -> np.ndarray:
        return turned(TURNS[tokens.item()])

    found = compare("a graph", encoder, samples, None)
    assert found.max_error == pytest.approx(np.sin(0.3), abs=1e-6)
    assert found.min_cosine == pytest.approx(np.cos(0.3), abs=1e-6)
    with pytest.raises(RAdapterError, match="a graph differs from torch by up to 2.96e-01"):
        compare("a graph", encoder, samples, 0.2)
    assert compare("a graph", encoder, samples, 0.3) == found
