"""The playground: what its page asks and answers, and that all of Gradio is closed that the page does not need."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import gradio
import numpy as np
import pytest
import urllib3
from PIL import Image

from radapter_client import Release, Segmentation
from radapter_serve.cli import gateway, serve
from radapter_serve.extras import install_command
from radapter_serve.gateway.errors import Refused
from radapter_serve.gateway.keys import new_key
from radapter_serve.gateway.playground import door, page, shown
from tests.helpers.fake_server import release
from tests.helpers.fake_upstream import Served, serving
from tests.helpers.small_world import SmallWorld, png

PAGE, EVENT = "/playground/", "/playground/gradio_api/run/predict"
PICTURE = "data:image/png;base64," + base64.b64encode(png("red")).decode()
CLASSIFY = [PICTURE, "cat\ndog", "", 0.5]


@pytest.fixture(scope="module")
def made() -> list[gradio.Blocks]:
    """What Gradio holds of the page of `served`."""
    return []


@pytest.fixture(scope="module")
def served(made: list[gradio.Blocks], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A playground, which must leave no file where Gradio keeps files."""
    files, build = tmp_path_factory.mktemp("gradio"), page.build

    def kept(*given: Any) -> gradio.Blocks:
        made.append(build(*given))
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(files))
        patch.setattr(page, "build", kept)
        with serving(SmallWorld, playground=True) as served:
            patch.undo()
            yield served
    assert not [path for path in files.rglob("*") if path.is_file()]


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[tuple[Served, Path, str]]:
    """A playground that wants a key; its file of keys, and a key."""
    file = tmp_path / "keys"
    key = new_key(file, "ann")
    with serving(SmallWorld, playground=True, api_keys=file) as served:
        yield served, file, key


def get(served: Served, path: str, method: str = "GET", body: Any = None, **headers: str) -> Any:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return urllib3.request(
        method, served.url + path, body=body, headers=given, retries=False, redirect=False, timeout=30
    )


def events(served: Served, **headers: str) -> dict[str, int]:
    """The numbers of the page's events by their names, from the page."""
    text = get(served, PAGE, **headers).data.decode()
    config, _ = json.JSONDecoder().raw_decode(text[text.index("window.gradio_config = ") + 23 :])
    return {event["api_name"]: event["id"] for event in config["dependencies"]}


def send(served: Served, name: str | int, data: list[Any], *, more: Any = None, **headers: str) -> Any:
    number = events(served, **headers)[name] if isinstance(name, str) else name
    body = json.dumps({"fn_index": number, "data": data, **(more or {})}).encode()
    return get(served, EVENT, "POST", body, Content_Type="application/json", **headers)


def html(answer: Any) -> list[Any]:
    assert answer.status == 200, answer.data
    return list(json.loads(answer.data)["data"])


def login(key: str) -> str:
    return "Basic " + base64.b64encode(f"anybody:{key}".encode()).decode()


# What it answers


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_classify_shows_the_scores_at_any_alpha(served: Served, alpha: float) -> None:
    scores, took = html(send(served, "classify", [PICTURE, "cat\n\n <dog> \n", "", alpha]))
    first = (1 + alpha) / (1.5 + alpha)  # of the stand-in
    assert re.findall(r"([\d.]+) %<", scores) == [f"{100 * first:.1f}", f"{100 * (1 - first):.1f}"]
    assert "&lt;dog&gt;" in scores and "<dog>" not in scores
    assert re.search(r"\d+ ms · release 1 · int8", took)


def test_classify_by_a_label_set(served: Served) -> None:
    scores, _ = html(send(served, "classify", [PICTURE, "cat", "letters", 0]))
    assert re.findall(r'class="name">(\w)<', scores) == ["a", "b", "c"]
    assert "label_set" in {one.name for one in served.upstream.asked[-1].inputs}


def test_search_by_text_and_by_picture(served: Served) -> None:
    for name, query, asked in (("search_text", "a <cat>", "a &lt;cat&gt;"), ("search_picture", PICTURE, "picture")):
        found, took = html(send(served, name, [query, "photos", 3]))
        assert re.findall(r"<b>([\d.]+)</b> (.+?)</figcaption>", found) == [
            (f"{0.9 - 0.1 * number:.3f}", f"{asked} {number}&lt;b&gt;") for number in range(3)
        ]
        assert f'title="folder/{asked} 2&lt;b&gt;"' in found
        assert base64.b64encode(png("green")).decode() in found and "release 1" in took


