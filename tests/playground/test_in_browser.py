"""The playground, opened and used in a real Chromium, in front of a stand-in for Triton."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from radapter_serve.playground import Settings, serving
from radapter_serve.server.endpoints import free_ports
from tests.helpers import fake_upstream
from tests.helpers.small_world import SmallWorld, png, write_indexes
from tests.helpers.use_playground import chromium, use

pytestmark = pytest.mark.integration


@pytest.mark.filterwarnings("ignore")  # of Gradio, in its own threads
@pytest.mark.slow
def test_a_visitor_asks_every_task_and_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    picture = tmp_path / "red.png"
    picture.write_bytes(png("red", (64, 48)))
    port, *_ = free_ports()
    asked = list[str]()
    with (
        fake_upstream.serving(SmallWorld, indexes=write_indexes(tmp_path / "indexes")) as served,
        serving(Settings(served.url, port=port)) as url,
        chromium() as browser,
    ):
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.set_default_timeout(60_000)
        page.goto(url)
        use(page, str(picture), str(picture), moves=True)
    assert asked and all(one.startswith((url, "data:", "blob:")) for one in asked), asked
    gc.collect()  # sockets that Gradio leaves open are this test's to hear of
