"""Search results as one self-contained web page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape

from radapter_client import Hit
from radapter_serve.contract.images import decode

SIDE = 320  # px of the query's picture
# The policy lets the page load nothing from elsewhere.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
"""
STYLE = """
:root { color-scheme: light dark; --paper: #fff;
  --card: #f4f5f7; --ink: #1d1f23; --pale: #626872; --line: #dcdfe4; --bar: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #131417; --card: #1e2024; --ink: #e9eaed; --pale: #9ba1ab; --line: #33363c; --bar: #56b4e9 }
}
* { box-sizing: border-box }
body { margin: 0; padding: clamp(1rem, 3vw, 2.5rem); background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif }
header { display: flex; flex-wrap: wrap; gap: 1.25rem; align-items: center; margin-bottom: 1.75rem }
header img { max-width: 160px; max-height: 160px; border-radius: 10px }
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere }
header p { margin: .3rem 0 0; color: var(--pale) }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(220px, 100%), 1fr)) }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden }
.picture { display: grid; place-items: center; aspect-ratio: 1; background: var(--paper); color: var(--pale) }
.picture img { width: 100%; height: 100%; object-fit: contain }
.text { padding: .6rem .8rem .8rem }
h2 { margin: 0; font-size: .95rem; font-weight: 600; overflow-wrap: anywhere }
.score { display: flex; align-items: center; gap: .6rem; margin-top: .25rem; font-variant-numeric: tabular-nums }
meter { flex: 1; height: .5rem; border: 0; border-radius: 4px; background: var(--line); appearance: none }
meter::-webkit-meter-bar { background: var(--line); border: 0; border-radius: 4px }
meter::-webkit-meter-optimum-value { background: var(--bar); border-radius: 4px }
meter::-moz-meter-bar { background: var(--bar); border-radius: 4px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .6rem; margin: .5rem 0 0; font-size: .85rem }
dt { color: var(--pale) }
dd { margin: 0; overflow-wrap: anywhere }
"""


def page(
    hits: Sequence[Hit], text: str | None, image: bytes | None, facts: Mapping[str, str]
) -> bytes:
    """Build a page: the hits below the query's text and image, and facts about the search."""
    query = escape(text or "an image")
    header = ""
    if image is not None:
        picture = decode(image)  # turned upright, as the thumbnails are
        if "transparency" in picture.info:  # else Pillow drops a palette's, with a warning
            picture = picture.convert("RGBA")
        picture = picture.convert("RGB")
        picture.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)
        header = f'<img src="{_data(file.getvalue())}" alt="the image that was searched for">\n'
    known = " · ".join(f"{escape(name)}: {escape(value)}" for name, value in facts.items())
    cards = "\n".join(_card(rank, hit) for rank, hit in enumerate(hits, 1))
    return (
        f"{HEAD}<title>{query}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n{header}<div><h1>{query}</h1>\n<p>{known}</p></div>\n</header>\n"
        f"<main>\n{cards or '<p>Nothing was found.</p>'}\n</main>\n</body>\n</html>\n"
    ).encode("utf-8", "replace")


def _card(rank: int, hit: Hit) -> str:
    name = escape(hit.id)
    shown = "no thumbnail"
    if hit.thumbnail:
        shown = f'<img src="{_data(hit.thumbnail)}" alt="{name}" loading="lazy">'
    about = ""
    for key, value in hit.about.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        about += f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>"
    cosine = f"{hit.score:.4f}"
    return (
        f'<article title="{name}">\n<div class="picture">{shown}</div>\n<div'
        f' class="text">\n<h2>{rank}. {name}</h2>\n<div class="score"><meter min="0" max="1"'
        f' value="{cosine}"></meter>{cosine}</div>\n<dl>{about}</dl>\n</div>\n</article>'
    )


def _data(picture: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