def test_segment_draws_the_labels(served: Served) -> None:
    drawn, took = html(send(served, "segment", [PICTURE, "sky\nsea", 0, 96, 0.5]))
    kind, data = re.search(r'src="data:image/(\w+);base64,([^"]+)" alt="sky, sea"', drawn).groups()  # type: ignore[union-attr]
    assert base64.b64decode(data)[:4] == (b"\x89PNG" if kind == "png" else b"\xff\xd8\xff\xe0")
    assert "int8" in took
    (sent,) = (one for one in served.upstream.asked if one.model_name == "segment")
    given = dict(zip((one.name for one in sent.inputs), sent.raw_input_contents, strict=True))
    assert np.frombuffer(given["short_side"], np.int32) == 96 and "threshold" not in given


def test_the_page_begins_with_the_release_and_its_indexes(served: Served) -> None:
    facts, alpha, why, sets, indexes = json.loads(send(served, "begin", []).data)["data"]
    assert all(fact in facts for fact in ("release 1", "ViT-B-32", "int8"))
    assert (alpha["visible"], alpha["value"], why) == (True, 0.5, "")
    assert [name for name, _ in sets["choices"]] == ["", "letters"]
    assert [name for name, _ in indexes["choices"]] == ["drawings", "photos"] and indexes["value"] == "drawings"


def test_without_dynamic_alpha_the_slider_says_why_and_no_alpha_is_sent() -> None:
    with serving(lambda: SmallWorld(dynamic_alpha=False), playground=True) as served:
        _, alpha, why, *_ = json.loads(send(served, "begin", []).data)["data"]
        assert alpha["visible"] is False and "radapter-export --alpha dynamic" in why
        html(send(served, "classify", CLASSIFY))
        assert "alpha" not in {one.name for one in served.upstream.asked[-1].inputs}


def test_a_page_that_finds_no_server_says_so() -> None:
    with serving(SmallWorld, playground=True) as served:
        served.upstream.configs = {}
        served.upstream.config = AsyncMock(side_effect=Refused(503, "server_unavailable", "it starts"))  # type: ignore[method-assign]
        facts, alpha, why, *others = html(send(served, "begin", []))
        assert 'class="wrong"' in facts and "it starts" in facts
        assert why == "" and alpha == {"__type__": "update"} and others == [alpha] * 2


def test_what_a_task_refuses_is_shown(served: Served) -> None:
    why, took = html(send(served, "search_text", ["<cat>", "<none>", 3]))
    assert 'class="wrong"' in why and "there are: drawings, photos" in why and not took
    for data in ([PICTURE, "", "", 0], ["data:text/html;base64,!!", "cat", "", 0], ["http://127.0.0.1/", "cat", "", 0]):
        assert 'class="wrong"' in html(send(served, "classify", data))[0]
    served.upstream.error = Refused(503, "server_unavailable", "it <stops>")
    try:
        assert "it &lt;stops&gt;" in html(send(served, "classify", CLASSIFY))[0]
    finally:
        served.upstream.error = None
    assert "Drop a picture" in html(send(served, "classify", ["", "cat", "", 0]))[0]


# Keys


def test_without_a_key_nothing_is_answered(keyed: tuple[Served, Path, str]) -> None:
    served, file, key = keyed
    number = events(served, Authorization=login(key))["classify"]
    paths = [PAGE, f"{PAGE}theme.css", f"{PAGE}static/img/logo.svg", f"{PAGE}gradio_api/file=/etc/passwd"]
    for given in ({}, {"Authorization": login("wrong")}, {"Authorization": "Basic !"}, {"Authorization": "Bearer x"}):
        for path in paths:
            answer = get(served, path, **given)
            assert answer.status == 401 and answer.headers["WWW-Authenticate"].startswith("Basic "), path
            assert json.loads(answer.data)["error"].startswith("[unauthorized]")
        assert send(served, number, CLASSIFY, **given).status == 401
    assert not served.upstream.asked
    html(send(served, number, CLASSIFY, Authorization=login(key)))
    assert len(served.upstream.asked) == 1
    file.write_text("")  # taken back
    assert send(served, number, CLASSIFY, Authorization=login(key)).status == 401
    assert len(served.upstream.asked) == 1


