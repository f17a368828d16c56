"""α at the time of a request: a release whose encoders have it as an input (`dynamic_alpha`) takes
one for each row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radapter_serve.contract.errors import invalid

Alpha = NDArray[np.float32]  # [B, 1], a row's own each
# Of one encoder: rows to embeddings; with a second argument, `Alpha`, where α is an input, and none
# where it is not.
Encode = Callable[..., NDArray[np.float32]]


class RequestAlpha:
    """α of a release's requests.

    Args:
        own: the α of the release.
        dynamic: whether its encoders take another one, too.
    """

    def __init__(self, own: float, dynamic: bool = False) -> None:
        self._own = own
        self.dynamic = dynamic

    def __call__(self, given: ArrayLike | None, rows: int) -> Alpha | None:
        """α of each row for the encoders, float32 [rows, 1]; None where the release's α is folded
        into them.

        Args:
            given: one for each row, or one for all; None for the release's own.
            rows: how many.

        Raises:
            TaskError: one is not in [0, 1], or not the one that was folded.
        """
        values = np.asarray(self._own if given is None else given, np.float32).reshape(-1, 1)
        wrong = values[~((values >= 0) & (values <= 1))]
        if wrong.size:
            raise invalid(
                f"alpha is {wrong[0]:g}; allowed: 0 (the base) to 1 (all that was learned)"
            )
        if self.dynamic:
            return np.array(np.broadcast_to(values, (rows, 1)))
        other = values[values != np.float32(self._own)]
        if other.size:
            raise invalid(
                f"alpha is {other[0]:g}, but this release was exported at alpha {self._own:g}; "
                "radapter-export --alpha dynamic makes one that takes any"
            )
        return None

    def one(self, given: ArrayLike | None) -> float | None:
        """α of a request of one row, for `at`."""
        return single(self(given, 1))


def single(alpha: Alpha | None) -> float | None:
    """The α of one row as a number, for `at`."""
    return None if alpha is None else float(alpha[0, 0])


def each(alpha: Alpha | None, rows: int) -> list[float | None]:
    """The α of each row as a number."""
    return [None] * rows if alpha is None else alpha.ravel().tolist()


def at(encode: Encode, alpha: float | None) -> Encode:
    """An encoder at one α for all rows; None where it has no α."""
    if alpha is None:
        return encode
    return lambda values: encode(values, np.full((len(values), 1), alpha, np.float32))
