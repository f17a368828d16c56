"""What a request spent its time on: in the log, and in spans."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import pytest
import urllib3

from radapter_client import Client
from radapter_serve.encoders.encoder import ENCODER, Step, collected, encoder_ms, step
from radapter_serve.encoders.loaded import load_release
from radapter_serve.index.build import build
from radapter_serve.process import OTLP_ENDPOINTS
from tests.helpers.collector import check_inside, collecting, of_name
from tests.helpers.small_release import photos_in, png
from tests.helpers.ways import in_process

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


def test_steps_are_inside_each_other_also_where_they_fail() -> None:
    with collected() as steps:
        with pytest.raises(ValueError), step("outer"):
            with step("inner"):
                time.sleep(0.01)
            raise ValueError
        with step("next"):
            pass
    [outer, following] = steps
    [inner] = outer.parts
    assert (outer.name, inner.name, following.name) == ("outer", "inner", "next")
    assert outer.start <= inner.start < inner.end <= outer.end <= following.start
    assert inner.end - inner.start >= 10_000_000
    with step("nobody listens"):
        pass
    assert steps == [outer, following]


def test_the_milliseconds_of_encoders() -> None:
    text = Step("text_encoder", 0, 2_000_000)
    task = Step("classify", 0, 9_000_000, (text, Step("image_encoder", 0, 500_000)))
    assert encoder_ms([Step("engine", 0, 10_000_000, (task,)), text]) == 4.5


def test_one_request_followed(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = photos_in(tmp_path / "photos", 1)
    build(photos, tmp_path / "indexes" / "photos", load_release(repository, 2))
    capsys.readouterr()
    image = base64.b64encode(png(3)).decode()
    body = json.dumps(
        {
            "inputs": [
                {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [image]},
                {"name": "labels", "shape": [1, 2], "datatype": "BYTES", "data": ["a", "b"]},
            ]
        }
    )
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "X-Request-Id": "my-id"}
    with collecting() as collector:
        monkeypatch.setenv(OTLP_ENDPOINTS[0], collector.url)
        with in_process(repository, tmp_path / "indexes", log="json") as one:
            url = f"{one.url}/v2/models/classify/infer"
            assert urllib3.request("POST", url, body=body, headers=headers).status == 200
            with Client(one.url) as client:
                client.search("a", index="photos")
    classified = [span for span in collector.spans if span.trace == TRACE]
    names = ("POST /v2/models/{model}/infer", "engine", "classify", "image_encoder")
    gateway, engine, task, encoder = (of_name(classified, name) for name in names)
    assert gateway.parent == CALLER
    check_inside(engine, gateway)
    check_inside(task, engine)
    check_inside(encoder, task)
    check_inside(of_name(classified, "text_encoder"), task)
    for span in classified:
        facts = [span.attributes[f"radapter.{name}"] for name in ("request_id", "task", "code")]
        assert facts == ["my-id", "classify", "ok"] and span.attributes["radapter.release"] == "2"
    searched = [span for span in collector.spans if span.trace != TRACE]
    for name, parent in (
        ("engine", names[0]),
        ("retrieve", "engine"),
        ("text_encoder", "retrieve"),
    ):
        check_inside(of_name(searched, name), of_name(searched, parent))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if "{" in line]
    first = next(line for line in lines if line["id"] == "my-id")
    encoders = [one for one in classified if one.name.endswith(ENCODER)]
    took = sum(span.end - span.start for span in encoders) / 1e6
    assert first["encoder_ms"] == pytest.approx(took, abs=1e-3)
    assert 0 < first["encoder_ms"] < first["model_ms"]
