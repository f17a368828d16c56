"""Pictures of segmentations: labels in colour over the image, and a legend below it."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ._exceptions import bad_argument

# Colours that people with any colour vision tell apart: Okabe and Ito, "Color Universal Design"
# (2008), without black.
FIRST = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
)
COLOURS = 256  # before they repeat
# The last colours, from which the next one is to differ three times as much as from the others.
RECENT = 3
CLOSER = 3
LEAST_SIDE = 512  # px of the longer side of a picture with a legend, so that its text can be read
ENTRIES = 40  # of the legend at most; the rest is summed up in one
PAPER = (255, 255, 255)
INK = (32, 33, 36)
PALE = (110, 114, 120)


@lru_cache(maxsize=1)
def palette() -> npt.NDArray[np.uint8]:
    """The colours of labels, RGB [COLOURS, 3]: after the first ones, always the colour farthest
    from all before.
    """
    levels = np.linspace(0, 255, 12).round()
    known = np.concatenate(
        [FIRST, np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)]
    )
    lab = _lab(known)
    near = np.full(len(known), np.inf)
    near[(lab[:, 0] < 30) | (lab[:, 0] > 92)] = 0  # too dark or too light to be seen as a colour
    chosen: list[int] = []
    distances: list[npt.NDArray[np.float64]] = []
    for index in range(COLOURS):
        if index >= len(FIRST):
            index = int(np.minimum(near, np.min(distances[-RECENT:], 0) / CLOSER).argmax())
        chosen.append(index)
        distances.append(np.linalg.norm(lab - lab[index], axis=1))
        near = np.minimum(near, distances[-1])
    table: npt.NDArray[np.uint8] = known[chosen].astype(np.uint8)
    return table


def _lab(rgb: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """sRGB from 0 to 255 in CIE L*a*b*, where equal distances look about equally different."""
    linear = np.where(rgb > 10.3, ((rgb / 255 + 0.055) / 1.055) ** 2.4, rgb / 255 / 12.92)
    to_xyz = [[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]]
    xyz = linear @ np.array(to_xyz) / (0.9505, 1, 1.089)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def paint(
    image: Image.Image,
    mask: npt.NDArray[np.uint16],
    background: int | None,
    opacity: float,
    *,
    enlarge: bool,
) -> Image.Image:
    """An RGB image of the mask's size with each label but the background in its colour."""
    times = -(-LEAST_SIDE // max(image.size)) if enlarge else 1
    if times > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)
        mask = mask.repeat(times, 0).repeat(times, 1)
    painted = Image.fromarray(palette()[mask % COLOURS])
    picture = Image.blend(image, painted, opacity)
    picture.paste(painted, mask=_outlines(mask, max(1, round(max(image.size) / 600))))
    if background is not None:
        picture.paste(image, mask=Image.fromarray(mask == background))
    return picture


def _outlines(mask: npt.NDArray[np.uint16], width: int) -> Image.Image:
    """The pixels along the borders between labels, `width` pixels deep on either side, as an image
    of mode 1.
    """
    edges = np.zeros(mask.shape, np.bool_)
    for ours, theirs in ((edges, mask), (edges.T, mask.T)):
        differ = theirs[1:] != theirs[:-1]
        ours[1:] |= differ
        ours[:-1] |= differ
    if width == 1:
        return Image.fromarray(edges)
    wider = Image.fromarray(edges.view(np.uint8) * np.uint8(255)).filter(
        ImageFilter.BoxBlur(width - 1)
    )
    return wider.point([0] + [255] * 255, "1")


def add_legend(
    picture: Image.Image,
    labels: Sequence[str],
    shares: Sequence[float],
    background: int | None,
    path: str | os.PathLike[str] | None,
) -> Image.Image:
    """A painted image above the labels that occur in it, with their shares of the pixels."""
    size = max(14, round(max(picture.size) / 50))
    font = read_font(path, size)
    width = max(picture.width, 24 * size)
    gap = size // 2
    line = round(1.7 * size)
    # Colour, name and share, largest first; the background's swatch is the paper.
    table = palette()
    entries: list[tuple[tuple[int, ...] | None, str, str]] = []
    order = [index for index in np.argsort(shares, kind="stable")[::-1] if shares[index] > 0]
    for index in order[:ENTRIES]:
        swatch = PAPER if index == background else tuple(map(int, table[index % COLOURS]))
        entries.append((swatch, _spelled(labels[index], font), _percent(shares[index])))
    if rest := order[ENTRIES:]:
        total = sum(shares[index] for index in rest)
        entries.append((None, f"{len(rest)} more", _percent(total)))
    # Columns as wide as the widest entry, or one column in which long names are cut.
    wanted = [
        3 * gap + 2 * size + font.getlength(name) + font.getlength(share)
        for _, name, share in entries
    ]
    columns = max(1, int((width - 2 * size) // (max(wanted) + 2 * size)))
    column = (width - 2 * size) // columns
    rows = -(-len(entries) // columns)
    canvas = Image.new("RGB", (width, picture.height + rows * line + 2 * gap), PAPER)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(canvas)
    for index, (colour, name, share) in enumerate(entries):
        left = size + index // rows * column
        middle = picture.height + gap + index % rows * line + line // 2
        right = left + column - (2 * size if columns > 1 else 0)
        if colour is not None:
            box = (left, middle - size // 2, left + size, middle + size // 2)
            pen.rounded_rectangle(
                box, size // 5, fill=colour, outline=PALE, width=max(1, size // 16)
            )
        room = right - left - size - 2 * gap - font.getlength(share)
        pen.text((left + size + gap, middle), _cut(name, font, room), INK, font, anchor="lm")
        pen.text((right, middle), share, PALE, font, anchor="rm")
    return canvas


def _percent(share: float) -> str:
    return "< 0.1 %" if share < 0.001 else f"{share * 100:.1f} %"


def _spelled(name: str, font: ImageFont.FreeTypeFont) -> str:
    """The name in one line; what the font lacks without its accents, or else by code point: \\u732b
    for 猫.
    """
    lacking = font.getmask("\uffff")

    def has(text: str) -> bool:
        masks = map(font.getmask, text)
        return text != "" and all(
            mask.size != lacking.size or bytes(mask) != bytes(lacking) for mask in masks
        )

    def spell(character: str) -> str:
        if has(character):
            return character
        bare = "".join(
            part
            for part in unicodedata.normalize("NFKD", character)
            if not unicodedata.combining(part)
        )
        return bare if has(bare) else character.encode("ascii", "backslashreplace").decode()

    return (
        "".join(map(spell, unicodedata.normalize("NFC", " ".join(name.split())[:200])))
        or "(no name)"
    )


def _cut(name: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    if font.getlength(name) <= room:
        return name
    while name and font.getlength(f"{name}…") > room:
        name = name[:-1]
    return f"{name.rstrip()}…"


def read_font(path: str | os.PathLike[str] | None, size: int) -> ImageFont.FreeTypeFont:
    """The font of a file, or Pillow's own; `size` in px."""
    try:
        # Either way lays characters side by side; the basic one never fails on a script.
        layout = ImageFont.Layout.BASIC
        font = (
            ImageFont.load_default(size)
            if path is None
            else ImageFont.truetype(path, size, layout_engine=layout)
        )
    except OSError as error:
        raise bad_argument(
            f"cannot read the font {path}: {error}; allowed are TrueType and OpenType files"
        ) from error
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
