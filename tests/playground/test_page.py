"""The playground: what its page asks and answers, who may open it, and the command."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
from PIL import Image

from radapter_client import Client, InvalidRequest, Request
from radapter_serve.errors import RAdapterError, install_command
from radapter_serve.playground import PageSettings, serving
from radapter_serve.server.config import free_ports
from tests.helpers.stand_ins import Answers
from tests.helpers.use_playground import chromium, use
from tests.hostile.images import saved

pytestmark = [pytest.mark.slow]  # Gradio takes seconds to load

RED = saved(Image.new("RGB", (40, 30), "red"), "PNG")


@pytest.fixture
def answers() -> Answers:
    return Answers(dynamic_alpha=True, label_sets={"letters": {"labels": 3}})


@pytest.fixture
def client(answers: Answers) -> Client:
    return Client(transport=answers)


@pytest.fixture
def events(client: Client) -> dict[str, Any]:
    """The functions that the page's events call, by their names."""
    return handlers(client)


@pytest.fixture
def server(client: Client, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The server that the page asks: the addresses and keys by which it is asked."""
    asked: list[Any] = []

    def connect(url: str | None, api_key: str | None) -> Client:
        asked.append((url, api_key))
        return client

    monkeypatch.setattr("radapter_serve.playground.Client", connect)
    return asked


@pytest.fixture
def picture(tmp_path: Path) -> str:
    file = tmp_path / "red.png"
    file.write_bytes(RED)
    return str(file)


def handlers(client: Client) -> dict[str, Any]:
    from radapter_serve.playground.page import build

    async def built() -> Any:
        return build(client)

    return {str(event.api_name): event.fn for event in asyncio.run(built()).fns.values()}


def test_an_adapter_is_asked_and_another_one_is_not_shown(
    events: dict[str, Any], answers: Answers, picture: str
) -> None:
    gradio = pytest.importorskip("gradio")
    calls = {
        "classify": (picture, "cat", "", 0.5, "anna"),
        "search": (picture, "cat", "text", "photos", 3, -1, "anna"),
        "segment": (picture, "cat\ndog", 0, 0.5, "anna"),
    }
    for name, values in calls.items():
        with pytest.raises(gradio.Error, match="older than adapters"):  # it gives no receipt
            events[name](*values)
        assert answers.inferences[-1].inputs["adapter"].ravel().tolist() == [b"anna"]


@pytest.mark.parametrize("dynamic_alpha", [True, False])
def test_an_adapter_has_an_alpha_of_its_own(picture: str, dynamic_alpha: bool) -> None:
    """The slider is the release's; without an α, the server takes the adapter's."""

    class Signing(Answers):
        def send(self, request: Request, timeout: float) -> Any:
            reply = super().send(request, timeout)
            if request.action == "infer":
                alpha = float(request.inputs.get("alpha", np.array([0.75])).ravel()[0])
                receipt = json.dumps({"release": 2, "adapter": "anna", "alpha": alpha}).encode()
                reply.outputs["receipt"] = np.array([receipt], object)
                if request.model == "classify":
                    reply.outputs["receipt"] = reply.outputs["receipt"].reshape(1, 1)
            return reply

    answers = Signing(dynamic_alpha=dynamic_alpha)
    calls = {
        "classify": (picture, "cat", "", 0.5, "anna"),
        "search": (picture, "cat", "text", "photos", 3, -1, "anna"),
        "segment": (picture, "cat\ndog", 0, 0.5, "anna"),
    }
    asking = handlers(Client(transport=answers))
    for name, values in calls.items():
        for strength, said in ((None, 0.75), (0.25, 0.25)):
            _, took = asking[name](*values, strength)
            assert ("alpha" in answers.inferences[-1].inputs) == (strength is not None)
            assert f"anna at α = {said:g}" in took


def test_classify_gives_the_scores_at_any_alpha(
    answers: Answers, events: dict[str, Any], picture: str
) -> None:
    for alpha in (0, 0.5, 1):
        scores, took = events["classify"](picture, "cat\n\n <dog> \n", "", alpha)
        assert scores == pytest.approx({"cat": 0.75 + alpha / 5, "<dog>": 0.25})
        assert took.endswith(" ms · release 2")
        assert answers.inferences[-1].inputs["image"].tolist() == [[RED]]  # the file as it is
    assert list(events["classify"](picture, "cat", "letters", 0)[0]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("by", "inputs"), [("text", {"text"}), ("picture", {"image"}), ("both", {"text", "image"})]
)
def test_search(
    answers: Answers, events: dict[str, Any], picture: str, by: str, inputs: set[str]
) -> None:
    hits, took = events["search"](picture, "a cat", by, "photos", 3, 0.25)
    captions = [caption for _, caption in hits]
    assert captions == ["0.750 ordner/bild [b]ü.jpg", "0.500 b.jpg", "-0.500 c.jpg"]
    colours = [image.convert("RGB").getpixel((0, 0)) for image, _ in hits]
    assert colours == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert took.endswith("3 found")
    asked = answers.inferences[-1].inputs
    assert {"text", "image"} & asked.keys() == inputs
    assert asked["min_score"].tolist() == [0.25]
    events["search"](picture, "a cat", by, "photos", 3, -1)
    assert "min_score" not in answers.inferences[-1].inputs


def test_segment_draws_the_labels_on_a_picture_that_is_no_larger_than_the_page_shows(
    answers: Answers, events: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "large.png"
    file.write_bytes(saved(Image.new("RGB", (3000, 1500), "red"), "PNG"))
    drawn, took = events["segment"](str(file), "sky\nsea", 0, 0.5)
    assert drawn.width == 1024 and drawn.height >= 512 and "release 2" in took
    left, right = (np.array(drawn.convert("RGB").getpixel((x, 256)), int) for x in (100, 101))
    assert abs(left - right).max() > 30
    assert "threshold" not in answers.inferences[-1].inputs
    events["segment"](str(file), "sky\nsea", 0.25, 0.5)
    assert answers.inferences[-1].inputs["threshold"].tolist() == [0.25]


def test_the_page_begins_with_the_release_and_its_indexes(
    events: dict[str, Any], picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, alpha, sets, indexes = events["begin"]()
    assert "release 2 · ViT-B-32 · fp32 · any α" in facts
    assert (alpha["visible"], alpha["value"]) == (True, 0.5)
    assert sets["choices"] == ["", "letters"] and sets["value"] == "letters" and sets["visible"]
    assert indexes["choices"] == ["photos"] and indexes["value"] == "photos"

    # Without dynamic α there is no slider, and no α is sent; Triton lists no indexes.
    def refuse() -> list[str]:
        raise InvalidRequest("no list")

    answers = Answers()
    client = Client(transport=answers)
    monkeypatch.setattr(client, "indexes", refuse)
    fixed = handlers(client)
    facts, alpha, _, indexes = fixed["begin"]()
    assert alpha["visible"] is False and "α = 0.5" in facts
    assert indexes["choices"] == [] and indexes["value"] == ""
    fixed["classify"](picture, "cat\ndog", "", 0.7)
    assert "alpha" not in answers.inferences[-1].inputs


def test_what_is_refused_is_said_in_words(
    answers: Answers, events: dict[str, Any], tmp_path: Path
) -> None:
    import gradio

    for name in ("classify", "segment"):
        assert events[name](None, "cat", "", 0) == (None, "Drop a picture on the left.")
    both = events["search"](None, "a", "both", "photos", 3, -1)
    assert both == (None, "Drop a picture on the left.")
    assert not answers.inferences
    with pytest.raises(gradio.Error, match="there are: photos"):
        events["search"](None, "a cat", "text", "none", 3, -1)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"broken")
    with pytest.raises(gradio.Error) as caught:
        events["segment"](str(broken), "sky", 0, 0.5)
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(gradio.Error, match="no image"):
        events["classify"](str(broken), "cat\ndog", "", 0)


# Access


def get(url: str, path: str = "", **headers: str) -> int:
    answer = urllib3.request(
        "GET", url.rstrip("/") + path, headers=headers, retries=False, timeout=20
    )
    return answer.status


def test_a_page_without_a_login_answers_under_this_machines_names_only(server: list[Any]) -> None:
    port, *_ = free_ports()
    with serving(PageSettings(port=port)) as url:
        assert get(url) == get(url, Host=f"localhost:{port}") == 200
        assert get(url, Host="evil.example") == 400
        assert get(url, "/gradio_api/file=/etc/passwd") in (403, 404)
        again = serving(PageSettings(port=port))
        with pytest.raises(RAdapterError, match=f"port {port} is taken"):
            again.__enter__()
    with pytest.raises(urllib3.exceptions.HTTPError):
        get(url)


@pytest.mark.filterwarnings("ignore")  # of Gradio, in its own threads
def test_a_page_with_a_login_asks_for_it_and_asks_a_gateway_with_its_key(
    server: list[Any], tmp_path: Path, picture: str
) -> None:
    from gradio_client import Client as Visitor
    from gradio_client import handle_file

    password = tmp_path / "password"
    password.write_text("open sesame\nand more")
    port, *_ = free_ports()
    address = "https://gateway:8080"
    with serving(
        PageSettings(address, "key", port=port, user="ann", password_file=password)
    ) as url:
        assert server == [(address, "key")]
        assert get(url, "/config") == 401
        with pytest.raises(ValueError, match="Could not login"):
            Visitor(url, auth=("ann", "wrong"), verbose=False)
        visitor = Visitor(
            url, auth=("ann", "open sesame"), verbose=False, download_files=tmp_path / "down"
        )
        scores, took = visitor.predict(
            handle_file(picture), "cat\ndog", "", 0.5, api_name="/classify"
        )
        assert scores["label"] == "cat" and "release 2" in took
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
        replace(PageSettings(), **options).check()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert PageSettings(port=65535).check() == ("127.0.0.1", None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(RAdapterError, match=re.escape(install_command("playground"))):
        PageSettings().check()


# In a browser


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")  # of Gradio, in its own threads
def test_a_visitor_asks_every_task_and_nothing_comes_from_elsewhere(
    server: list[Any], picture: str
) -> None:
    port, *_ = free_ports()
    asked = list[str]()
    with serving(PageSettings(port=port)) as url, chromium() as browser:
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.set_default_timeout(60_000)
        page.goto(url)
        use(page, picture, picture, moves=True)
    assert asked and all(address.startswith((url, "data:", "blob:")) for address in asked), asked
    gc.collect()  # sockets that Gradio leaves open are this test's to hear of
