"""Adapters at the gateway: receipts, names of models, and keys that ask and see only their own."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_serve.errors import RAdapterError
from radapter_serve.gateway.access import Keys
from radapter_serve.gateway.upstream import Refused
from radapter_serve.process import OTLP_ENDPOINTS
from radapter_serve.release.adapters import AdapterFacts, add
from radapter_serve.release.release import Release
from tests.helpers.collector import collecting
from tests.helpers.fake_server import release
from tests.helpers.fake_upstream import INFER, Served, config, serving

KEYS = {"ann": "adapters=anna,annette", "bob": "adapters=-,bob", "root": ""}


def asking(*names: str) -> dict[str, Any]:
    """A request with a row for each name."""
    column = {"shape": [len(names), 1], "datatype": "BYTES"}
    inputs = [{**column, "name": "text", "data": ["abc"] * len(names)}]
    if any(names):
        inputs.append({**column, "name": "adapter", "data": list(names)})
    return {"inputs": inputs}


def text_tower(version: int) -> str:
    """Digest of the text tower of the stand-in's release."""
    served = Release.from_dict(release(version))
    return served.text_tower.digest(served.alpha)


def put(folder: Path, name: str, tower: str) -> None:
    facts = AdapterFacts(text_tower=tower, width=4, alpha=0.5)
    add(folder, name, facts, (np.eye(4, dtype=np.float32),))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    for name in ("anna", "bob"):
        put(folder, name, text_tower(1))
    return folder


@pytest.fixture
def guarded(repository: Path, tmp_path: Path) -> Iterator[Served]:
    keys = tmp_path / "keys"
    lines = [
        f"{name}: {hashlib.sha256(name.encode()).hexdigest()} {limits}\n"
        for name, limits in KEYS.items()
    ]
    keys.write_text("".join(lines))
    with serving(api_keys=keys, model_repository=repository) as served:
        yield served


def test_a_receipt_is_repeated_in_the_parameters_and_a_header(served: Served) -> None:
    status, answer, headers = served.ask(INFER, asking("anna", "anna"))
    assert status == 200
    expected = {"release": 1, "adapter": "anna", "alpha": 0.5}
    assert json.loads(headers["radapter-receipt"]) == expected
    assert json.loads(answer["parameters"]["receipt"]) == expected

    _, answer, headers = served.ask(INFER, asking("jürgen"))
    assert json.loads(headers["radapter-receipt"])["adapter"] == "jürgen"
    for body in (asking("anna", "bob"), asking("")):  # rows that differ, and an older server
        _, answer, headers = served.ask(INFER, body)
        assert "radapter-receipt" not in headers and "parameters" not in answer


@pytest.mark.parametrize(
    ("key", "names", "message"),
    [
        ("ann", ["bob"], "there is no adapter 'bob' here; 2 others are served"),
        ("ann", ["nobody"], "there is no adapter 'nobody' here; 2 others are served"),
        ("ann", ["anna", "bob"], "there is no adapter 'bob' here"),
        ("ann", ["ann"], "there is no adapter 'ann' here; the nearest are: anna, annette"),
        ("ann", [""], "this key asks adapters only"),
        ("ann", ["anna", ""], "this key asks adapters only"),
        ("bob", ["anna"], "there is no adapter 'anna' here; 1 others are served"),
    ],
)
def test_adapters_of_others_are_unknown(
    guarded: Served, key: str, names: list[str], message: str
) -> None:
    status, answer, _ = guarded.ask(INFER, asking(*names), Authorization=f"Bearer {key}")
    assert (status, answer["error"][: len(message) + 18]) == (400, f"[unknown_adapter] {message}")
    assert not guarded.upstream.asked


def test_a_key_asks_its_own_adapters(guarded: Served) -> None:
    allowed = [("ann", "anna"), ("bob", "bob"), ("bob", ""), ("root", "anna"), ("root", "")]
    for key, name in allowed:
        assert guarded.ask(INFER, asking(name), Authorization=f"Bearer {key}")[0] == 200


