"""Image files: listing them in folders, and decoding within limits of memory, time and size."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import itertools
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from radapter_client import heic
from radapter_serve.contract.errors import (
    IMAGE_TOO_LARGE,
    INVALID_IMAGE,
    OVERLOADED,
    Cancelled,
    TaskError,
    check_cancelled,
)
from radapter_serve.errors import RAdapterError, install_command

FORMATS = ("JPEG", "PNG", "WEBP")
# Suffixes of file names
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", *heic.readable_suffixes())
HEIC_ADVICE = "convert it to JPEG, as the client and its commands do with the extra heic"
ADVICE = "send a JPEG, PNG or WebP file, as bytes or as base64 text"
CONVERT = "find FOLDER -iname '*.hei[cf]' -exec heif-convert {} {}.jpg ';'"
MAX_PIXELS = 64_000_000
MAX_REQUEST_PIXELS = 800_000_000  # of all images of a request: 64 photos of 12 megapixels fit
# Most bytes that decoding an image may take, besides its file. Above LARGE_MEMORY, an engine, or a
# process without one, decodes one image at a time.
MAX_MEMORY = 512_000_000
LARGE_MEMORY = 128_000_000
# Bytes per pixel while an image is decoded, turned and resized, as tests/contract/test_memory.py
# measures them. For a WebP, the decoder makes three copies before Pillow makes its own.
PIXEL_BYTES = 8
WEBP_PIXEL_BYTES = 16
LARGE_PIXELS = 16_000_000  # most pixels of a thin image after resizing
MAX_BYTES = 64 * 2**20  # of a file
MAX_SIDE = 65_535  # limit of JPEG; decoders take seconds for a thin image with more rows
# A progressive JPEG is decoded once for each of its scans, and a small file can have thousands.
# Cameras and libjpeg write at most 20. Above LARGE_PIXELS, the limit falls in
# inverse proportion to the pixels.
MAX_SCANS = 100
# A header of a JPEG or a PNG is read in Python, part by part. That takes no longer than decoding a
# phone's photo within these limits: reads, of which a segment takes four and a chunk three; and
# bytes of metadata. Pixels are read, too, at least `READ_BYTES` at a time on average.
MAX_READS = 4096
MAX_METADATA = 8 * 2**20
READ_BYTES = 2**10
# Bytes of EXIF that are read, as fit into a segment of a JPEG, in binary and in hexadecimal: Pillow
# keeps a copy of each of its values, which may be the same bytes.
MAX_EXIF = {"exif": 2**16, "Raw profile type exif": 2**17 + 2**12}
POLL_SECONDS = 0.1  # between checks that the caller of a waiting image is still there
# JPEG markers
_SCAN = b"\xff\xda"
_END = 0xD9
# Markers with a length. In pixel data, FF is followed by 00 or by a restart, D0 to D7. 01 to BF are
# left out: a decoder that looks for a restart skips such a marker without a length, so its length
# must not hide a scan.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_MAGIC = (b"\xff\xd8", b"\x89PNG", b"RIFF")
_OTHERS = (
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\x00", "TIFF"),
    (0, b"MM\x00*", "TIFF"),
    (4, b"ftypavif", "AVIF"),
)

T = TypeVar("T")


@dataclass(frozen=True)
class ImageFile:
    """An encoded image; only its header has been read."""

    data: bytes = field(repr=False)
    width: int  # in pixels, before turning according to EXIF
    height: int
    memory: int  # most bytes that decoding takes, besides the file

    @property
    def is_large(self) -> bool:
        """True if no other large image may be decoded at the same time."""
        return self.memory > LARGE_MEMORY


class FifoLimit:
    """Admits `places` threads at a time, in order of arrival; at most `max_waiting` may wait.
    `what` names those that are refused.
    """

    def __init__(self, places: int, max_waiting: int, what: str) -> None:
        self._places = places
        self._max_waiting = max_waiting
        self._what = what
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()

    @contextlib.contextmanager
    def __call__(self, cancelled: Cancelled | None = None) -> Iterator[None]:
        """Wait for a turn and hold it for the block; a `TaskError` if too many threads wait."""
        turn = threading.Event()
        with self._lock:
            if len(self._queue) >= self._places + self._max_waiting:
                raise TaskError(OVERLOADED, f"too many {self._what}; ask again later")
            self._queue.append(turn)
            self._wake()
        try:
            while not turn.wait(POLL_SECONDS):
                check_cancelled(cancelled)
            check_cancelled(cancelled)
            yield
        finally:
            with self._lock:
                self._queue.remove(turn)
                self._wake()

    def _wake(self) -> None:
        for turn in itertools.islice(self._queue, self._places):
            turn.set()


LARGE = "requests with large images"
LARGE_IMAGES = FifoLimit(1, 32, LARGE)  # of this process, without those of an engine


@contextlib.contextmanager
def turn(
    file: ImageFile, cancelled: Cancelled | None = None, limit: FifoLimit = LARGE_IMAGES
) -> Iterator[None]:
    """A block in which an image may be decoded; large images take turns."""
    check_cancelled(cancelled)
    with limit(cancelled) if file.is_large else contextlib.nullcontext():
        yield


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 (upright) if its EXIF cannot be read."""
    try:
        if isinstance(image, PngImageFile):
            image.load()  # its EXIF may follow its pixels
        for name, size in MAX_EXIF.items():
            if len(image.info.get(name, "")) > size:
                del image.info[name]
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # Pillow raises anything on broken EXIF, which viewers ignore too
        return 1
    return int(orientation) if orientation in range(2, 9) else 1  # type: ignore[arg-type]


