"""Memory that decoding takes at the largest size that each kind of image may have."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_serve.contract import images
from tests.hostile.images import png_of, saved

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much a process has had"),
]
ORIENTATION = 0x0112
# Prints the bytes that decoding a file has taken at most. Another image of its kind is decoded
# before, so that what Pillow loads does not count.
MEASURE = """
import re, sys
from pathlib import Path
import numpy as np
from radapter_serve.contract import preprocess
def peak():
    return 1024 * int(re.search("VmHWM:\\\\s+(\\\\d+)", Path("/proc/self/status").read_text())[1])
small, large = (Path(name).read_bytes() for name in sys.argv[1:])
how = preprocess.Preprocess((224, 224))
preprocess.decode_pixels(small, how)
before = peak()
preprocess.decode_pixels(large, how)
print(peak() - before)
"""


def photo(side: int, kind: str, mode: str = "RGB", turned: bool = False, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode).resize((side, side), Image.Resampling.BILINEAR)
    if turned:
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        options["exif"] = exif
    return saved(image, kind, **options)


def animation(side: int) -> bytes:
    first, second = (Image.new("RGB", (side, side), colour) for colour in ("red", "blue"))
    return saved(first, "WEBP", save_all=True, append_images=[second], method=0)


KINDS: dict[str, Any] = {
    "JPEG": lambda side: photo(side, "JPEG"),
    "JPEG, turned": lambda side: photo(side, "JPEG", turned=True),
    "JPEG, ink, turned": lambda side: photo(side, "JPEG", "CMYK", turned=True),
    "JPEG, progressive": lambda side: photo(side, "JPEG", progressive=True, subsampling=0),
    "JPEG, progressive, ink": lambda side: photo(side, "JPEG", "CMYK", progressive=True),
    "PNG": lambda side: png_of(side, side, bits=8, colour=2),
    "PNG, alpha, turned": lambda side: photo(side, "PNG", "RGBA", turned=True, compress_level=1),
    "PNG, 16 bits, alpha": lambda side: png_of(side, side, bits=16, colour=6),
    "PNG, palette": lambda side: photo(side, "PNG", "P"),
    "WebP": lambda side: photo(side, "WEBP", method=0),
    "WebP, turned": lambda side: photo(side, "WEBP", turned=True, method=0),
    "WebP, alpha": lambda side: photo(side, "WEBP", "RGBA", method=0),
    "WebP, animated": animation,
}


@pytest.mark.parametrize("name", KINDS)
def test_one_image_takes_no_more_than_is_said(name: str, tmp_path: Path) -> None:
    small = KINDS[name](64)
    each = images.read_header(small).memory // 64**2
    most = min(images.MAX_PIXELS, images.MAX_MEMORY // each)
    data = KINDS[name](math.isqrt(most))
    files = []
    for number, content in enumerate((small, data)):
        files.append(tmp_path / str(number))
        files[-1].write_bytes(content)
    command = [sys.executable, "-c", MEASURE, *map(str, files)]
    taken = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    # Of a WebP Pillow has the file once more; rows and tables take some megabytes.
    copies = len(data) if name.startswith("WebP") else 0
    assert taken < images.MAX_MEMORY + copies + 24 * 2**20
    assert taken > images.MAX_MEMORY / 10  # it was decoded
