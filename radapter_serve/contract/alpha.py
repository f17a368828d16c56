"""α: its range, and the α of a request, where a release's encoders take one for each row
(`dynamic_alpha`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import invalid
from radapter_serve.errors import RAdapterError

Alpha = NDArray[np.float32]  # [B, 1], one for each row
# Rows to embeddings; with a second argument, `Alpha`, where α is an input.
Encode = Callable[..., NDArray[np.float32]]


def check_alpha(alpha: float) -> None:
    """Refuse an α outside [0, 1]."""
    if not 0 <= alpha <= 1:  # NaN, too
        raise RAdapterError(
            f"alpha is {alpha:g}; allowed: 0 (the base) to 1 (all that was learned)"
        )


def request_alpha(given: float | None, own: float, *, dynamic: bool) -> float | None:
    """The α that the encoders get for a request; None where it is folded into them.

    A request may bring its own, `given`, where the encoders take one (`dynamic`); `own` is the
    release's. Raises a `TaskError` where it is not in [0, 1], or not the one that was folded.
    """
    alpha = float(np.float32(own if given is None else given))
    try:
        check_alpha(alpha)
    except RAdapterError as error:
        raise invalid(str(error)) from None
    if dynamic:
        return alpha
    if alpha != np.float32(own):
        raise invalid(
            f"alpha is {alpha:g}, but this release was exported at alpha {own:g};"
            " radapter-export --alpha dynamic makes one that takes any"
        )
    return None
