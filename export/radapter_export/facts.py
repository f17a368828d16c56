"""What a release says of its base."""

from __future__ import annotations

from typing import Any

from radapter_serve.clip.base import Base
from radapter_serve.clip.dense import check_dense


def preprocess_facts(base: Base, *, exif_orientation: bool) -> dict[str, Any]:
    """The `preprocess` entry of a release.

    Args:
        base: whose images are square.
        exif_orientation: whether images are turned by their EXIF orientation.
    """
    own = base.preprocess
    return {
        "size": base.image_size,
        **{name: own[name] for name in ("mode", "interpolation", "resize_mode", "fill_color")},
        **{name: [float(value) for value in own[name]] for name in ("mean", "std")},
        "exif_orientation": exif_orientation,
    }


def dense_facts(base: Base, method: str | None) -> dict[str, Any] | None:
    """The `dense` entry of a release; None where it has no dense embeddings.

    Args:
        base: whose image tower gives them.
        method: of dense embeddings, or None.

    Raises:
        RAdapterError: the tower can't, or there is no such method.
    """
    if method is None:
        return None
    return {"way": method, "grid": int(check_dense(base.model, method).grid_size[0])}
