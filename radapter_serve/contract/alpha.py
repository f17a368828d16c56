"""α at the time of a request: a release whose encoders have it as an input (`dynamic_alpha`) takes
one for each row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import invalid

Alpha = NDArray[np.float32]  # [B, 1], one for each row
# Rows to embeddings; with a second argument, `Alpha`, where α is an input.
Encode = Callable[..., NDArray[np.float32]]


def request_alpha(given: float | None, own: float, *, dynamic: bool) -> float | None:
    """The α that the encoders are given for a request; None where it is folded into them.

    Args:
        given: by the request, or None for the release's.
        own: the release's.
        dynamic: whether its encoders take another.

    Raises:
        TaskError: it is not in [0, 1], or not the one that was folded.
    """
    alpha = float(np.float32(own if given is None else given))
    if not 0 <= alpha <= 1:
        raise invalid(f"alpha is {alpha:g}; allowed: 0 (the base) to 1 (all that was learned)")
    if dynamic:
        return alpha
    if alpha != np.float32(own):
        raise invalid(
            f"alpha is {alpha:g}, but this release was exported at alpha {own:g};"
            " radapter-export --alpha dynamic makes one that takes any"
        )
    return None


def at(encode: Encode, alpha: float | None) -> Encode:
    """An encoder at one α for all rows; None where it has no α."""
    if alpha is None:
        return encode
    return lambda values: encode(values, np.full((len(values), 1), alpha, np.float32))
