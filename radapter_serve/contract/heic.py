"""What decoding a HEIC file takes, read from its boxes before libheif sees it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from radapter_serve.contract.errors import IMAGE_TOO_LARGE, TaskError

MAX_BOXES = 5000  # a phone's photo of 48 megapixels has about 500
MAX_LISTS = 2**18  # bytes of the lists of parts, and of their properties, references and pieces
MAX_PIECES = 32  # of a part
MAX_TURNS = 3  # of a picture: rotated, mirrored and cropped
# Bytes of Exif, XMP and profiles, times pictures: pillow-heif copies them for each picture.
MAX_NOTES = 8 * 2**20
SPARE_PIXELS = 4 * 2**20  # of tiles, besides twice the pixels of their picture
_PICTURES = (b"hvc1", b"hev1", b"grid")
_NOTES = (b"Exif", b"mime", b"uri ")
_IGNORED = b"tmap"  # how a bright screen shows the photo; libheif leaves it out
_TURNS = (b"irot", b"imir", b"clap")
# Boxes that hold boxes, and the number of bytes before those
_HOLDERS = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"iinf": 6, b"iref": 4}


@dataclass
class _Part:
    """A picture, a tile or a note."""

    kind: bytes = b""
    is_hidden: bool = False  # as tiles are
    length: int = 0  # in bytes
    properties: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)


@dataclass
class _Numbers:
    """The numbers of a box, one after the other."""

    data: bytes
    place: int

    def next(self, width: int) -> int:
        """The next number, which has `width` bytes."""
        self.place += width
        if self.place > len(self.data):
            raise ValueError("a box is longer than the file")
        return int.from_bytes(self.data[self.place - width : self.place], "big")


def largest_picture(data: bytes) -> tuple[int, int]:
    """Width and height of the largest picture or tile in a HEIC file. A `TaskError` refuses a file
    that takes more time or memory than its pictures explain.
    """
    parts: dict[int, _Part] = defaultdict(_Part)
    sizes: dict[int, tuple[int, int]] = {}  # of pictures, by number of the property
    turns = set()  # numbers of properties
    count_properties = 0
    lists = 0  # bytes
    notes = 0  # bytes
    number_width = 2  # of a part in a list of references
    boxes = _boxes(data, 0, len(data))
    for count_boxes, (kind, holder, start, end) in enumerate(boxes, 1):
        if count_boxes > MAX_BOXES:
            raise _refused(f"has more than {MAX_BOXES} boxes")
        if kind in (b"infe", b"ipma", b"iloc") or holder == b"iref":
            lists += end - start
            if lists > MAX_LISTS:
                raise _refused(f"has lists of more than {MAX_LISTS} bytes")
        numbers = _Numbers(data, start)
        if holder == b"ipco":
            count_properties += 1
            if kind == b"ispe":
                numbers.next(4)
                sizes[count_properties] = (numbers.next(4), numbers.next(4))
            elif kind == b"colr":
                notes += end - start
            elif kind in _TURNS:
                turns.add(count_properties)
        elif kind == b"iref":
            number_width = 4 if numbers.next(1) else 2
        elif holder == b"iref":
            part = parts[numbers.next(number_width)]
            others = [numbers.next(number_width) for _ in range(numbers.next(2))]
            if kind == b"dimg":
                part.tiles += others
        elif kind == b"infe":
            version = numbers.next(1)
            flags = numbers.next(3)
            part = parts[numbers.next(2 if version == 2 else 4)]
            numbers.next(2)
            part.kind = numbers.next(4).to_bytes(4, "big")
            part.is_hidden = flags & 1 == 1
        elif kind == b"ipma":
            # The properties of each part
            version = numbers.next(1)
            flags = numbers.next(3)
            for _ in range(numbers.next(4)):
                part = parts[numbers.next(4 if version else 2)]
                for _ in range(numbers.next(1)):
                    # The first bit says whether a reader must know the property.
                    number = numbers.next(2) & 0x7FFF if flags & 1 else numbers.next(1) & 0x7F
                    part.properties.append(number)
        elif kind == b"iloc":
            # The pieces of the file that make each part
            version = numbers.next(1)
            numbers.next(3)
            widths = numbers.next(2)
            for _ in range(numbers.next(4 if version == 2 else 2)):
                part = parts[numbers.next(4 if version == 2 else 2)]
                numbers.next((4 if version else 2) + (widths >> 4 & 15))
                pieces = numbers.next(2)
                if pieces > MAX_PIECES:
                    raise _refused(f"has an item in {pieces} pieces; at most {MAX_PIECES}")
                for _ in range(pieces):
                    numbers.next((widths & 15 if version else 0) + (widths >> 12))
                    part.length += numbers.next(widths >> 8 & 15)

    pixels = {0: 0}  # of the largest size that a part has
    for number, part in parts.items():
        areas = [sizes[size][0] * sizes[size][1] for size in part.properties if size in sizes]
        pixels[number] = max(areas, default=0)
    if sum(part.length for part in parts.values()) > len(data):
        raise _refused("has items of more bytes than the file")
    pictures = 0
    for number, part in parts.items():
        if part.kind in _NOTES:
            notes += part.length
        elif part.kind in _PICTURES:
            pictures += not part.is_hidden
            count = sum(turn in turns for turn in part.properties)
            if count > MAX_TURNS:
                raise _refused(f"turns or crops a picture {count} times; at most {MAX_TURNS}")
            if any(tile in parts and parts[tile].kind == b"grid" for tile in part.tiles):
                raise _refused("has tiles of tiles")
            tile_pixels = sum(pixels.get(tile, 0) for tile in part.tiles)
            if tile_pixels > 2 * pixels[number] + SPARE_PIXELS:
                raise _refused(f"has tiles of {tile_pixels} pixels for a smaller picture")
        elif part.kind not in (b"", _IGNORED):
            raise _refused(f"is of parts that no phone writes: {part.kind.decode('latin-1')!r}")
    if notes * pictures > MAX_NOTES:
        raise _refused(
            f"has {notes} bytes of Exif, XMP and profiles for {pictures} pictures; at most"
            f" {MAX_NOTES // pictures} are allowed"
        )
    return max(sizes.values(), key=lambda size: size[0] * size[1], default=(0, 0))


def _boxes(
    data: bytes, start: int, end: int, holder: bytes = b""
) -> Iterator[tuple[bytes, bytes, int, int]]:
    """Kind, holder, start and end of each box, those that others hold included."""
    while start + 8 <= end:
        numbers = _Numbers(data, start)
        length = numbers.next(4)
        kind = numbers.next(4).to_bytes(4, "big")
        if length == 1:
            length = numbers.next(8)
        stop = start + length if length else end
        if stop > end or stop < numbers.place:
            raise ValueError("a box is longer than the file")
        yield kind, holder, numbers.place, stop
        if kind in _HOLDERS:
            yield from _boxes(data, numbers.place + _HOLDERS[kind], stop, kind)
        start = stop


def _refused(what: str) -> TaskError:
    return TaskError(IMAGE_TOO_LARGE, f"the HEIC file {what}")