def test_the_login_of_the_page_opens_no_other_path(keyed: tuple[Served, Path, str]) -> None:
    served, _, key = keyed
    assert get(served, "/v2", Authorization=f"Bearer {key}").status == 200
    answer = get(served, "/v2", Authorization=login(key))
    assert answer.status == 401 and answer.headers["WWW-Authenticate"] == "Bearer"


# What is closed


def test_no_route_of_gradio_is_open_that_the_page_does_not_need(served: Served, made: list[gradio.Blocks]) -> None:
    """All that this version of Gradio has, by its own table of routes."""
    table: list[Any] = made[0].app.routes
    inner = [route for one in table for route in getattr(getattr(one, "original_router", None), "routes", [one])]
    routes = [(route.path, method) for route in inner for method in route.methods]
    assert len(routes) > 60
    opened = set()
    for path, method in routes:
        path = PAGE.rstrip("/") + re.sub(r"{\w+(:path)?}", "x", path)
        answer = get(served, path, method, b"{}" if method == "POST" else None, Content_Type="application/json")
        if not (answer.status in (404, 405) and answer.data.startswith(b'{"error":"[not_found]')) and method != "HEAD":
            opened.add((path.removeprefix(PAGE), answer.status))
    assert opened == {
        ("", 200),
        ("theme.css", 200),
        ("static/x", 404),  # Gradio's own answer: it has no such file
        ("assets/x", 404),
    }


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=http://127.0.0.1/",
        "file=/etc/passwd",
        "static/../../../../../../etc/passwd",
        "static/%2e%2e/%2e%2e/index.html",
        "assets/..%2f..%2findex.html",
        "static//etc/passwd",
        "assets/%2fetc%2fpasswd",
        "static/..%5c..%5cindex.html",
        "?deep_link=../../etc",
        "config?deep_link=x",
    ],
)
def test_no_path_leads_to_a_file(served: Served, path: str) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=15) as it:
        it.sendall(f"GET {PAGE}{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while part := it.recv(2**16):
            answer += part
    status = int(answer.split()[1])
    assert b"root:" not in answer
    assert status in (403, 404) or (path.startswith("?") and b"deep_link_state&#34;: &#34;valid" not in answer)


FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "data",
    [
        [FILE, "cat", "", 0.5],
        [{**FILE, "path": "http://127.0.0.1:9/x.png"}, "cat", "", 0.5],
        [[FILE], "cat", "", 0.5],
        [PICTURE, "cat", "", "0.5"],
        [PICTURE, "cat", 1, 0.5],
        [PICTURE, "cat", "", True],
        [PICTURE, "cat", "", 1.01],
        [PICTURE, "cat", "", None],
        [0.5, "cat", "", 0.5],
        [PICTURE, "cat", ""],
        [PICTURE, "cat", "", 0.5, None],
        ["x"] * 17,
    ],
)
def test_no_value_names_a_file_or_is_of_another_kind(
    served: Served, data: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    asked = len(served.upstream.asked)
    answer = send(served, "classify", data)
    assert answer.status == 400 and answer.data.startswith(b'{"error":"[invalid_argument]')
    assert len(served.upstream.asked) == asked and not capfd.readouterr().err


@pytest.mark.parametrize("body", [b"", b"x", b"[]", b'{"fn_index":99,"data":[]}', b'{"fn_index":NaN,"data":[NaN]}'])
def test_what_is_no_event(served: Served, body: bytes) -> None:
    assert get(served, EVENT, "POST", body, Content_Type="application/json").status == 400
    assert get(served, EVENT, "POST", b"{}", Content_Type="text/plain").status == 415
    assert get(served, EVENT).status == 405


def test_gradio_keeps_nothing_of_its_callers(served: Served, made: list[gradio.Blocks]) -> None:
    more = {"session_hash": "mine", "event_data": FILE, "trigger_id": 1, "simple_format": True}
    html(send(served, "classify", CLASSIFY, more=more))
    assert not list(made[0].state_holder.session_data)
    assert b"radapter_gateway_body_bytes 0.0" in get(served, "/metrics").data


def test_another_site_reads_and_sends_nothing(served: Served) -> None:
    evil = {"Origin": "https://evil.example"}
    for answer in (get(served, PAGE, **evil), send(served, events(served)["begin"], [], **evil)):
        assert answer.status == 200 and not [name for name in answer.headers if "access-control" in name.lower()]
        assert "connect-src" in answer.headers["Content-Security-Policy"] or "default-src 'self'" in str(answer.headers)
    assert send(served, events(served)["begin"], [], Sec_Fetch_Site="cross-site").status == 403
    assert get(served, EVENT, "OPTIONS", **evil, Access_Control_Request_Method="POST").status == 405


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8080", "", "[", "10.0.0.1"]
)
def test_without_keys_no_name_of_another_site_leads_to_the_page(served: Served, host: str) -> None:
    number = events(served)["begin"]
    for answer in (get(served, PAGE, Host=host), send(served, number, [], Host=host)):
        assert answer.status == 403 and answer.data.startswith(b'{"error":"[unauthorized]')


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "127.0.0.2", "[::1]:8080"])
def test_every_name_of_this_machine_leads_to_the_page(served: Served, host: str) -> None:
    assert get(served, PAGE, Host=host).status == 200


