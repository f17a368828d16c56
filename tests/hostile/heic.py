"""HEIC files, written box by box."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from PIL import Image

from tests.hostile.images import saved


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + kind + body


def full_box(kind: bytes, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(kind, struct.pack(">I", version << 24 | flags), *parts)


def hevc(side: int) -> tuple[bytes, bytes]:
    """The box that describes a grey square, and its pixels."""
    data = saved(Image.new("RGB", (side, side), (100, 100, 100)), "HEIF", quality=10)
    place = data.index(b"hvcC") - 4
    (length,) = struct.unpack_from(">I", data, place)
    return data[place : place + length], data[data.index(b"mdat") + 4 :]


def size_box(side: int) -> bytes:
    return full_box(b"ispe", struct.pack(">II", side, side))


DEPTH = full_box(b"pixi", b"\x03\x08\x08\x08")
TURN = box(b"irot", b"\x01")

# Kind, pieces in the data as (start, length), numbers of properties, and what follows the kind
Item = tuple[bytes, Sequence[tuple[int, int]], Sequence[int], bytes]


def build(
    items: Sequence[Item],
    properties: Sequence[bytes],
    data: bytes,
    references: Sequence[tuple[bytes, int, Sequence[int]]] = (),
) -> bytes:
    """A file of items, numbered from 1; the first is the picture to show."""

    def meta(base: int) -> bytes:
        infos = []
        places = []
        uses = []
        for number, (kind, pieces, used, tail) in enumerate(items, 1):
            name = struct.pack(">HH", number, 0) + kind + b"\0" + tail
            infos.append(full_box(b"infe", name, version=2))
            places.append(struct.pack(">HHHH", number, 0, 0, len(pieces)))
            places += [struct.pack(">II", base + start, length) for start, length in pieces]
            uses.append(struct.pack(">HB", number, len(used)))
            uses += [struct.pack(">H", 0x8000 | use) for use in used]
        count = struct.pack(">H", len(items))
        lists = [
            box(kind, struct.pack(f">{2 + len(others)}H", number, len(others), *others))
            for kind, number, others in references
        ]
        associations = full_box(b"ipma", struct.pack(">I", len(items)), *uses, flags=1)
        return full_box(
            b"meta",
            full_box(b"hdlr", bytes(4), b"pict", bytes(13)),
            full_box(b"pitm", b"\0\x01"),
            full_box(b"iloc", b"\x44\x00", count, *places, version=1),
            full_box(b"iinf", count, *infos),
            box(b"iprp", box(b"ipco", *properties), associations),
            full_box(b"iref", *lists) if lists else b"",
        )

    head = box(b"ftyp", b"heic", bytes(4), b"mif1heic")
    base = len(head) + len(meta(0)) + 8
    return head + meta(base) + box(b"mdat", data)


def grid(count: int, tile: int, side: int) -> bytes:
    """A picture of `count` x `count` tiles that are all the same."""
    description, pixels = hevc(tile)
    head = struct.pack(">BBBBII", 0, 1, count - 1, count - 1, side, side)
    items: list[Item] = [
        (b"grid", [(len(pixels), len(head))], [2], b""),
        (b"hvc1", [(0, len(pixels))], [1, 3, 4], b""),
    ]
    properties = [description, size_box(side), size_box(tile), DEPTH]
    tiles = [(b"dimg", 1, [2] * count**2)]
    return build(items, properties, pixels + head, tiles)


def turned(times: int, side: int, *, pictures: int = 1) -> bytes:
    description, pixels = hevc(side)
    used = [1, 2, 3, *[4] * times]
    items: list[Item] = [(b"hvc1", [(0, len(pixels))], used, b"")] * pictures
    return build(items, [description, size_box(side), DEPTH, TURN], pixels)


def derived(count: int, kind: bytes, side: int) -> bytes:
    """A picture that is made from one that is made from the next, `count` times."""
    description, pixels = hevc(side)
    head = struct.pack(">BBBBII", 0, 1, 0, 0, side, side)
    pieces = [(len(pixels), len(head) if kind == b"grid" else 0)]
    items: list[Item] = [(kind, pieces, [2, 4], b"")] * count
    items.append((b"hvc1", [(0, len(pixels))], [1, 2, 3], b""))
    chain = [(b"dimg", number, [number + 1]) for number in range(1, count + 1)]
    return build(items, [description, size_box(side), DEPTH, TURN], pixels + head, chain)


def noted(pictures: int, length: int, pieces: int = 1, *, profile: int = 0) -> bytes:
    """Pictures of one Exif and one colour profile of so many bytes."""
    description, pixels = hevc(64)
    exif = bytes(4) + b"Exif\0\0II*\0\x08\0\0\0\0\0" + bytes(length)
    items: list[Item] = [(b"hvc1", [(0, len(pixels))], [1, 2, 3, 4], b"")] * pictures
    items.append((b"Exif", [(len(pixels), len(exif))] * pieces, [], b""))
    profiles = box(b"colr", b"prof", bytes(profile))
    about = [(b"cdsc", pictures + 1, range(1, pictures + 1))]
    return build(items, [description, size_box(64), DEPTH, profiles], pixels + exif, about)