def oriented(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """Turn an image according to an EXIF orientation, by default its own, which it then loses."""
    if orientation is not None:
        image.getexif()[ExifTags.Base.Orientation] = orientation
    if orientation_of(image) == 1:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except (MemoryError, TaskError):
        raise
    except Exception:  # broken EXIF, as in `orientation_of`
        return image


def read_header(data: bytes | ImageFile) -> ImageFile:
    """Read the header of an image file, base64 text or `data:` URI, and check its limits."""
    if isinstance(data, ImageFile):
        return data
    if not data.startswith(_MAGIC):
        has_head = data.startswith(b"data:") and b"," in data
        text = data.split(b",", 1)[1] if has_head else data
        with contextlib.suppress(binascii.Error):
            data = base64.b64decode(text.translate(None, b" \t\r\n"), validate=True)
    if len(data) > MAX_BYTES:
        raise TaskError(
            IMAGE_TOO_LARGE, f"the image has {len(data)} bytes; at most {MAX_BYTES} are allowed"
        )
    with _broken():
        try:
            image = _open(data)
        except UnidentifiedImageError:
            what = f"{len(data)} bytes are not an image" if data else "the file is empty"
            if heic.is_heic(data):
                raise TaskError(INVALID_IMAGE, "HEIC files are not read", HEIC_ADVICE) from None
            for start, magic, kind in _OTHERS:
                if data[start:].startswith(magic):
                    what = f"{kind} files are not read"
            raise TaskError(INVALID_IMAGE, what, ADVICE) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise TaskError(
                IMAGE_TOO_LARGE, f"{error}; at most {MAX_PIXELS} pixels are allowed"
            ) from None
        width, height = image.size
        check_pixels(width, height, MAX_PIXELS, "the image")
        if max(width, height) > MAX_SIDE:
            raise TaskError(
                IMAGE_TOO_LARGE,
                f"the image has {width} x {height} pixels; at most {MAX_SIDE} a side",
            )
        kind = "progressive JPEG"
        pixel_bytes = PIXEL_BYTES
        if image.format == "WEBP":
            kind = "WebP"
            pixel_bytes = WEBP_PIXEL_BYTES
        if isinstance(image, JpegImageFile):  # also an MPO file of several pictures
            pixel_bytes = _jpeg_pixel_bytes(data, image)
        check_pixels(width, height, MAX_MEMORY // pixel_bytes, f"the {kind} image")
    return ImageFile(data, width, height, width * height * pixel_bytes)


def _jpeg_pixel_bytes(data: bytes, image: JpegImageFile) -> int:
    """Bytes of memory per pixel that decoding a JPEG takes; refuses one of too many scans."""
    # For a progressive JPEG, or if the first scan lacks a colour, libjpeg keeps two more bytes per
    # pixel and colour.
    scan = next((place for marker, place in _markers(data) if marker == _SCAN[1]), len(data))
    colours = data[scan + 2] if scan + 2 < len(data) else 0
    pixels = image.width * image.height
    max_scans = int(MAX_SCANS * min(1.0, LARGE_PIXELS / pixels))
    if data.count(_SCAN) > max_scans:
        scans = sum(marker == _SCAN[1] for marker, _ in _markers(data))
        if scans > max_scans:
            raise TaskError(
                IMAGE_TOO_LARGE,
                f"the JPEG has {scans} scans for its {pixels} pixels; at most {max_scans}"
                " are allowed",
            )
    if image.info.get("progressive") or colours < image.layers:
        return max(PIXEL_BYTES, 4 + 2 * image.layers)
    return PIXEL_BYTES


def read_headers(
    images: Sequence[bytes | ImageFile], others: Sequence[ImageFile] = ()
) -> list[ImageFile]:
    """Read the headers of a request's images; `others` of the request count towards its pixels."""
    files = []
    for number, image in enumerate(images, 1):
        try:
            files.append(read_header(image))
        except TaskError as error:
            if len(images) == 1:
                raise
            where = f"image {number} of {len(images)}"
            raise TaskError(error.code, f"{where}: {error.message}") from None
    together = [*files, *others]
    pixels = sum(file.width * file.height for file in together)
    if pixels > MAX_REQUEST_PIXELS:
        raise TaskError(
            IMAGE_TOO_LARGE,
            f"the {len(together)} images of the request have {pixels} pixels together; at most"
            f" {MAX_REQUEST_PIXELS} are allowed, so send fewer or smaller ones at once",
        )
    return files


def decode(data: bytes | ImageFile, *, exif_orientation: bool = True) -> Image.Image:
    """Decode a JPEG, PNG or WebP image, the first frame of an animation, in its own mode."""
    image = _open(read_header(data).data)
    with _broken():
        image.load()
    if exif_orientation:
        image = oriented(image)
    if image.mode.startswith("I"):  # Pillow cuts colours to their upper bits, but clips gray
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def verify(data: bytes) -> None:
    """Raise the errors of `decode` in less time: a JPEG is decoded at an eighth of its size."""
    file = read_header(data)
    image = _open(file.data)
    image.draft(None, (1, 1))
    with turn(file), _broken():
        image.load()


def without_heic(data: bytes) -> bytes:
    """Make a JPEG of a HEIC file, as the client does: for files of this machine, never for those of
    callers. Other files stay as they are.
    """
    try:
        return heic.without_heic(data)
    except ValueError as error:
        raise TaskError(INVALID_IMAGE, str(error)) from None


class _Reader(io.BytesIO):
    """A file that counts what Pillow reads of it, which is a bound on the work in its header."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._size = len(data)
        self._reads = MAX_READS  # that are left
        self._metadata = MAX_METADATA
        self._counted = 0  # reads of more bytes are metadata
        self._has_exif = False
        self._has_profile = False

    def opened(self) -> None:
        """Allow the reads of pixels, which come in small pieces."""
        self._reads += self._size // READ_BYTES
        self._counted = 2**16

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._reads -= 1
        if size is not None and size > self._counted:
            self._metadata -= len(data)
        if self._reads < 0:
            raise TaskError(IMAGE_TOO_LARGE, f"the image has its {_HEADER} in too many parts")
        if self._metadata < 0:
            raise TaskError(
                IMAGE_TOO_LARGE,
                f"the image has more than {MAX_METADATA} bytes of {_HEADER}",
            )
        # Pillow appends further EXIF to what there is, each time a copy: it sees zeros instead.
        if data.startswith(b"Exif\0\0"):
            if self._has_exif:
                return bytes(len(data))
            self._has_exif = True
        # Pillow unpacks every profile of a PNG, of which there is one at most.
        if len(data) == 8 and data.endswith(b"iCCP"):
            if self._has_profile:
                raise TaskError(INVALID_IMAGE, "the PNG has a second colour profile", ADVICE)
            self._has_profile = True
        return data


_HEADER = "header and metadata"


def _open(data: bytes) -> Image.Image:
    """Open an image file; only its header is read."""
    file = _Reader(data)
    image = Image.open(file, formats=FORMATS)
    file.opened()
    return image


@contextlib.contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except (TaskError, MemoryError):
        raise
    except Exception as error:
        # Pillow's decoders raise anything on broken files, from SyntaxError to struct.error. The
        # frames of contextlib hold the error: with its traceback it would keep them and the image.
        error.__traceback__ = None
        what = f"the image is broken or truncated ({error})"
        raise TaskError(INVALID_IMAGE, what, ADVICE) from None


def check_pixels(width: int, height: int, limit: int, what: str) -> None:
    """Refuse an image of too many pixels; `what` names the image in the error."""
    if width * height > limit:
        raise TaskError(
            IMAGE_TOO_LARGE,
            f"{what} has {width} x {height} = {width * height} pixels; at most {limit} are allowed",
        )


def _markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield a JPEG's markers up to its end, each with the position after it."""
    position = 2
    for _ in range(MAX_READS):
        match = _MARKER.search(data, position)
        if match is None or match[0][1] == _END:
            return
        position = match.end()
        yield match[0][1], position
        position += int.from_bytes(data[position : position + 2], "big")
    raise TaskError(IMAGE_TOO_LARGE, f"the JPEG has more than {MAX_READS} segments")


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a folder."""

    images: list[Path]  # folder by folder, sorted by name
    left_out: dict[str, int]  # number of other files, by suffix


def is_image_file(name: str) -> bool:
    """True if a file name has the suffix of a supported image format."""
    return name.lower().endswith(SUFFIXES)


def list_images(folder: Path) -> ImageFiles:
    """List the images in a folder and its subfolders; hidden files and folders are left out."""

    def refuse(error: OSError) -> None:  # os.walk would skip the folder silently
        raise RAdapterError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    images = []
    left_out: Counter[str] = Counter()
    seen = {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        # Enter each folder once: a link to a folder above would never end.
        entered = []
        for name in sorted(folders):
            real = os.path.realpath(Path(place, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                entered.append(name)
        folders[:] = entered
        for name in sorted(files):
            file = Path(place, name)
            if is_image_file(name) and not name.startswith("."):
                images.append(file)
            elif not name.startswith("."):
                left_out[file.suffix.lower()] += 1
    return ImageFiles(images, dict(left_out))


def require_images(folder: Path, wanted: str) -> ImageFiles:
    """`list_images`, but an error if there is none; `wanted` says what to give instead."""
    if not folder.is_dir():
        raise RAdapterError(f"{folder} is not a folder; give {wanted}")
    files = list_images(folder)
    if not files.images:
        has = f"; it has {count_kinds(files.left_out)}" if files.left_out else ""
        raise RAdapterError(
            f"{folder} holds no image; allowed are {', '.join(SUFFIXES)}, in any folder of it{has}"
        )
    return files


def count_kinds(left_out: Mapping[str, int]) -> str:
    """Numbers of files by suffix, the most frequent first: "3 .gif, 1 .txt"; and the commands that
    read or convert the photos of a phone, if there are any.
    """
    kinds = sorted(left_out.items(), key=lambda kind: (-kind[1], kind[0]))
    counts = ", ".join(f"{count:,} {suffix or 'without an ending'}" for suffix, count in kinds)
    if left_out.keys().isdisjoint(heic.SUFFIXES):
        return counts
    return f"{counts} (to read HEIC, {install_command('heic')}; or convert it: {CONVERT})"


def spread(items: Sequence[T], max_count: int) -> list[T]:
    """At most `max_count` items, evenly spaced."""
    count = min(len(items), max_count)
    return [items[number * len(items) // count] for number in range(count)]
