"""HEIC, a phone's photos: converted where they lie, with the extra `heic`. A server takes none, as
the size of a file is no bound on the work of decoding it.
"""

from __future__ import annotations

import importlib.util
import io

from PIL import Image

SUFFIXES = (".heic", ".heif")  # of file names
MAX_PIXELS = 64_000_000
_BRANDS = (b"hei", b"hev", b"mif", b"msf")  # each with one more letter


def readable_suffixes() -> tuple[str, ...]:
    """`SUFFIXES` where the extra `heic` is installed, else none."""
    return SUFFIXES if importlib.util.find_spec("pillow_heif") else ()


def is_heic(data: bytes) -> bool:
    """True if a file begins as HEIC does."""
    return data[4:8] == b"ftyp" and data[8:11] in _BRANDS


def without_heic(data: bytes) -> bytes:
    """Make a JPEG of a HEIC file, where the extra `heic` is installed; other files stay as they
    are. A ValueError says what is wrong with the file.
    """
    if not is_heic(data) or not readable_suffixes():
        return data
    import pillow_heif  # here: libheif loads slowly, and few need it

    try:
        heif = pillow_heif.open_heif(data)
        width, height = heif.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"it has {width} x {height} pixels; at most {MAX_PIXELS} are allowed")
        image: Image.Image = heif.to_pillow()  # upright: libheif has turned it
    except MemoryError:
        raise
    except Exception as error:  # libheif raises anything on broken files
        raise ValueError(f"the HEIC file cannot be read: {error}") from None
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()
