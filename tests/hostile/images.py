"""Files that are no image, or a hostile one."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from PIL import Image

from tests.helpers.small_release import SIGNATURE, chunk, png, png_header


def _zeros(count: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(2**20)
    packed = b"".join(packer.compress(block) for _ in range(count // len(block)))
    return packed + packer.compress(bytes(count % len(block))) + packer.flush()


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


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(width: int = 40, height: int = 30) -> bytes:
    return png(3, width, height, "JPEG")


def webp(width: int, height: int, frames: int = 1) -> bytes:
    images = [Image.new("RGB", (width, height), (number % 256, 0, 0)) for number in range(frames)]
    several = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    return _saved(images[0], "WEBP", lossless=True, **several)


def scan_bomb(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan: each is decoded over the whole image."""
    data = _saved(Image.new("L", (width, height), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def hidden_scans(regions: int = 80) -> bytes:
    """A scan bomb whose scans are behind markers that a decoder passes over when it looks for a
    restart.
    """
    image = Image.new("L", (2000, 2000), 128)
    data = _saved(image, "JPEG", progressive=True, restart_marker_blocks=1000)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    head = data[last : last + 10]
    count = 65_000 // len(scan)
    hidden = head + b"\xff\x02\xff\xff" + scan * count + head + bytes(65_523 - len(scan) * count)
    return data[:last] + scan + hidden * regions + data[-2:]


def _patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new, 1)


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("../../etc/passwd"), "x")  # at no time
    return file.getvalue()


def _exif_loop() -> bytes:
    """A JPEG turned by EXIF whose list of fields names itself as the next one."""
    entry = struct.pack("<HHII", 0x0112, 3, 1, 6)
    body = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + struct.pack("<I", 8)
    return jpeg()[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg()[2:]


def _segments() -> bytes:
    segment = b"\xff\xe2" + struct.pack(">H", 65535) + b"x" * 65533
    return jpeg()[:2] + segment * 500 + jpeg()[2:]


_SIZES = {
    "JPEG": (struct.pack(">HH", 30, 40), struct.pack(">HH", 65500, 65500)),
    "WebP": (struct.pack("<I", 63 | 63 << 14), struct.pack("<I", 0x3FFF | 0x3FFF << 14)),
}
_WEBP = b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff"
_SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n"
_MARKERS = b"\xff\xd8" + b"\xff\xe1\0\2" * 10_000 + b"\xff\xd9"
_NO_TABLES = b"\xff\xd8\xff\xda\0\x08\x01\x01\0\0\x3f\0" + bytes(100) + b"\xff\xd9"
_NO_PIXELS = SIGNATURE + png_of(8, 8)[8:33] + chunk(b"IEND", b"")
_PHP = jpeg()[:2] + b"\xff\xfe\0\x18<?php system('id'); ?>" + jpeg()[2:]

Files = dict[str, "bytes | Callable[[], bytes]"]

# No image of these may be answered.
BAD: Files = {
    "decompression bomb: PNG of 30,000 x 30,000": lambda: png_of(30_000, 30_000),
    "decompression bomb: PNG header of 2^31 x 2^31": png_header(2**31 - 1, 2**31 - 1),
    "decompression bomb: PNG header of 2^32 - 1": png_header(2**32 - 1, 1),
    "decompression bomb: JPEG of 65,500 x 65,500": _patched(jpeg(), *_SIZES["JPEG"]),
    "decompression bomb: WebP of 16,383 x 16,383": _patched(webp(64, 64), *_SIZES["WebP"]),
    "scan bomb: 10,000 scans of 8,000 x 8,000": lambda: scan_bomb(8000, 8000, 10_000),
    "scan bomb: 100,000 scans of 1,000 x 1,000": lambda: scan_bomb(1000, 1000, 100_000),
    "scan bomb: 20,000 scans behind a wrong marker": hidden_scans,
    "decompression bomb: zTXt": lambda: png_of(8, 8, chunk(b"zTXt", b"k\0\0" + _zeros(2**28))),
    "decompression bomb: 100 x zTXt of 1 MB": lambda: png_of(
        8, 8, *[chunk(b"zTXt", b"k%d\0\0" % number + _zeros(2**20 - 1)) for number in range(100)]
    ),
    "thin image: 1 x 60,000,000": lambda: png_of(1, 60_000_000, bits=8),
    "no image: empty": b"",
    "no image: SVG": _SVG,
    "no image: EPS": _EPS,
    "no image: TIFF that points to itself": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "no image: zip": _zip,
    "no image: gzip of a PNG": lambda: gzip.compress(png(), mtime=0),
    "no image: RIFF of 4 GB": _WEBP,
    "no image: path": b"/etc/passwd",
    "broken image: PNG without pixels": _NO_PIXELS,
    "broken image: PNG of 0 x 0": png_header(0, 0),
    "broken image: PNG of 99 bits": _patched(png_of(8, 8, bits=8), b"\x08\0\0\0\0", b"c\0\0\0\0"),
    "broken image: PNG with a chunk of 2 GB": png_of(8, 8)[:33] + b"\x7f\xff\xff\xffIDAT",
    "broken image: PNG, wrong sum": png_of(8, 8)[:30] + b"\0\0\0" + png_of(8, 8)[33:],
    "broken image: JPEG of markers alone": _MARKERS,
    "broken image: JPEG, no tables": _NO_TABLES,
    "truncated image: PNG": png()[: len(png()) // 2],
    "truncated image: JPEG": jpeg()[: len(jpeg()) // 2],
    "truncated image: WebP": webp(64, 64)[:-8],
}

# These may be answered, as long as the answer is right.
ODD: Files = {
    "large image: PNG of 8,000 x 8,000": lambda: png_of(8000, 8000),
    "odd image: colour profile": lambda: png_of(8, 8, chunk(b"iCCP", b"k\0\0" + _zeros(2**28))),
    "odd image: 20 scans of 500 x 500": scan_bomb(500, 500, 20),
    "many chunks: 100,000 of PNG": lambda: png_of(8, 8, *[chunk(b"tEXt", b"k\0v")] * 100_000),
    "many chunks: 500 x APP2 of 64 kB": _segments,
    "many frames: WebP of 200": lambda: webp(16, 16, 200),
    "odd image: 1 x 250": png_of(1, 250, bits=8),
    "polyglot: JPEG and zip": lambda: jpeg() + _zip(),
    "polyglot: JPEG with PHP in a comment": _PHP,
    "polyglot: JPEG behind JPEG": jpeg() * 2,
    "odd image: EXIF that points to itself": _exif_loop(),
    "odd image: PNG of 16 bits": png_of(9, 9, bits=16),
    "odd image: palette without colours": png_of(9, 9, bits=8, colour=3),
    "odd image: CMYK": _saved(Image.new("CMYK", (20, 20)), "JPEG"),
    "odd image: transparent": _saved(Image.new("RGBA", (20, 20)), "PNG"),
}


@cache
def made(name: str) -> bytes:
    """The file of a name, made once."""
    file = BAD[name] if name in BAD else ODD[name]
    return file if isinstance(file, bytes) else file()


def small() -> Iterator[str]:
    """The names of files that are small and soon refused, for many requests."""
    slow = ("profile", "20 scans", "bomb", "large", "many", "thin image: 1 x 60")
    return (name for name in (*BAD, *ODD) if not any(word in name for word in slow))
