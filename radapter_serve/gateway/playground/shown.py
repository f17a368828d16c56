"""Answers as HTML. All that a caller, an index or a release says is escaped; pictures stand in the HTML itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from html import escape

import numpy as np
import numpy.typing as npt

from radapter_client import Classification, Hit, Release, Segmentation
from radapter_serve.inputs.preprocess import decode

LONGEST = 1024  # px of the longer side of a picture that is shown, without its legend


def header(release: Release) -> str:
    """Which release answers."""
    alpha = "any α, " if release.dynamic_alpha else "α = "
    alpha += f"{release.alpha:g} by default" if release.dynamic_alpha else f"{release.alpha:g}"
    name = release.architecture.rpartition("/")[2]  # of a base that is a folder, the visitor is told no path
    facts = [f"release {release.version}", name, release.precision, alpha]
    return "".join(f'<span class="fact">{escape(fact)}</span>' for fact in facts)


def why_no_slider(release: Release) -> str:
    """Why α cannot be moved; empty where it can."""
    if release.dynamic_alpha:
        return ""
    return (
        f'<p class="note">α is {release.alpha:g} in this release, for good. To move it here, serve a release of '
        "<code>radapter-export --alpha dynamic</code>.</p>"
    )


def wrong(error: Exception) -> str:
    """Why there is no answer."""
    return f'<p class="wrong">{escape(str(error))}</p>'


def took(seconds: float, release: Release) -> str:
    """How long an answer took, and who gave it."""
    return f'<p class="took">{seconds * 1000:.0f} ms · release {release.version} · {escape(release.precision)}</p>'


def scores(found: Classification) -> str:
    """Labels with bars as long as their scores."""
    rows = (
        f'<div class="score"><span class="name">{escape(label)}</span>'
        f'<span class="bar"><i style="width:{100 * score:.2f}%"></i></span>'
        f'<span class="number">{100 * score:.1f} %</span></div>'
        for label, score in zip(found.labels, found.scores, strict=True)
    )
    return f'<div class="scores">{"".join(rows)}</div>'


def gallery(hits: Sequence[Hit]) -> str:
    """Thumbnails with their scores and names, best first."""
    cards = []
    for hit in hits:
        about = ", ".join([hit.id, *(f"{name}: {value}" for name, value in hit.about.items())])
        file = hit.id.rstrip("/").rpartition("/")[2]  # the rest stands in the title
        data = None if hit.thumbnail is None else base64.b64encode(hit.thumbnail).decode()
        image = f'<img src="data:image/jpeg;base64,{data}" alt="">' if data else '<div class="none">no thumbnail</div>'
        cards.append(
            f'<figure title="{escape(about)}">{image}<figcaption><b>{hit.score:.3f}</b> {escape(file)}</figcaption>'
            "</figure>"
        )
    return f'<div class="gallery">{"".join(cards)}</div>' if cards else '<p class="note">The index is empty.</p>'


def smaller(found: Segmentation) -> Segmentation:
    """A segmentation of which no side of the mask is above `LONGEST`: to draw, 64 million pixels take a gigabyte."""
    height, width = found.mask.shape
    longest = max(height, width)
    if longest <= LONGEST:
        return found

    def kept(side: int) -> npt.NDArray[np.intp]:
        count = max(1, side * LONGEST // longest)
        return np.arange(count) * side // count

    return replace(found, mask=found.mask[np.ix_(kept(height), kept(width))])


def segments(found: Segmentation, file: bytes) -> str:
    """The picture with its labels in colour, and their legend.

    Args:
        found: of `smaller`.
        file: of the picture.
    """
    height, width = found.mask.shape
    original = decode(file, exif_orientation=found.exif_orientation)
    if original.mode in ("P", "1"):  # which are not resized smoothly
        original = original.convert("RGBA")
    picture, drawn = found.overlay(original.resize((width, height))), io.BytesIO()
    picture.save(drawn, "PNG" if picture.width * picture.height < 2**18 else "JPEG", quality=90)
    kind = "png" if drawn.getvalue().startswith(b"\x89PNG") else "jpeg"
    data = base64.b64encode(drawn.getvalue()).decode()
    named = ", ".join(found.labels[index] for index in range(len(found.labels)) if found.shares[index] > 0)
    return f'<img class="segments" src="data:image/{kind};base64,{data}" alt="{escape(named)}">'
