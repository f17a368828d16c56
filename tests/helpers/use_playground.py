"""Use the playground at a URL in a real Chromium: python -m tests.helpers.use_playground URL PICTURE SCENE [SHOT.png].

Prints what the page answers; without a Chromium it says so, and does nothing.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import chromium


def use(page: Any, picture: str, scene: str, shot: str = "") -> None:
    """Classify at three α, search and segment; each answer must come."""
    page.get_by_text("any α").wait_for()
    page.set_input_files("#picture input", picture)
    page.locator("#scores .score").first.wait_for()
    seen = []
    for alpha in ("0", "1", "0.5"):
        with page.expect_response(lambda answer: answer.url.endswith("/run/predict")):
            page.locator("#alpha input[type=range]").fill(alpha)
        page.wait_for_timeout(200)
        seen.append(page.locator("#scores").inner_text())
    print("scores at three α:", len(set(seen)))
    print("classified", seen[-1].replace("\n", " "), page.locator("#scores-took").inner_text())
    if shot:
        page.screenshot(path=shot)
    page.get_by_role("tab", name="Search").click()
    page.fill("#query textarea, #query input", "a drawing of a fruit")
    page.keyboard.press("Enter")
    page.locator("#found figure img").nth(3).wait_for()
    print("found", page.locator("#found figcaption").first.inner_text())
    if shot:
        page.screenshot(path=shot.replace(".png", "-search.png"))
    page.set_input_files("#picture input", scene)
    page.get_by_role("tab", name="Segment").click()
    page.get_by_role("button", name="Segment").click()
    page.locator("#segments img").wait_for()
    took = page.locator("#segments-took").inner_text()
    assert re.fullmatch(r"\d+ ms · release \d+ · \w+", took.strip()), took
    print("segmented", took)
    if shot:
        page.screenshot(path=shot.replace(".png", "-segment.png"))


def main(url: str, picture: str, scene: str, shot: str = "") -> None:
    """As the module says."""
    try:
        with chromium() as browser:
            page = browser.new_page(viewport={"width": 1180, "height": 760})
            page.set_default_timeout(60_000)
            page.goto(url)
            use(page, str(Path(picture)), str(Path(scene)), shot)
    except pytest.skip.Exception as why:
        print(f"not opened: {why}")


if __name__ == "__main__":
    main(*sys.argv[1:])