def test_with_keys_or_where_all_may_come_any_name_leads_to_the_page(keyed: tuple[Served, Path, str]) -> None:
    assert get(keyed[0], PAGE, Host="models.example.com", Authorization=login(keyed[2])).status == 200
    with serving(SmallWorld, playground=True, no_api_keys=True) as served:
        assert get(served, PAGE, Host="models.example.com").status == 200


# Bounds


def test_a_picture_over_the_limit_is_refused() -> None:
    with serving(SmallWorld, playground=True, max_body=0.1) as served:
        assert send(served, "classify", ["x" * 105_000, "cat", "", 0]).status == 413
        text = get(served, PAGE).data.decode()
        assert f'"most":{int(0.075 * 2**20) - 2**16}' in text  # what the page itself refuses
        html(send(served, "classify", CLASSIFY))


def test_the_page_waits_for_no_more_than_other_callers() -> None:
    with serving(SmallWorld, playground=True, max_concurrent=1, max_queue=0, timeout=2) as served:
        number = events(served)["classify"]
        served.hold()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(send, served, number, CLASSIFY)
            while not served.upstream.asked:
                time.sleep(0.01)
            assert "1 requests run and 0 wait" in html(send(served, number, CLASSIFY))[0]
            assert "within 2 s" in html(first.result())[0]
        served.let_go()
        html(send(served, number, CLASSIFY))
        assert served.upstream.timeouts[-1] <= 2


LOADS_MORE = """
import sys
from tests.gateway.test_playground import CLASSIFY, SmallWorld, events, html, send, serving
with serving(SmallWorld, playground=True) as served:
    number = events(served)["classify"]
    before = set(sys.modules)
    html(send(served, number, CLASSIFY))
    print(*sorted(set(sys.modules) - before))
"""


def test_the_first_event_loads_nothing_while_others_wait() -> None:
    loaded = subprocess.run([sys.executable, "-c", LOADS_MORE], check=True, capture_output=True, text=True).stdout
    assert not loaded.split()


def test_a_visitor_who_leaves_cancels_the_request() -> None:
    with serving(SmallWorld, playground=True, max_concurrent=1) as served:
        body = json.dumps({"fn_index": events(served)["classify"], "data": CLASSIFY}).encode()
        served.hold()
        with socket.create_connection(("127.0.0.1", served.port), timeout=15) as it:
            head = f"POST {EVENT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            it.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while not served.upstream.asked:
                time.sleep(0.01)
        end = time.monotonic() + 10
        while not served.upstream.cancelled:
            assert time.monotonic() < end
            time.sleep(0.01)
        served.let_go()
        html(send(served, "classify", CLASSIFY))


