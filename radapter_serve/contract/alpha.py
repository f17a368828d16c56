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


def request_alpha(alpha: float | None, release_alpha: float, *, dynamic: bool) -> float | None:
    """The α that the encoders get for a request; None where it is folded into them.

    A request may bring an α where the encoders take one (`dynamic`). Raises a `TaskError` where it
    is not in [0, 1], or not the one that was folded.
    """
    used = float(np.float32(release_alpha if alpha is None else alpha))
    try:
        check_alpha(used)
    except RAdapterError as error:
        raise invalid(str(error)) from None
    if dynamic:
        return used
    if used != np.float32(release_alpha):
        raise invalid(
            f"alpha is {used:g}, but this release was exported at alpha {release_alpha:g};"
            " radapter-export --alpha dynamic makes one that takes any"
        )
    return None
