"""Pictures of segmentations: labels in colour over the image, and a legend below it."""

from __future__ import annotations

import colorsys
import os
import unicodedata
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ._exceptions import InvalidRequest

if TYPE_CHECKING:
    from ._results import Segmentation

# Colours that people with any colour vision tell apart: Okabe and Ito, "Color Universal Design" (2008), without black.
FIRST = ((86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66), (0, 114, 178), (213, 94, 0))
GOLDEN = 0.618034  # of a turn: the hues that follow stay far from those before
LEAST_SIDE = 512  # px of the longer side of a picture with a legend, so that its text can be read
ENTRIES = 40  # of the legend at most; the rest is summed up in one
PAPER, INK, PALE = (255, 255, 255), (32, 33, 36), (110, 114, 120)


def colours(count: int) -> npt.NDArray[np.uint8]:
    """The colours of labels 0 to count - 1, RGB [count, 3]."""
    table = [FIRST[index] if index < len(FIRST) else _colour(index) for index in range(count)]
    return np.array(table, np.uint8).reshape(-1, 3)


def _colour(index: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb(index * GOLDEN % 1, (0.35, 0.55, 0.75)[index % 3], 0.7)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw(
    image: Image.Image,
    found: Segmentation,
    opacity: float,
    legend: bool,
    font: str | os.PathLike[str] | None,
) -> Image.Image:
    """See Segmentation.overlay; `image` is RGB and of the mask's size."""
    mask, table = found.mask, colours(len(found.labels))
    times = -(-LEAST_SIDE // max(image.size)) if legend else 1
    if times > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)
        mask = mask.repeat(times, 0).repeat(times, 1)
    painted = Image.fromarray(table[mask])
    picture = Image.blend(image, painted, opacity)
    picture.paste(painted, mask=_outlines(mask, max(1, round(max(image.size) / 600))))
    if found.background is not None:
        picture.paste(image, mask=Image.fromarray(mask == found.background))
    return _with_legend(picture, found, table, font) if legend else picture


def _outlines(mask: npt.NDArray[np.uint16], width: int) -> Image.Image:
    """The pixels along the borders between labels, `width` pixels deep on either side, as an image of mode 1."""
    edges = np.zeros(mask.shape, np.bool_)
    for ours, theirs in ((edges, mask), (edges.T, mask.T)):
        differ = theirs[1:] != theirs[:-1]
        ours[1:] |= differ
        ours[:-1] |= differ
    if width == 1:
        return Image.fromarray(edges)
    wider = Image.fromarray(edges.view(np.uint8) * np.uint8(255)).filter(ImageFilter.BoxBlur(width - 1))
    return wider.point([0] + [255] * 255, "1")


def _with_legend(
    picture: Image.Image, found: Segmentation, table: npt.NDArray[np.uint8], path: str | os.PathLike[str] | None
) -> Image.Image:
    size = max(14, round(max(picture.size) / 50))
    font = read_font(path, size)
    width, gap, line = max(picture.width, 24 * size), size // 2, round(1.7 * size)
    entries = _entries(found, table, font)
    # Columns as wide as the widest entry, or one column in which long names are cut.
    wanted = [3 * gap + 2 * size + font.getlength(name) + font.getlength(share) for _, name, share in entries]
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
            pen.rounded_rectangle(box, size // 5, fill=colour, outline=PALE, width=max(1, size // 16))
        room = right - left - size - 2 * gap - font.getlength(share)
        pen.text((left + size + gap, middle), _cut(name, font, room), INK, font, anchor="lm")
        pen.text((right, middle), share, PALE, font, anchor="rm")
    return canvas


Entry = tuple["tuple[int, ...] | None", str, str]


def _entries(found: Segmentation, table: npt.NDArray[np.uint8], font: ImageFont.FreeTypeFont) -> list[Entry]:
    """Colour, name and share of the labels that occur, largest first; the background's swatch is the paper."""
    order = [index for index in np.argsort(found.shares, kind="stable")[::-1] if found.shares[index] > 0]
    entries: list[Entry] = []
    for index in order[:ENTRIES]:
        colour = PAPER if index == found.background else tuple(map(int, table[index]))
        entries.append((colour, _spelled(found.labels[index], font), _percent(found.shares[index])))
    if rest := order[ENTRIES:]:
        entries.append((None, f"{len(rest)} more", _percent(sum(found.shares[index] for index in rest))))
    return entries


def _percent(share: float) -> str:
    return "< 0.1 %" if share < 0.001 else f"{share * 100:.1f} %"


def _spelled(name: str, font: ImageFont.FreeTypeFont) -> str:
    """The name in one line; what the font lacks without its accents, or else by code point: \\u732b for 猫."""
    lacking = font.getmask("\uffff")

    def has(text: str) -> bool:
        masks = map(font.getmask, text)
        return text != "" and all(mask.size != lacking.size or bytes(mask) != bytes(lacking) for mask in masks)

    def spell(character: str) -> str:
        if has(character):
            return character
        bare = "".join(part for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part))
        return bare if has(bare) else character.encode("ascii", "backslashreplace").decode()

    return "".join(map(spell, unicodedata.normalize("NFC", " ".join(name.split())[:200]))) or "(no name)"


def _cut(name: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    if font.getlength(name) <= room:
        return name
    while name and font.getlength(f"{name}…") > room:
        name = name[:-1]
    return f"{name.rstrip()}…"


def read_font(path: str | os.PathLike[str] | None, size: int) -> ImageFont.FreeTypeFont:
    """The font of a file, or Pillow's own; `size` in px."""
    try:
        # Characters stand side by side in either way; the basic one never fails on a script.
        layout = ImageFont.Layout.BASIC
        font = ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size, layout_engine=layout)
    except OSError as error:
        why = f"cannot read the font {path}: {error}; allowed are TrueType and OpenType files"
        raise InvalidRequest(why, code="invalid_argument") from error
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
