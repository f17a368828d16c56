"""Where embeddings stand between a base and its fine-tunes: `Point`; the map of finished embeddings
that an adapter on a projection is, in numpy, for servers; and a cache of what has a bound.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import check_alpha

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Point:
    """A point between a base and a fine-tune, as a request names it: an adapter beside the release,
    none if empty, and α in [0, 1], the default if None.
    """

    adapter: str = ""
    alpha: float | None = None


# Rows that are mapped without BLAS: its threads wait for each other where many callers ask at once,
# which took 1 ms of CPU a row instead of 0.08.
_FEW_ROWS = 4
_MIN_LENGTH = 1e-3  # a sum that is shorter, relative to its parts, is mostly rounding errors
DEFAULT_POINT = Point()  # no adapter, at the release's α


def map_embeddings(
    embeds: NDArray[np.floating[Any]], change: Floats | Sequence[Floats], alpha: float
) -> Floats:
    """Map embeddings of a base to those of its fold at α: `v + α·F·v` of each row, at unit length.

    Only the normalisation follows a projection, and it removes the length of v, so this is what
    the base computes with the adapter folded into its projection.

    Args:
        embeds: the base's embeddings [N, D], of any length but zero; not changed.
        change: F of the adapter file [D, D], or its factors `up` [D, r] and `down` [r, D].
        alpha: re-scaling in [0, 1].
    """
    check_alpha(alpha)
    rows = np.asarray(embeds, np.float32)
    changed = rows
    for factor in (change,) if isinstance(change, np.ndarray) else reversed(change):
        if len(rows) <= _FEW_ROWS:
            changed = np.einsum("nd,ed->ne", changed, factor)
        else:
            changed = changed @ factor.T
    mapped = rows + np.float32(alpha) * changed
    lengths = np.linalg.norm(mapped, axis=1, keepdims=True)
    return np.asarray(mapped / np.maximum(lengths, 1e-12), np.float32)


def weighted_sum(embeds: Sequence[Floats], weights: Sequence[float]) -> Floats | None:
    """Add embeddings [N, D] with their weights [N], at unit length; None if they cancel out."""
    factors = np.array(weights, np.float64)
    largest = np.abs(factors).max()
    if largest > 0:
        factors /= largest
    total = factors @ np.array(embeds, np.float64)
    length = np.linalg.norm(total)
    if length <= _MIN_LENGTH * max(np.abs(factors).sum(), 1.0):
        return None
    return np.asarray(total / length, np.float32)


class Cache:
    """Least-recently-used cache of values whose sizes add up to `max_size`. Thread-safe."""

    def __init__(self, max_size: float) -> None:
        self._max_size = max_size
        self._size = 0
        self._entries: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        """The value of a key; None if it is not cached."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Any, value: Any, size: int = 1) -> None:
        """Cache a value, not a view of a larger array; alone it may have any size."""
        with self._lock:
            self._size -= self._entries.pop(key, (None, 0))[1]
            self._entries[key] = value, size
            self._size += size
            while self._size > self._max_size and len(self._entries) > 1:
                _, (_, dropped) = self._entries.popitem(last=False)
                self._size -= dropped

    def drop(self, unwanted: Callable[[Any], bool]) -> None:
        """Forget the values of some keys."""
        with self._lock:
            for key in list(filter(unwanted, self._entries)):
                self._size -= self._entries.pop(key)[1]