@pytest.mark.parametrize("name", ["anna", "annette"])
def test_a_refusal_of_the_server_names_no_adapter_of_others(guarded: Served, name: str) -> None:
    said = f"there is no adapter '{name}' here; the nearest are: anna, secret"
    guarded.upstream.error = Refused(400, "unknown_adapter", said)
    alone = f"there is no adapter '{name}' here; the nearest are: ann"
    for path, body, message in (
        (INFER, asking(name), alone),
        (INFER, asking("anna", "annette"), "not all of the adapters 'anna, annette' are here"),
        ("/v1/embeddings", {"model": f"radapter:{name}", "input": "a"}, alone),
    ):
        status, answer, _ = guarded.ask(path, body, Authorization="Bearer ann")
        assert status == 400 and "secret" not in str(answer)
        assert message in str(answer)
        assert "secret" in str(guarded.ask(path, body, Authorization="Bearer root")[1])


def test_models_are_the_releases_and_the_adapters_that_a_key_sees(guarded: Served) -> None:
    def seen(key: str) -> dict[str, str | None]:
        _, answer, _ = guarded.ask("/v1/models", Authorization=f"Bearer {key}")
        return {model["id"]: model.get("parent") for model in answer["data"]}

    releases = {"radapter": None, "radapter-1": None}
    assert seen("root") == {**releases, "anna": "radapter", "bob": "radapter"}
    assert seen("ann") == {"anna": "radapter"}
    assert seen("bob") == {**releases, "bob": "radapter"}
    asked = guarded.ask("/v1/models/radapter-1:anna", Authorization="Bearer ann")[1]
    assert (asked["parent"], asked["adapter"]) == ("radapter-1", "anna")
    assert guarded.ask("/v1/models/bob", Authorization="Bearer ann")[0] == 404
    assert guarded.ask("/v1/models/radapter", Authorization="Bearer ann")[0] == 400


def test_models_are_the_adapters_that_can_be_asked(guarded: Served, repository: Path) -> None:
    """An adapter of an older release is asked with it, and one of no served release not at all."""
    put(repository, "foreign", "sha256:" + "f" * 64)
    put(repository, "newer", text_tower(2))
    releases = [release(1), release(2)]
    guarded.upstream.configs["embed_text"] = config("embed_text", *releases)
    _, answer, _ = guarded.ask("/v1/models", Authorization="Bearer root")
    parents = {model["id"]: model["parent"] for model in answer["data"] if "parent" in model}
    assert parents == {
        "newer": "radapter",
        "radapter-1:anna": "radapter-1",
        "radapter-1:bob": "radapter-1",
    }
    for name in parents:
        assert guarded.ask(f"/v1/models/{name}", Authorization="Bearer root")[0] == 200
    for name in ("foreign", "anna"):
        assert guarded.ask(f"/v1/models/{name}", Authorization="Bearer root")[0] == 404


