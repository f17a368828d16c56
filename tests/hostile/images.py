"""Files that are no image, or a hostile one."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

from PIL import Image

from tests.helpers.small_release import SIGNATURE, chunk, png, png_header


def _zeros(count: int) -> bytes:
    return zlib.compress(bytes(count), 9)


def png_of(
    width: int,
    height: int,
    *extra: bytes,
    bits: int = 1,
    colour: int = 0,
    data: bytes | None = None,
) -> bytes:
    """A PNG, black if no data are given, with chunks before its pixels."""
    if data is None:
        channels = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
        data = _zeros((1 + (width * bits * channels + 7) // 8) * height)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return SIGNATURE + header + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(width: int = 40, height: int = 30) -> bytes:
    return png(3, width, height, "JPEG")


def _animation(count: int) -> bytes:
    frames = [Image.new("RGB", (16, 16), (number, 0, 0)) for number in range(count)]
    return saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def scan_bomb(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan: each is decoded over the whole image."""
    data = saved(Image.new("L", (width, height), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def hidden_scans(regions: int = 80) -> bytes:
    """A scan bomb whose scans are behind markers that a decoder passes over when it looks for a
    restart.
    """
    image = Image.new("L", (2000, 2000), 128)
    data = saved(image, "JPEG", progressive=True, restart_marker_blocks=1000)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    head = data[last : last + 10]
    count = 65_000 // len(scan)
    hidden = head + b"\xff\x02\xff\xff" + scan * count + head + bytes(65_523 - len(scan) * count)
    return data[:last] + scan + hidden * regions + data[-2:]


def _patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new, 1)


def _with_segment(marker: int, body: bytes, count: int = 1) -> bytes:
    """A JPEG that begins with segments of this kind."""
    segment = struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
    return jpeg()[:2] + segment * count + jpeg()[2:]


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("../../etc/passwd"), "x")  # at no time
    return file.getvalue()


WEBP = saved(Image.new("RGB", (64, 64)), "WEBP", lossless=True)
_EXIF = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 0x0112, 3, 1, 6, 8)

# Small files are made at once, and the rest for the first request.
Files = dict[str, "bytes | Callable[[], bytes]"]

# No image of these may be answered.
BAD: Files = {
    "decompression bomb: PNG of 30,000 x 30,000": lambda: png_of(30_000, 30_000),
    "decompression bomb: JPEG of 65,500 x 65,500": _patched(
        jpeg(), struct.pack(">HH", 30, 40), struct.pack(">HH", 65500, 65500)
    ),
    "decompression bomb: WebP of 16,383 x 16,383": _patched(
        WEBP, struct.pack("<I", 63 | 63 << 14), struct.pack("<I", 0x3FFF | 0x3FFF << 14)
    ),
    "decompression bomb: zTXt": lambda: png_of(8, 8, chunk(b"zTXt", b"k\0\0" + _zeros(2**28))),
    "scan bomb: 10,000 scans of 8,000 x 8,000": lambda: scan_bomb(8000, 8000, 10_000),
    "scan bomb: 20,000 scans behind a wrong marker": hidden_scans,
    "thin image: 1 x 60,000,000": lambda: png_of(1, 60_000_000, bits=8),
    "no image: empty": b"",
    "no image: SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///x"/></svg>',
    "no image: EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "no image: TIFF that points to itself": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "no image: zip": _zip(),
    "no image: gzip of a PNG": gzip.compress(png(), mtime=0),
    "no image: RIFF of 4 GB": b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff",
    "no image: path": b"/etc/passwd",
    "broken image: PNG without pixels": SIGNATURE + png_of(8, 8)[8:33] + chunk(b"IEND", b""),
    "broken image: PNG of 0 x 0": png_header(0, 0),
    "broken image: PNG of 99 bits": _patched(png_of(8, 8, bits=8), b"\x08\0\0\0\0", b"c\0\0\0\0"),
    "broken image: PNG with a chunk of 2 GB": png_of(8, 8)[:33] + b"\x7f\xff\xff\xffIDAT",
    "broken image: PNG, wrong sum": png_of(8, 8)[:30] + b"\0\0\0" + png_of(8, 8)[33:],
    "broken image: JPEG of markers alone": b"\xff\xd8" + b"\xff\xe1\0\2" * 10_000 + b"\xff\xd9",
    "broken image: JPEG, no tables": b"\xff\xd8\xff\xda\0\x08\x01\x01\0\0\x3f\0" + bytes(100),
    "truncated image: PNG": png()[: len(png()) // 2],
    "truncated image: JPEG": jpeg()[: len(jpeg()) // 2],
    "truncated image: WebP": WEBP[:-8],
}

# These may be answered, as long as the answer is right.
ODD: Files = {
    "large image: PNG of 8,000 x 8,000": lambda: png_of(8000, 8000),
    "odd image: colour profile": lambda: png_of(8, 8, chunk(b"iCCP", b"k\0\0" + _zeros(2**28))),
    "odd image: 20 scans of 500 x 500": lambda: scan_bomb(500, 500, 20),
    "many chunks: 100,000 of PNG": lambda: png_of(8, 8, *[chunk(b"tEXt", b"k\0v")] * 100_000),
    "many chunks: 500 x APP2 of 64 kB": lambda: _with_segment(0xE2, b"x" * 65533, 500),
    "many frames: WebP of 200": lambda: _animation(200),
    "odd image: 1 x 250": png_of(1, 250, bits=8),
    "polyglot: JPEG and zip": jpeg() + _zip(),
    "polyglot: JPEG with PHP in a comment": _with_segment(0xFE, b"<?php system('id'); ?>"),
    "polyglot: JPEG behind JPEG": jpeg() * 2,
    "odd image: EXIF that points to itself": _with_segment(0xE1, _EXIF),
    "odd image: PNG of 16 bits": png_of(9, 9, bits=16),
    "odd image: palette without colours": png_of(9, 9, bits=8, colour=3),
    "odd image: CMYK": saved(Image.new("CMYK", (20, 20)), "JPEG"),
    "odd image: transparent": saved(Image.new("RGBA", (20, 20)), "PNG"),
}
SMALL = [name for name, file in {**BAD, **ODD}.items() if isinstance(file, bytes)]


@cache
def file_of(name: str) -> bytes:
    """The file of a name, made once."""
    file = {**BAD, **ODD}[name]
    return file if isinstance(file, bytes) else file()
