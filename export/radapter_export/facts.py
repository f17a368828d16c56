"""What a release says of its base and its weights."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from radapter_serve.clip.base import Base
from radapter_serve.clip.dense import check_dense
from radapter_serve.clip.towers import logit_scale_and_bias


def base_facts(
    base: Base, weights: Mapping[str, Tensor], dense: str | None, *, exif_orientation: bool
) -> dict[str, Any]:
    """The fields of a `Release` that follow from a base and its weights.

    `dense` is the method of patch embeddings, or None; `exif_orientation` says whether images are
    turned. Refuses a base without such embeddings.
    """
    preprocess = base.preprocess
    copied = ("mode", "interpolation", "resize_mode", "fill_color")
    scale, bias = logit_scale_and_bias(weights)
    grid = None if dense is None else int(check_dense(base.model, dense).grid_size[0])
    return {
        "architecture": base.name,
        "preprocess": {
            "size": base.image_size,
            **{name: preprocess[name] for name in copied},
            **{name: [float(value) for value in preprocess[name]] for name in ("mean", "std")},
            "exif_orientation": exif_orientation,
        },
        "embed_dim": int(base.config["embed_dim"]),
        "logit_scale": scale,
        "logit_bias": bias,
        "dense": None if dense is None else {"way": dense, "grid": grid},
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
