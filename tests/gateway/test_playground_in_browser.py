"""The playground, opened and used in a real Chromium, in front of a stand-in for Triton."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from radapter_serve.gateway.keys import new_key
from tests.helpers.browser import chromium
from tests.helpers.fake_upstream import serving
from tests.helpers.small_world import SmallWorld, png

RED = {"name": "red.png", "mimeType": "image/png", "buffer": png("red", (64, 48))}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The page of a playground that wants a key, and nothing from elsewhere: neither a request nor an error."""
    file = tmp_path / "keys"
    key = new_key(file, "ann")
    with serving(SmallWorld, playground=True, api_keys=file, max_body=1) as served:
        context = browser.new_context(http_credentials={"username": "ann", "password": key})
        page = context.new_page()
        asked, wrong = list[str](), list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
        page.set_default_timeout(60_000)
        page.goto(f"{served.url}/")
        page.get_by_text("release 1").wait_for()
        yield page
        context.close()
        assert asked and all(url.startswith((served.url, "data:", "blob:")) for url in asked)
        assert not wrong


def write(page: Any, box: str, text: str) -> None:
    """Type into a box, and once more: one that has only just appeared does not listen yet, as no hand would notice."""
    for _ in range(2):
        page.fill(box, text)
        page.wait_for_timeout(500)


def scores(page: Any) -> list[tuple[str, float]]:
    lines = page.locator("#scores .score").all_inner_texts()
    return [(name, float(number)) for name, number in (re.split(r"\s*\n\s*", line.strip(" %")) for line in lines)]


def expected(alpha: float) -> list[tuple[str, float]]:
    """What the stand-in gives to a first and a second label, in percent."""
    return [("cat", round(100 * (1 + alpha) / (1.5 + alpha), 1)), ("dog", round(100 * 0.5 / (1.5 + alpha), 1))]


def test_a_picture_labels_and_alpha(page: Any) -> None:
    assert all(fact in page.inner_text("body") for fact in ("ViT-B-32", "int8", "any α"))
    write(page, "#labels textarea", "cat\ndog")
    page.set_input_files("#picture input", RED)
    page.locator("#scores .score").nth(1).wait_for()
    assert scores(page) == expected(0.5)
    for alpha in (1.0, 0.0):  # α moves, and the scores move by themselves
        page.locator("#alpha input[type=range]").fill(str(alpha))
        page.get_by_text(f"{expected(alpha)[0][1]:.1f} %").wait_for()
        assert scores(page) == expected(alpha)
    assert re.fullmatch(r"\d+ ms · release 1 · int8", page.inner_text("#scores-took").strip())


def test_a_picture_is_dropped_and_one_that_is_too_large_is_refused_before_it_is_sent(page: Any) -> None:
    drop = """(element, size) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(size)], "picture.png", {type: "image/png"}));
        element.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
    }"""
    page.locator("#picture .drop").evaluate(drop, 10**6)
    page.get_by_text("1.0 MiB; 0.7 MiB are allowed").wait_for()
    page.locator("#picture .drop").evaluate(drop, 1000)
    page.locator("#scores .score").first.wait_for()


def test_a_search_shows_a_gallery(page: Any) -> None:
    page.get_by_role("tab", name="Search").click()
    write(page, "#query textarea, #query input", "a <b>bicycle")
    page.keyboard.press("Enter")
    page.locator("#found figure").nth(2).wait_for()
    captions = page.locator("#found figcaption").all_inner_texts()
    assert captions == [f"{0.9 - 0.1 * number:.3f} a <b>bicycle {number}<b>" for number in range(3)]
    assert all(page.locator("#found img").evaluate_all("images => images.map(image => image.naturalWidth > 0)"))
    page.set_input_files("#picture input", RED)
    page.get_by_role("button", name="Search by the picture").click()
    page.get_by_text("picture 0").wait_for()


def test_a_segmentation_shows_its_picture(page: Any) -> None:
    page.set_input_files("#picture input", RED)
    page.get_by_role("tab", name="Segment").click()
    write(page, "#parts textarea", "sky\nsea")
    page.get_by_role("button", name="Segment").click()
    drawn = page.locator("#segments img")
    drawn.wait_for()
    assert drawn.get_attribute("alt") == "sky, sea"
    # The picture of 64 x 48 is enlarged for its legend, which stands below it.
    width, height = drawn.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert width >= 512 and height > width * 48 / 64


def test_what_goes_wrong_is_said(page: Any) -> None:
    page.get_by_role("tab", name="Search").click()
    write(page, "#index input", "nothing")
    page.keyboard.press("Tab")
    page.wait_for_timeout(500)
    write(page, "#query textarea, #query input", "a bicycle")
    page.keyboard.press("Enter")
    page.get_by_text("there are: drawings, photos").wait_for()
