"""A request for each task, to see that it works; no task is imported."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Tensors = Mapping[str, NDArray[Any]]


def _small_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "grey").save(file, "PNG")
    return file.getvalue()


def _texts(*values: bytes, rows: bool = True) -> NDArray[np.object_]:
    array = np.array(values, np.object_)
    return array[None] if rows else array


_IMAGE = _small_image()
# No index has this name, and `retrieve` says so.
_SEARCH = {"index": _texts(b"/", rows=False), "text": _texts(b"a", rows=False)}

# The smallest request that goes through a task's encoders, so that no caller's first request has to
# wait for them.
PROBES: Mapping[str, Tensors] = {
    "embed_image": {"image": _texts(_IMAGE)},
    "embed_text": {"text": _texts(b"a")},
    "retrieve": _SEARCH,
    "segment": {"image": _texts(_IMAGE, rows=False), "labels": _texts(b"a", rows=False)},
    "classify": {"image": _texts(_IMAGE), "labels": _texts(b"a")},
}
# A request that a task answers at once, and be it with a refusal.
GLANCES: Mapping[str, Tensors] = {
    "embed_image": {"image": _texts(b"-")},
    "embed_text": {"text": _texts(b" ")},
    "retrieve": _SEARCH,
    "segment": {"image": _texts(b"-", rows=False)},
    "classify": {"image": _texts(b"-")},
}
