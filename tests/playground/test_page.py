"""The playground: what its page asks and answers, who may open it, and the command."""

from __future__ import annotations

import asyncio
import gc
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
from PIL import Image

from radapter_client import Client
from radapter_serve.errors import RAdapterError, install_command
from radapter_serve.gateway.access import new_key
from radapter_serve.gateway.upstream import Inference, Refused
from radapter_serve.index.facts import FACTS
from radapter_serve.playground import Settings, serving
from radapter_serve.server.endpoints import free_ports
from tests.helpers import fake_upstream
from tests.helpers.fake_server import release
from tests.helpers.fake_upstream import FakeUpstream, Served, as_bytes, config
from tests.helpers.use_playground import chromium, use

pytestmark = [pytest.mark.slow]  # Gradio takes seconds to load

INDEXES = ("drawings", "photos")
UNKNOWN = "no index ' '; there are: " + ", ".join(INDEXES)


def png(colour: str, size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def write_indexes(folder: Path) -> Path:
    """The folder that a gateway in front of it lists its indexes from."""
    for name in INDEXES:
        (folder / name).mkdir(parents=True)
        (folder / name / FACTS).touch()
    return folder


class SmallWorld(FakeUpstream):
    """A stand-in for Triton: labels get 1 / (1 + their place) each, normalized, and the first as
    much more as α says; the left half of a picture is the first label and the right half the
    second; each index has three pictures. With `dynamic_alpha`, its release takes any α.
    """

    def __init__(self, dynamic_alpha: bool = True) -> None:
        super().__init__()
        facts = release(1) | {"dynamic_alpha": dynamic_alpha, "precision": "int8"}
        facts["label_sets"] = {"letters": {"labels": 3}}
        self.configs = {name: config(name, facts) for name in self.configs}

    def _answer(self, asked: Inference) -> dict[str, np.ndarray]:
        answers = {"classify": self._classify, "segment": self._segment, "retrieve": self._retrieve}
        if asked.model in answers:
            return answers[asked.model](asked.inputs)
        return super()._answer(asked)

    def _classify(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = as_bytes(given["labels"]) if "labels" in given else [b"a", b"b", b"c"]
        scores = 1 / (1 + np.arange(len(names), dtype=np.float32))
        scores[0] += given["alpha"][0, 0] if "alpha" in given else 0
        return {"label": np.array([names], object), "score": (scores / scores.sum())[None]}

    def _segment(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        width, height = Image.open(io.BytesIO(given["image"][0])).size
        names = as_bytes(given["labels"])
        mask = np.zeros((height, width), np.uint16)
        mask[:, width // 2 :] = 1
        return {
            "mask": mask,
            "label": np.array(names, object),
            "score": np.full(len(names), 0.5, np.float32),
        }

    def _retrieve(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if given["index"][0] not in INDEXES:
            raise Refused(400, "unknown_index", UNKNOWN)
        # Health asks as the engine asks itself, in UTF-8.
        asked = "picture" if "image" in given else as_bytes(given["text"])[0].decode()
        ids = [f"folder/{asked} {number}<b>" for number in range(3)]
        thumbnails = [png(colour) for colour in ("red", "green", "blue")]
        return {
            "id": np.array([one.encode() for one in ids], object),
            "score": np.array([0.9, 0.8, 0.7], np.float32),
            "metadata": np.array([b"{}"] * 3, object),
            "thumbnail": np.array(thumbnails, object),
            "index_version": np.array([b"g-1"], object),
        }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    indexes = write_indexes(tmp_path_factory.mktemp("indexes"))
    with fake_upstream.serving(SmallWorld, indexes=indexes) as served:
        yield served


@pytest.fixture(scope="module")
def events(served: Served) -> Iterator[dict[str, Any]]:
    """What the events of the page call, by their names."""
    with Client(served.url) as client:
        yield handlers(client)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    file = tmp_path / "red.png"
    file.write_bytes(png("red"))
    return str(file)


def handlers(client: Client) -> dict[str, Any]:
    from radapter_serve.playground.page import build

    async def built() -> Any:
        return build(client)

    return {str(event.api_name): event.fn for event in asyncio.run(built()).fns.values()}


def given(served: Served) -> dict[str, np.ndarray]:
    """The inputs of the last request."""
    return served.upstream.asked[-1].inputs


def test_classify_gives_the_scores_at_any_alpha(
    served: Served, events: dict[str, Any], picture: str
) -> None:
    for alpha in (0, 0.5, 1):
        scores, took = events["classify"](picture, "cat\n\n <dog> \n", "", alpha)
        first = (1 + alpha) / (1.5 + alpha)  # of the stand-in
        assert scores == pytest.approx({"cat": first, "<dog>": 1 - first})
        assert took.endswith(" ms · release 1")
        assert given(served)["image"].tolist() == [[png("red")]]  # the file as it is
    assert list(events["classify"](picture, "cat", "letters", 0)[0]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("by", "asked", "inputs"),
    [
        ("text", "a cat", {"text"}),
        ("picture", "picture", {"image"}),
        ("both", "picture", {"text", "image"}),
    ],
)
def test_search(
    served: Served, events: dict[str, Any], picture: str, by: str, asked: str, inputs: set[str]
) -> None:
    found, took = events["search"](picture, "a cat", by, "photos", 3, 0.25)
    assert [caption for _, caption in found] == [
        f"{0.9 - 0.1 * n:.3f} folder/{asked} {n}<b>" for n in range(3)
    ]
    colours = [image.convert("RGB").getpixel((0, 0)) for image, _ in found]
    assert colours == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert took.endswith("3 found")
    assert {"text", "image"} & given(served).keys() == inputs
    assert given(served)["min_score"].tolist() == [0.25]
    events["search"](picture, "a cat", by, "photos", 3, -1)
    assert "min_score" not in given(served)


def test_segment_draws_the_labels_on_a_picture_that_is_no_larger_than_the_page_shows(
    served: Served, events: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "large.png"
    file.write_bytes(png("red", (3000, 1500)))
    drawn, took = events["segment"](str(file), "sky\nsea", 0, 0.5)
    assert drawn.width == 1024 and drawn.height >= 512 and "release 1" in took
    left, right = (np.array(drawn.convert("RGB").getpixel((x, 256)), int) for x in (100, 900))
    assert abs(left - right).max() > 30
    assert "threshold" not in given(served)
    events["segment"](str(file), "sky\nsea", 0.25, 0.5)
    assert given(served)["threshold"].tolist() == [0.25]


def test_the_page_begins_with_the_release_and_its_indexes(
    events: dict[str, Any], picture: str
) -> None:
    facts, alpha, sets, indexes = events["begin"]()
    assert "release 1 · ViT-B-32 · int8 · any α" in facts
    assert (alpha["visible"], alpha["value"]) == (True, 0.5)
    assert sets["choices"] == ["", "letters"] and sets["value"] == "letters" and sets["visible"]
    assert indexes["choices"] == ["drawings", "photos"] and indexes["value"] == "drawings"
    # Without dynamic α there is no slider, and no α is sent.
    with (
        fake_upstream.serving(lambda: SmallWorld(dynamic_alpha=False)) as served,
        Client(served.url) as client,
    ):
        fixed = handlers(client)
        facts, alpha, _, indexes = fixed["begin"]()
        assert alpha["visible"] is False and "α = 0.5" in facts
        assert indexes["choices"] == [] and indexes["value"] == ""  # nobody said where they are
        fixed["classify"](picture, "cat\ndog", "", 0.7)
        assert "alpha" not in given(served)


def test_what_is_refused_is_said_in_words(
    served: Served, events: dict[str, Any], tmp_path: Path
) -> None:
    import gradio

    asked = len(served.upstream.asked)
    for name in ("classify", "segment"):
        assert events[name](None, "cat", "", 0) == (None, "Drop a picture on the left.")
    both = events["search"](None, "a", "both", "photos", 3, -1)
    assert both == (None, "Drop a picture on the left.")
    assert len(served.upstream.asked) == asked
    with pytest.raises(gradio.Error, match="there are: drawings, photos"):
        events["search"](None, "a cat", "text", "none", 3, -1)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG")
    with pytest.raises(gradio.Error) as caught:
        events["segment"](str(broken), "sky", 0, 0.5)
    assert str(tmp_path) not in str(caught.value)
    served.upstream.error = Refused(400, "invalid_image", "it is none")
    try:
        with pytest.raises(gradio.Error, match="it is none"):
            events["classify"](str(broken), "cat\ndog", "", 0)
    finally:
        served.upstream.error = None


# Who may open it


def get(url: str, path: str = "", **headers: str) -> int:
    answer = urllib3.request(
        "GET", url.rstrip("/") + path, headers=headers, retries=False, timeout=20
    )
    return answer.status


def test_a_page_without_a_login_answers_under_this_machines_names_only(served: Served) -> None:
    port, *_ = free_ports()
    with serving(Settings(served.url, port=port)) as url:
        assert get(url) == get(url, Host=f"localhost:{port}") == 200
        assert get(url, Host="evil.example") == 400
        assert get(url, "/gradio_api/file=/etc/passwd") in (403, 404)
        again = serving(Settings(served.url, port=port))
        with pytest.raises(RAdapterError, match=f"port {port} is taken"):
            again.__enter__()
    with pytest.raises(urllib3.exceptions.HTTPError):
        get(url)


@pytest.mark.filterwarnings("ignore")  # of Gradio, in its own threads
def test_a_page_with_a_login_asks_for_it_and_for_a_gateway_with_its_key(
    tmp_path: Path, picture: str
) -> None:
    from gradio_client import Client as Visitor
    from gradio_client import handle_file

    keys = tmp_path / "keys"
    password = tmp_path / "password"
    password.write_text("open sesame\nand more")
    port, *_ = free_ports()
    key = new_key(keys, "ann")
    with fake_upstream.serving(SmallWorld, api_keys=keys) as served:
        settings = Settings(served.url, key, port=port, user="ann", password_file=password)
        with serving(settings) as url:
            assert get(url, "/config") == 401
            with pytest.raises(ValueError, match="Could not login"):
                Visitor(url, auth=("ann", "wrong"), verbose=False)
            visitor = Visitor(
                url, auth=("ann", "open sesame"), verbose=False, download_files=tmp_path / "down"
            )
            scores, took = visitor.predict(
                handle_file(picture), "cat\ndog", "", 0.5, api_name="/classify"
            )
            assert scores["label"] == "cat" and "release 1" in took
            visitor.close()
    gc.collect()  # sockets that Gradio leaves open are this test's to hear of


# The command

EMPTY = Path(__file__).with_name("__init__.py")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 lets others open the page; give --user NAME"),
        ({"host": "no.such.host.invalid"}, "--host 'no.such.host.invalid'"),
        *(({"port": port}, f"--port is {port}; allowed are 1 to 65535") for port in (0, 65536)),
        ({"user": "ann"}, "--user and --password-file go together"),
        ({"user": "ann", "password_file": Path("/dev/none")}, "/dev/none cannot be read"),
        ({"user": "ann", "password_file": EMPTY}, "its first line is empty"),
    ],
)
def test_settings_that_are_refused(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RAdapterError) as caught:
        replace(Settings(), **options).check()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert Settings(port=65535).check() == ("127.0.0.1", None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(RAdapterError, match=re.escape(install_command("playground"))):
        Settings().check()


# In a browser


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")  # of Gradio, in its own threads
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
