"""Use the playground at a URL in a real Chromium: python -m tests.helpers.use_playground URL
PICTURE SCENE [SHOT.png].

Prints what the page answers; without a Chromium it says so, and does nothing.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Until an answer has come, its component shows the time that passes.
ANSWERED = """before => {
    const scores = document.querySelector('#scores');
    return scores.innerText !== before && scores.querySelector('.progress-text') === null;
}"""


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright, or a skip that says what is missing."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    where = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if where is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # Its sandbox needs what containers lack; the pages are our own.
        browser = playwright.chromium.launch(
            executable_path=where, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            yield browser
        finally:
            browser.close()


def use(page: Any, picture: str, scene: str, shot: str = "", *, moves: bool = False) -> None:
    """Classify a picture at three α, search, and segment a scene; each answer must come.

    `shot` is the file of a picture of the page, if any. With `moves`, the scores at the three α
    must differ, which they may not after a few steps of training.
    """
    page.get_by_text("any α").wait_for()
    page.set_input_files("#picture input[type=file]", picture)
    page.locator("#scores-took", has_text="release").wait_for()
    page.wait_for_function(ANSWERED, arg="")
    scores = [page.locator("#scores").inner_text()]
    slider = page.locator("#alpha input[type=range]")
    for key in ("Home", "End"):  # α = 0 and α = 1
        slider.focus()
        page.keyboard.press(key)
        page.wait_for_function(ANSWERED, arg=scores[-1] if moves else "")
        scores.append(page.locator("#scores").inner_text())
    assert len(set(scores)) == 3 or not moves, scores
    print("classified", scores[-1].replace("\n", " "), page.locator("#scores-took").inner_text())
    if shot:
        page.screenshot(path=shot)
    page.get_by_role("tab", name="Search").click()
    page.fill("#query textarea, #query input", "a drawing of a fruit")
    page.keyboard.press("Enter")
    page.locator("#found-took", has_text="found").wait_for()
    page.locator("#found img").nth(2).wait_for()
    print("found", page.locator("#found-took").inner_text())
    page.set_input_files("#picture input[type=file]", scene)
    page.get_by_role("tab", name="Segment").click()
    page.get_by_role("button", name="Segment").click()
    page.locator("#segments-took", has_text="release").wait_for()
    took = page.locator("#segments-took").inner_text()
    assert re.fullmatch(r"\d+ ms · release \d+", took.strip()), took
    print("segmented", took)


def main(url: str, picture: str, scene: str, shot: str = "") -> None:
    """Do what the module says."""
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
