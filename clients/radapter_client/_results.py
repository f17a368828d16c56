"""The results of the client's methods."""

from __future__ import annotations

import json
import os
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ._images import ImageLike, read_image
from .failures import ServerError, bad_argument, shown


class _Brief(reprlib.Repr):
    """Shortens long lists, and shows four digits of a number."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxdict = 2
        self.maxstring = self.maxother = 24

    def repr_float(self, number: float, level: int) -> str:
        return f"{number:.4g}"


class _OneLine:
    """A dataclass whose repr is one short line."""

    def __repr__(self) -> str:
        shown = [part for part in fields(self) if part.repr]  # type: ignore[arg-type]
        brief = _Brief()
        values = [f"{part.name}={brief.repr(getattr(self, part.name))}" for part in shown]
        return f"{type(self).__name__}({', '.join(values)})"


@dataclass(frozen=True)
class Receipt:
    """What an answer was computed with, as the server says; the client has compared it with what
    was asked.

    Args:
        release: version of the release.
        adapter: name of the adapter beside the release; None for the release itself.
        alpha: of the adapter if there is one, else of the release, in [0, 1].
        mapped: recall@10 of an index that was mapped from another image tower (`radapter-index
            map`), in [0, 1]; None of any other index and task.

    Example: `client.classify("cat.jpg", ["a cat"], adapter="anna").receipt.adapter`
    """

    release: int
    adapter: str | None
    alpha: float
    mapped: float | None = None

    @classmethod
    def read(cls, text: str) -> Receipt:
        """Read a receipt in JSON."""
        facts = json.loads(text)
        adapter = facts["adapter"]
        if not (adapter is None or (isinstance(adapter, str) and adapter)):
            raise ValueError(f"the receipt names the adapter {adapter!r:.80}")
        mapped = facts.get("mapped")
        return cls(
            int(facts["release"]),
            adapter,
            float(facts["alpha"]),
            None if mapped is None else float(mapped),
        )


@dataclass(frozen=True, repr=False)
class Classification(_OneLine):
    """The best labels of one image.

    Args:
        labels: best first; empty if no label of `multi_label` reached the threshold.
        scores: of these labels, in [0, 1]; over all labels of the request they sum to 1, unless the
            model was trained with a sigmoid or `multi_label` scores each label by itself.
        release: version of the release that answered.
        receipt: release, adapter and alpha; None of a server that is older than adapters.

    Example: `client.classify("cat.jpg", ["a cat", "a dog"]).top` is "a cat".
    """

    labels: list[str]
    scores: list[float]
    release: int
    receipt: Receipt | None = field(default=None, repr=False)

    @property
    def top(self) -> str:
        """The best label; "" if there is none."""
        return self.labels[0] if self.labels else ""


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation(_OneLine):
    """The labels of one image's pixels.

    Args:
        mask: uint16 [H, W], index into `labels`; H and W are the image's own, turned by its EXIF
            orientation unless the release says otherwise.
        labels: the request's labels, followed by "background" where a threshold or proposals were
            given.
        scores: of each label, in [0, 1]: the mean probability over its pixels, 0 where it has none.
        release: version of the release that answered.
        background: index of the background in `labels`; None without a threshold and proposals.
        image: the segmented image, for `overlay`.
        exif_orientation: True if the release turns images by their EXIF orientation.
        receipt: as of a `Classification`.

    Example: `client.segment("street.jpg", ["road", "car", "sky"]).overlay().save("overlay.png")`
    """

    mask: npt.NDArray[np.uint16] = field(repr=False)
    labels: list[str]
    scores: list[float]
    release: int
    background: int | None = None
    image: ImageLike | None = field(default=None, repr=False)
    exif_orientation: bool = True
    receipt: Receipt | None = field(default=None, repr=False)

    @cached_property
    def shares(self) -> list[float]:
        """Share of the pixels with each label, in [0, 1], in the order of `labels`."""
        pixels = np.bincount(self.mask.ravel(), minlength=len(self.labels))
        return [float(share) for share in pixels / self.mask.size]

    def overlay(
        self,
        image: ImageLike | None = None,
        *,
        opacity: float = 0.5,
        legend: bool = True,
        font: str | os.PathLike[str] | None = None,
    ) -> Image.Image:
        """Draw the labels over the image in colour; a label has the same colour in every image, and
        the background has no colour.

        Args:
            image: to draw on, of the mask's size; None for the segmented image.
            opacity: of the colours, in [0, 1]; outlines are always opaque.
            legend: list the labels that occur, with their share of the pixels, below the image; a
                small image is enlarged to fit. Without a legend, the result has the mask's size.
            font: TrueType or OpenType file for labels beyond the Latin alphabet, which are
                otherwise written as code points.

        Raises:
            InvalidImage: the image cannot be read, or no longer.
            InvalidRequest: the image has another size, the opacity is outside [0, 1], or the font
                cannot be read.
        """
        chosen = self.image if image is None else image
        if chosen is None:
            raise bad_argument("no image to draw on: give overlay(image)")
        if not 0 <= opacity <= 1:
            raise bad_argument(f"opacity is {shown(opacity)}; allowed are numbers from 0 to 1")
        picture = read_image(chosen, exif_orientation=self.exif_orientation)
        height, width = self.mask.shape
        if picture.size != (width, height):
            raise bad_argument(
                f"an image of {picture.width} x {picture.height} pixels for a mask of {width} x"
                f" {height}"
            )
        painted = paint(picture, self.mask, self.background, opacity, enlarge=legend)
        if not legend:
            return painted
        return add_legend(painted, self.labels, self.shares, self.background, font)


@dataclass(frozen=True, repr=False)
class Hit(_OneLine):
    """An image of an index that a search found.

    Args:
        id: its name in the index.
        score: cosine with the query, in [-1, 1].
        metadata: the index's columns for this image, by name.
        thumbnail: bytes of a JPEG file, if the search asked for thumbnails and the index has one.

    Example: `[(hit.id, hit.score) for hit in client.search("a red bicycle", index="photos")]`
    """

    id: str
    score: float
    metadata: dict[str, Any]
    thumbnail: bytes | None = field(default=None, repr=False)

    @property
    def about(self) -> dict[str, Any]:
        """The metadata worth showing: without empty values, the path, which equals the id, and the
        file's digest.
        """
        return {
            name: value
            for name, value in self.metadata.items()
            if name not in ("path", "digest") and value is not None
        }


class Hits(list[Hit]):
    """The hits of a search, best first: a list of `Hit`.

    Attributes:
        index_version: version of the searched index, for the next pages; None if the search gave
            neither `offset` nor `index_version`.
        receipt: as of a `Classification`.

    Example: `client.search("a cat", index="photos", offset=0).index_version`
    """

    index_version: str | None = None
    receipt: Receipt | None = None

    def __repr__(self) -> str:
        best = f", best {self[0].id!r:.60} {self[0].score:.4f}" if self else ""
        return f"<{len(self)} hits{best}>"


@dataclass(frozen=True, repr=False)
class Release(_OneLine):
    """The facts of a served release.

    Args:
        version: integer that all models of the release share.
        alpha: the adapter's weight, in [0, 1]; 0 is the untouched base.
        dynamic_alpha: True if requests may give another alpha.
        embed_dim: width D of the embeddings.
        logit_scale: factor on the cosine before the softmax.
        templates: the prompt templates for requests without any.
        label_sets: facts of each label set that `classify` knows, by name.
        facts: the whole of its release.json.

    Example: `client.release().alpha`
    """

    version: int
    alpha: float
    dynamic_alpha: bool
    architecture: str
    precision: str
    embed_dim: int = field(repr=False)
    logit_scale: float = field(repr=False)
    templates: list[str] = field(repr=False)
    label_sets: dict[str, Any] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)

    @property
    def exif_orientation(self) -> bool:
        """True if the release turns images by their EXIF orientation before it embeds them."""
        preprocess = self.facts.get("preprocess")
        return not isinstance(preprocess, dict) or bool(preprocess.get("exif_orientation", True))


def read_releases(config: Mapping[str, Any]) -> list[Release]:
    """Read the releases in the parameters of a model's configuration, oldest first."""
    texts = {
        key: value.get("string_value", "") for key, value in config.get("parameters", {}).items()
    }
    keys = [key for key in texts if key.startswith("release.")]
    if not keys:
        raise ServerError(
            "the server says nothing of its release: its models were not written by radapter-export"
        )
    releases = []
    for key in keys:
        facts = json.loads(texts[key])
        release = Release(
            version=int(facts["version"]),
            alpha=float(facts["alpha"]),
            dynamic_alpha=bool(facts.get("dynamic_alpha", False)),
            architecture=str(facts["architecture"]),
            precision=str(facts["precision"]),
            embed_dim=int(facts["embed_dim"]),
            logit_scale=float(facts["logit_scale"]),
            templates=[str(template) for template in facts["templates"]],
            label_sets=dict(facts["label_sets"]),
            facts=facts,
        )
        releases.append(release)
    return sorted(releases, key=lambda release: release.version)


# Pictures of segmentations: labels in colour over the image, and a legend below it

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