def test_the_list_of_adapters_is_read_once(
    guarded: Served, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> list[str]:
        _, answer, _ = guarded.ask("/v1/models", Authorization="Bearer root")
        return [model["id"] for model in answer["data"] if "parent" in model]

    assert names() == ["anna", "bob"]
    with monkeypatch.context() as patch:
        patch.setattr("radapter_serve.release.adapters.read_list", None)  # calling it fails
        assert names() == ["anna", "bob"]
    put(repository, "carl", text_tower(1))
    assert names() == ["anna", "bob", "carl"]
    (repository / "adapters" / "served.json").write_text("{")
    assert names() == ["anna", "bob", "carl"]


@pytest.mark.parametrize("model", ["anna", "radapter:anna", "radapter-1:anna"])
def test_embeddings_of_an_adapter(guarded: Served, model: str) -> None:
    image = b"\xff\xd8" + b"x" * 9
    url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    body = {"model": model, "input": ["abc", url], "alpha": 0.5}
    status, answer, headers = guarded.ask("/v1/embeddings", body, Authorization="Bearer ann")
    assert status == 200 and answer["model"] == model
    assert [row["embedding"][0] for row in answer["data"]] == [3, 11]
    assert json.loads(headers["radapter-receipt"]) == answer["receipt"]
    assert answer["receipt"]["adapter"] == "anna"
    assert all(
        {*request.inputs["adapter"].ravel()} == {"anna"} for request in guarded.upstream.asked
    )


def test_models_that_a_key_does_not_have(guarded: Served) -> None:
    for model, status in (("bob", 404), ("ana", 404), ("radapter:bob", 400), ("radapter", 400)):
        body = {"model": model, "input": "a"}
        answer = guarded.ask("/v1/embeddings", body, Authorization="Bearer ann")
        assert answer[0] == status
        assert ("anna" in str(answer[1])) == (model == "ana")
    assert not guarded.upstream.asked


def test_embeddings_of_another_adapter_are_not_answered(guarded: Served) -> None:
    receipt = np.array([[b'{"release": 1, "adapter": "bob", "alpha": 0.5}']], object)
    embeds = {"text_embeds": np.ones((1, 4), np.float32)}
    for outputs in (embeds, {**embeds, "receipt": receipt}):
        guarded.upstream.outputs = outputs
        body = {"model": "anna", "input": "a"}
        assert guarded.ask("/v1/embeddings", body, Authorization="Bearer ann")[0] == 503


def test_log_and_metrics_name_the_adapter(
    repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(log="json", model_repository=repository) as served:
        for name in ("anna", "anna", ""):
            served.ask(INFER, asking(name))
        served.ask("/v1/embeddings", {"model": "anna", "input": "abc"})
        served.upstream.error = Refused(400, "unknown_adapter", "there is none")
        served.ask(INFER, asking("made up"))
        metrics = served.metrics()
    logged = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line[0] == "{"]
    points = [
        (entry["release"], entry["adapter"], entry["alpha"]) for entry in logged if entry["task"]
    ]
    of_anna = ("1", "anna", 0.5)
    assert points == [of_anna, of_anna, ("1", None, None), of_anna, (None, "made up", None)]
    assert 'adapter_requests_total{adapter="anna",code="ok"} 3.0' in metrics
    assert 'adapter_requests_total{adapter="other",code="unknown_adapter"} 1.0' in metrics
    assert "made up" not in metrics


def test_the_spans_of_a_request_name_its_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector:
        monkeypatch.setenv(OTLP_ENDPOINTS[0], collector.url)
        with serving() as served:
            for names in (["anna"], [""], ["anna", "bob"]):
                served.ask(INFER, asking(*names))
    facts = ("radapter.release", "radapter.adapter", "radapter.alpha")
    points = [tuple(map(span.attributes.get, facts)) for span in collector.spans]
    assert points == [("1", "anna", 0.5), ("1", None, None), ("1", "several", None)]


def test_a_key_of_some_adapters_reads_no_metrics_which_name_all(guarded: Served) -> None:
    guarded.ask(INFER, asking("anna"), Authorization="Bearer root")
    for key in ("ann", "bob"):
        status, answer, _ = guarded.ask("/metrics", Authorization=f"Bearer {key}")
        assert status == 401 and answer["error"].startswith("[unauthorized] this key is for some")
    assert 'adapter="anna"' in guarded.metrics(Authorization="Bearer root")


def test_labels_of_metrics_are_few() -> None:
    with serving() as served:
        for number in range(105):
            served.ask(INFER, asking(f"shop {number}"))
        assert 'adapter_requests_total{adapter="other",code="ok"} 5.0' in served.metrics()


def test_a_line_of_the_file_of_keys_without_a_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"ann: {'0' * 64} adapters=,\n")
    with pytest.raises(RAdapterError, match="line 1.*adapters"):
        Keys(tmp_path / "keys")
