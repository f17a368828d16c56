"""The page of search results: whole in itself, and harmless whatever the index says."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from radapter_client import Hit
from radapter_serve.cli.gallery import page
from tests.helpers.small_release import png

EVIL = [
    "<script>alert(1)</script>.jpg",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title><script>",
    "&lt;b&gt; & <!-- -->",
    "\ud800 猫\x00\n",
]


class Page(HTMLParser):
    """Reads a page, and fails where its elements do not close in order."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(content.decode())
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def decoded(source: str | None) -> Image.Image:
    assert source is not None and source.startswith("data:image/jpeg;base64,")
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_page():
    named = {"author": "Zoë", "tags": ["a", "b"], "camera": None}
    about = {"path": "deep/a.jpg", "digest": "sha256:00", **named}
    web = Hit("https://example.org/b.jpg", -0.5, {"url": "https://example.org"}, None)
    hits = [Hit("deep/a.jpg", 0.28125, about, png(3, 8, 6, "JPEG")), web]
    content = page(hits, "a red bicycle", None, {"index": "photos", "release": "3"})
    gallery = Page(content)
    for piece in ("a red bicycle", "index: photos · release: 3", "1. deep/a.jpg", "author", "Zoë"):
        assert piece in gallery.text
    assert not any(piece in gallery.text for piece in ("path", "sha256", "camera"))
    assert '["a", "b"]' in gallery.text and "no thumbnail" in gallery.text
    [picture] = gallery.all("img")
    assert (decoded(picture["src"]).size, picture["alt"]) == ((8, 6), "deep/a.jpg")
    assert [meter["value"] for meter in gallery.all("meter")] == ["0.2812", "-0.5000"]

    # The page needs nothing but itself.
    assert not {"script", "link", "iframe", "a", "object"} & {tag for tag, _ in gallery.elements}
    for _, attributes in gallery.elements:
        for name in {"src", "href", "srcset", "style"} & set(attributes):
            assert str(attributes[name]).startswith("data:")
    style = re.search(r"<style>(.*)</style>", content.decode(), re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    assert "Content-Security-Policy" in {meta.get("http-equiv") for meta in gallery.all("meta")}


def test_page_of_an_image():
    palette = io.BytesIO()
    # A palette with transparency, which Pillow warns of.
    Image.new("P", (2000, 500)).save(palette, "PNG", transparency=b"\0\x80")
    turned = png(0, 80, 40, "JPEG", turn=6)
    for file, size in ((palette.getvalue(), (320, 80)), (turned, (40, 80))):
        gallery = Page(page([], "query.png", file, {}))
        assert decoded(gallery.all("img")[0]["src"]).size == size
        assert "Nothing was found." in gallery.text


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_gets_out_of_its_place(evil: str):
    plain = Page(page([Hit("a", 0.5, {"k": "v", "l": "w"}, b"x")], "t", None, {"index": "i"}))
    hit = Hit(evil, 0.5, {evil: evil, "k": {evil: [evil]}}, evil.encode("utf-8", "replace"))
    gallery = Page(page([hit], evil, None, {evil: evil}))
    shape, same = (
        [(tag, list(of)) for tag, of in gallery_page.elements] for gallery_page in (plain, gallery)
    )
    assert shape == same
    shown = evil.encode("utf-8", "replace").decode()
    assert gallery.all("article")[0]["title"] == shown
    assert f"1. {shown}" in gallery.text
