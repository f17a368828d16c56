"""Reading an image file for an index, on this machine or on a worker of a cluster."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.preprocess import oriented
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.files import digest_of


@dataclass(frozen=True)
class Read:
    """A file that was read: it is in the index already, or is prepared for the encoder or embedded,
    or is broken.

    Args:
        digest: of its bytes.
        prepared: pixels for the encoder, uint8 [S, S, 3].
        details: width, height and thumbnail.
        kept: whether the index has the same bytes.
        error: why it can't be indexed.
        vector: its embedding if it is known, float32 [D].
    """

    digest: str = ""
    prepared: Any = None
    details: Mapping[str, Any] = field(default_factory=dict)
    kept: bool = False
    error: str = ""
    vector: NDArray[np.float32] | None = None


def read(id: str, file: Path, before: str, loaded: LoadedRelease, thumbnails: int) -> Read:
    """Read a file, and prepare it if its bytes are not those that the index has. Thread-safe.

    Args:
        id: the image's name in the index.
        file: its place.
        before: digest of the bytes that the index has; empty if it has none, or needs them again.
        loaded: the release that embeds.
        thumbnails: longest side, in px; 0 for none.
    """
    try:
        id.encode()
        data = file.read_bytes()
        digest = digest_of(data)
        if before == digest:
            return Read(digest, kept=True)
        turned = loaded.preprocess.exif_orientation
        return Read(digest, loaded.pixels(data), describe_image(data, thumbnails, turned))
    except UnicodeEncodeError:
        return Read(error="its name is not UTF-8")
    except OSError as error:
        return Read(error=error.strerror or str(error))
    except TaskError as error:
        return Read(error=error.what)


def describe_image(data: bytes, size: int, turned: bool) -> dict[str, Any]:
    """Width and height of an image file as it was embedded, and an upright thumbnail.

    Args:
        data: the file's bytes.
        size: longest side of the thumbnail, in px; 0 for none.
        turned: whether the image was turned by its EXIF orientation before it was embedded.
    """
    details: dict[str, Any] = {}
    # The file was decoded before; if this fails, an index does without.
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
        sideways = turned and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        details["width"], details["height"] = image.size[::-1] if sideways else image.size
        if size:
            image.draft("RGB", (size, size))
            small = oriented(image).convert("RGB")
            small.thumbnail((size, size))
            out = io.BytesIO()
            small.save(out, "JPEG", quality=80)
            details["thumbnail"] = out.getvalue()
    return details