def test_nothing_outside_is_reached() -> None:
    """Neither when Gradio is loaded nor when the page is made; the browser's own requests have a test of their own."""
    code = """
import sys, threading, time
reached = []
names = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
sys.addaudithook(lambda name, given: reached.append((name, given)) if name in names else None)
import asyncio
from radapter_serve.gateway.run import server
from radapter_serve.gateway.settings import Settings
app = server(Settings(playground=True)).config.app
async def live():
    async with app.router.lifespan_context(app):
        await asyncio.sleep(1)
asyncio.run(live())
assert not reached, reached
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


# The command


def test_the_playground_is_closed_unless_it_is_asked_for() -> None:
    with serving(SmallWorld) as served:
        assert get(served, PAGE).status == get(served, "/").status == 404


def test_a_visitor_finds_the_page(served: Served) -> None:
    for path in ("/", "/playground"):
        answer = get(served, path)
        assert answer.status == 307 and answer.headers["Location"] == PAGE


def test_without_gradio_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    for command in (gateway.main, serve.main):
        port = "--port" if command is gateway.main else "--gateway-port"
        assert command(["--playground", port, "0"]) == 2
        assert f"gradio is not installed; {install_command('playground')}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (None, None),
        ("", None),
        ("Basic", None),
        ("Basic bm9jb2xvbg==", None),
        ("Basic YTpi", "b"),
        ("basic OmI6Yw==", "b:c"),
        ("Basic /w==", None),
        ("Bearer YTpi", None),
    ],
)
def test_the_password_is_the_key(given: str | None, key: str | None) -> None:
    assert door.key(given) == key


def test_the_page_tells_no_path_of_the_base() -> None:
    facts = release(1) | {"architecture": "local-dir:/srv/secret/base", "label_sets": {}}
    shows = shown.header(Release.from_facts(facts))
    assert ">base<" in shows and "secret" not in shows


def test_a_large_picture_is_shown_smaller() -> None:
    """Its whole mask is never coloured: that would take a hundred times the memory of what is shown."""
    width, height = 6000, 2000
    file = png("red", (width, height))
    mask = np.zeros((height, width), np.uint16)
    mask[:, width // 4 :] = 1
    found = Segmentation(mask, ["sea", "sky"], [1.0, 1.0], 1, image=file)
    tracemalloc.start()
    try:
        html = shown.segments(shown.smaller(found), file)
        peak = tracemalloc.get_traced_memory()[1]  # of numpy's arrays; Pillow's pictures are not traced
    finally:
        tracemalloc.stop()
    assert peak < mask.nbytes
    assert 'alt="sea, sky"' in html
    drawn = re.search(r"base64,([^\"]+)", html)
    assert drawn is not None
    picture = Image.open(io.BytesIO(base64.b64decode(drawn[1])))
    assert picture.format == "JPEG" and picture.width == shown.LONGEST
    middle = shown.LONGEST * height // width // 2
    left, right = (np.array(picture.getpixel((x, middle)), int) for x in (100, 900))
    # Half red, half the first two colours of the palette.
    assert abs(left - [170, 90, 116]).max() < 12 and abs(right - [242, 80, 0]).max() < 12


def test_a_small_picture_keeps_its_size() -> None:
    found = Segmentation(np.zeros((3, 5), np.uint16), ["sea"], [1.0], 1)
    assert shown.smaller(found) is found
    thin = Segmentation(np.zeros((1, 5000), np.uint16), ["sea"], [1.0], 1)
    assert shown.smaller(thin).mask.shape == (1, shown.LONGEST)


def test_one_picture_is_drawn_at_a_time(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing, most = [0], [0]

    def slow(*given: Any) -> str:
        drawing[0] += 1
        most[0] = max(most[0], drawing[0])
        time.sleep(0.1)
        drawing[0] -= 1
        return "drawn"

    monkeypatch.setattr(shown, "segments", slow)
    number = events(served)["segment"]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(send, served, number, [PICTURE, "sky\nsea", 0, 96, 0.5]) for _ in range(4)]
        assert [html(one.result())[0] for one in asked] == ["drawn"] * 4
    assert most == [1]
