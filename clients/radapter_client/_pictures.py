"""Pictures of segmentations: labels in colour over the image, and a legend below it."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .failures import bad_argument

# Colours that can be told apart with any colour vision: Okabe and Ito, "Color Universal Design"
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
COLOURS = 256  # number of colours before they repeat
# A colour has to be three times as far from the last three colours as from the earlier ones.
RECENT = 3
CLOSER = 3
LEAST_SIDE = 512  # least px of the longer side with a legend, so that its text is readable
ENTRIES = 40  # most entries of the legend; a last line sums up the rest
PAPER = (255, 255, 255)
INK = (32, 33, 36)
PALE = (110, 114, 120)


@lru_cache(maxsize=1)
def palette() -> npt.NDArray[np.uint8]:
    """The colours of labels, RGB [COLOURS, 3]; each new one is the farthest from those before."""
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
    """Convert sRGB from 0 to 255 to CIE L*a*b*, where distance approximates visible difference."""
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
    """Blend the colours of all labels but the background into an image of the mask's size."""
    times = -(-LEAST_SIDE // max(image.size)) if enlarge else 1
    if times > 1:
        image = image.resize((image.width * times, image.height * times))
        mask = mask.repeat(times, 0).repeat(times, 1)
    painted = Image.fromarray(palette()[mask % COLOURS])
    picture = Image.blend(image, painted, opacity)
    # Outlines: the borders between labels, some pixels wide
    edges = np.zeros(mask.shape, np.bool_)
    for ours, theirs in ((edges, mask), (edges.T, mask.T)):
        differ = theirs[1:] != theirs[:-1]
        ours[1:] |= differ
        ours[:-1] |= differ
    outlines = Image.fromarray(edges)
    depth = max(1, round(max(image.size) / 600))
    if depth > 1:
        blurred = outlines.convert("L").filter(ImageFilter.BoxBlur(depth - 1))
        outlines = blurred.point([0] + [255] * 255, "1")
    picture.paste(painted, mask=outlines)
    if background is not None:
        picture.paste(image, mask=Image.fromarray(mask == background))
    return picture


def add_legend(
    picture: Image.Image,
    labels: Sequence[str],
    shares: Sequence[float],
    background: int | None,
    path: str | os.PathLike[str] | None,
) -> Image.Image:
    """Add a list of the labels that occur, with their shares of the pixels, below the picture."""
    size = max(14, round(max(picture.size) / 50))
    try:
        # Both layouts place characters side by side; the basic one fails on no script.
        if path is None:
            font = ImageFont.load_default(size)
        else:
            font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise bad_argument(
            f"cannot read the font {path}: {error}; allowed are TrueType and OpenType files"
        ) from error
    assert isinstance(font, ImageFont.FreeTypeFont)
    width = max(picture.width, 24 * size)
    gap = size // 2
    line = round(1.7 * size)
    # Entries by colour, name and share, largest first; the background has the paper's colour.
    table = palette()
    entries: list[tuple[tuple[int, ...] | None, str, str]] = []
    order = [index for index in np.argsort(shares, kind="stable")[::-1] if shares[index] > 0]
    for index in order[:ENTRIES]:
        swatch = PAPER if index == background else tuple(map(int, table[index % COLOURS]))
        entries.append((swatch, _spelled(labels[index], font), _percent(shares[index])))
    if rest := order[ENTRIES:]:
        total = sum(shares[index] for index in rest)
        entries.append((None, f"{len(rest)} more", _percent(total)))
    column = min(width - 2 * size, 30 * size)
    canvas = Image.new("RGB", (width, picture.height + len(entries) * line + 2 * gap), PAPER)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(canvas)
    left = size
    right = left + column
    for row, (colour, name, share) in enumerate(entries):
        middle = picture.height + gap + row * line + line // 2
        if colour is not None:
            box = (left, middle - size // 2, left + size, middle + size // 2)
            pen.rounded_rectangle(
                box, size // 5, fill=colour, outline=PALE, width=max(1, size // 16)
            )
        room = column - size - 2 * gap - font.getlength(share)
        if font.getlength(name) > room:
            while name and font.getlength(f"{name}…") > room:
                name = name[:-1]
            name = f"{name.rstrip()}…"
        pen.text((left + size + gap, middle), name, INK, font, anchor="lm")
        pen.text((right, middle), share, PALE, font, anchor="rm")
    return canvas


def _percent(share: float) -> str:
    return "< 0.1 %" if share < 0.001 else f"{share * 100:.1f} %"


def _spelled(name: str, font: ImageFont.FreeTypeFont) -> str:
    """The name on one line; characters that the font lacks as code points: \\u732b for 猫."""
    lacking = font.getmask("\uffff")

    def spell(character: str) -> str:
        mask = font.getmask(character)
        if mask.size != lacking.size or bytes(mask) != bytes(lacking):
            return character
        return character.encode("ascii", "backslashreplace").decode()

    text = unicodedata.normalize("NFC", " ".join(name.split())[:200])
    return "".join(map(spell, text)) or "(no name)"
