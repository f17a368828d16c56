"""How far embeddings move when large photos are decoded at less than their size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.contract.alpha import Encode
from radapter_serve.contract.preprocess import Preprocess, decode_pixels
from radapter_serve.release.agreement import Agreement, Samples, compare

_TIMES = (4, 8, 16)  # sides of the photos in sides of the input: decoded at a half, quarter, eighth
_MAX_SIDE = 8000  # of a photo, which may have 64 megapixels
_QUALITY = 90


def measure_fast_decode(
    images: Sequence[NDArray[Any]], preprocess: Preprocess, encode: Encode
) -> Agreement:
    """Compare embeddings of enlarged check images, as JPEGs, with those of the whole pixels.

    Args:
        images: uint8 [B, S, S, 3] each.
        preprocess: with fast decoding.
        encode: uint8 [B, S, S, 3] -> float32 [B, D] of unit length.

    Returns:
        How far the fast ones are from the exact ones.
    """
    exactly = replace(preprocess, fast_decode=False)
    fast: list[NDArray[np.uint8]] = []
    exact: list[NDArray[np.uint8]] = []
    for number, image in enumerate(np.concatenate(images)):
        photo = _photo(image, _TIMES[number % len(_TIMES)])
        fast.append(decode_pixels(photo, preprocess))
        exact.append(decode_pixels(photo, exactly))
    samples = Samples([np.stack(fast)], [encode(np.stack(exact))])
    return compare("image_encoder with --fast-decode", encode, samples, None)


def _photo(pixels: NDArray[np.uint8], times: int) -> bytes:
    """An image so many times as large, as a JPEG."""
    height, width = pixels.shape[:2]
    times = min(times, _MAX_SIDE // max(height, width))
    large = Image.fromarray(pixels).resize(
        (times * width, times * height), Image.Resampling.BICUBIC
    )
    file = io.BytesIO()
    large.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
