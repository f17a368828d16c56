"""Keys with limits of their own, and what the gateway says of each request."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import urllib3
from hypothesis import given
from hypothesis import strategies as st

from radapter_client import Client, ServerUnavailable, Unauthorized
from radapter_serve.errors import RAdapterError
from radapter_serve.gateway.errors import Refused
from radapter_serve.gateway.keys import Key, Keys
from radapter_serve.gateway.limits import Quota, TokenBucket
from radapter_serve.gateway.settings import Timeouts
from tests.helpers.fake_clock import FakeClock
from tests.helpers.fake_upstream import Served, serving
from tests.helpers.small_release import png

DIGEST = "0" * 64


def line(name: str, key: str, limits: str = "") -> str:
    return f"{name}: {hashlib.sha256(key.encode()).hexdigest()} {limits}\n"


# The limits of a key


@given(
    limit=st.floats(0.1, 50),
    period=st.sampled_from([1.0, 60.0]),
    steps=st.lists(st.tuples(st.floats(0, 5), st.integers(1, 8)), max_size=40),
)
def test_a_bucket_gives_out_its_limit_and_what_it_held(
    limit: float, period: float, steps: list[tuple[float, int]]
) -> None:
    clock = FakeClock()
    bucket = TokenBucket(limit, period, clock.monotonic)
    size = max(1.0, limit)
    start = clock.now
    taken = 0
    for pause, count in steps:
        clock.now += pause
        seconds = bucket.take(count)
        if seconds == 0:
            taken += count
        else:  # what it says is when it is there, and not before
            clock.now += seconds * 0.99
            assert bucket.take(count) > 0
            clock.now += seconds * 0.01 + 1e-6
            assert bucket.take(count) == 0
            taken += count
        # A full bucket gives more than it holds, once, and has a debt then.
        assert taken <= size + (clock.now - start) * limit / period + max(0, count - size) + 1e-6


def test_a_key_is_refused_by_each_limit_alone() -> None:
    clock = FakeClock()
    quota = Quota(Key("ann", DIGEST, 2, 3, 60), clock.monotonic)
    for _ in range(2):
        with quota.request():
            pass
    with pytest.raises(Refused, match="key ann may send 2 requests a second") as refused:
        quota.request().__enter__()
    assert (refused.value.status, refused.value.retry_after) == (429, 1)
    clock.now += 60
    with contextlib.ExitStack() as running:
        for _ in range(3):
            running.enter_context(quota.request())
            clock.now += 1
        with pytest.raises(Refused, match="3 requests at once"):
            quota.request().__enter__()
    clock.now += 1
    with quota.request():
        quota.images(60)
        with pytest.raises(Refused, match="60 images a minute") as refused:
            quota.images(30)
    assert refused.value.retry_after == 30
    clock.now += 30
    quota.images(30)


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ("at_once=0", "at_once=0 is invalid; write at_once=4"),
        ("at_once=1.5", "at_once=1.5 is invalid"),
        ("requests_per_second=0", "requests_per_second=0 is invalid"),
        ("requests_per_second=nan", "requests_per_second=nan is invalid"),
        ("images_per_minute=inf", "images_per_minute=inf is invalid"),
        ("until=tomorrow", "until=tomorrow is invalid; write until=2027-12-31"),
        ("until=2027-02-30", "is invalid"),
        ("colour=red", "colour is not a limit, or comes twice; there are requests_per_second, at_"),
        ("at_once=1 at_once=2", "at_once is not a limit, or comes twice"),
        ("at_once", "each line is `name: SHA-256 in hex`"),
        ("at_once =1", "each line is"),
    ],
)
def test_a_line_that_is_none_is_named(limits: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# keys\n{line('ann', 'a')}{line('bob', 'b', limits)}")
    with pytest.raises(RAdapterError, match=f"keys, line 3: .*{re.escape(why)}"):
        Keys(path)


def test_a_key_works_until_its_last_day(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(line("ann", "a", "until=2027-01-31") + line("bob", "b"))
    last, after = (
        Keys(path, today=lambda day=day: day)  # type: ignore[misc]
        for day in (date(2027, 1, 31), date(2027, 2, 1))
    )
    assert last.check("Bearer a") == Key(
        "ann", last.check("Bearer a").digest, until=date(2027, 1, 31)
    )
    with pytest.raises(Refused, match="this key ended with 2027-01-31") as refused:
        after.check("Bearer a")
    assert (refused.value.status, after.check("Bearer b").name) == (401, "bob")


def test_a_key_that_is_exchanged_in_place_no_longer_works(tmp_path: Path) -> None:
    """By one of equal length, so that file and size stay as they were."""
    path = tmp_path / "keys"
    path.write_text(line("ann", "old"))
    keys = Keys(path)
    assert keys.check("Bearer old").name == "ann"
    before = path.stat()
    path.write_text(line("ann", "new"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    after = path.stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    assert keys.check("Bearer new").name == "ann"
    with pytest.raises(Refused, match="with a key of this gateway"):
        keys.check("Bearer old")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(
        line("slow", "s", "requests_per_second=0.5")
        + line("soon", "n", "requests_per_second=1")
        + line("few", "f", "at_once=2")
        + line("photos", "p", "images_per_minute=2")
        + line("free", "x")
        + line("past", "o", "until=2020-01-01")
    )
    return path


@pytest.fixture
def served(keys: Path) -> Iterator[Served]:
    with serving(api_keys=keys) as served:
        yield served


def test_a_key_that_asks_too_much_is_refused_alone(served: Served) -> None:
    with (
        Client(served.url, api_key="s", retries=0) as slow,
        Client(served.url, api_key="x", retries=0) as free,
    ):
        slow.embed_texts(["a"])
        with pytest.raises(ServerUnavailable, match="slow may send 0.5 requests a sec") as refused:
            slow.embed_texts(["a"])
        assert (refused.value.code, refused.value.retry_after) == ("rate_limited", 2)
        assert slow.release().version == 1  # what computes nothing is not counted
        for _ in range(20):
            free.embed_texts(["a"])
    with Client(served.url, api_key="n", retries=2) as patient:
        patient.embed_texts(["a"])
        assert len(patient.embed_texts(["a"])) == 1  # after the wait that the gateway names


def test_a_key_has_so_many_requests_at_once(served: Served) -> None:
    served.hold()
    with Client(served.url, api_key="f", retries=0) as few, ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(few.embed_texts, ["a"]) for _ in range(3)]
        while not any(one.done() for one in asked):
            time.sleep(0.01)
        served.let_go()
        errors = [one.exception() for one in asked]
    assert [error for error in errors if error] and errors.count(None) == 2
    assert "few may send 2 requests at once" in str(next(error for error in errors if error))


def test_images_are_counted(served: Served) -> None:
    with Client(served.url, api_key="p", retries=0, batch_size=1) as photos:
        photos.embed_images([b"\x01", b"\x02"])
        with pytest.raises(ServerUnavailable, match="photos may send 2 images a minute"):
            photos.classify(png(0), ["a"])
        photos.embed_texts(["texts are no images"])
    with Client(served.url, api_key="x", retries=0) as free:
        served.upstream.outputs = {
            "label": np.array([[b"a"], [b"a"]], object),
            "score": np.ones((2, 1), np.float32),
        }
        # Examples are sent with the first image alone.
        free.classify([png(0), png(1)], examples={"a": [png(2), png(3)], "b": png(4)})
    with pytest.raises(Unauthorized, match="this key ended with 2020-01-01"):
        Client(served.url, api_key="o").embed_texts(["a"])
    text = urllib3.request(
        "GET", f"{served.url}/metrics", headers={"Authorization": "Bearer x"}
    ).data.decode()
    assert 'radapter_gateway_key_images_total{key="photos"} 2.0' in text
    assert 'radapter_gateway_key_images_total{key="free"} 5.0' in text
    assert 'radapter_gateway_key_requests_total{code="rate_limited",key="photos"} 1.0' in text
    assert 'radapter_gateway_key_requests_total{code="ok",key="photos"} 3.0' in text


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/v2/models/embed_text/infer", "s", 429),
        ("/v2/models/embed_text/infer", "wrong", 401),
        ("/v2/models/none/infer", "x", 404),
        ("/v1/nowhere", "x", 404),
    ],
)
def test_who_is_refused_while_he_sends_reads_why(
    served: Served, path: str, key: str, status: int
) -> None:
    """He is not cut off, and the connection stays open."""
    body = json.dumps({**TEXT, "parameters": {"padding": "x" * 300_000}})
    with Client(served.url, api_key="s", retries=0) as slow:
        slow.embed_texts(["a"])
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    for _ in range(20):
        connection.request("POST", path, body, {"Authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        answer.read()
        assert (answer.status, answer.getheader("Connection")) == (status, None)
    connection.close()


@pytest.mark.parametrize(
    "headers", [f"Content-Length: {2**20 + 1}", "Content-Length: 9\r\nExpect: 100-continue"]
)
def test_a_refusal_that_does_not_wait_for_the_body(served: Served, headers: str) -> None:
    start = time.monotonic()
    assert refused_at_once(served.port, headers) == (401, "close")
    assert time.monotonic() - start < 0.9


def test_a_refusal_waits_for_a_body_that_does_not_come(keys: Path) -> None:
    with serving(api_keys=keys, timeouts=Timeouts(discard=0.1)) as served:
        assert refused_at_once(served.port, "Content-Length: 9") == (401, "close")
        assert refused_at_once(served.port, "Transfer-Encoding: chunked") == (401, "close")


def refused_at_once(port: int, headers: str) -> tuple[int, str | None]:
    """Status and connection of the answer to a POST whose body never comes."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        head = f"POST /v2/models/embed_text/infer HTTP/1.1\r\nHost: localhost\r\n{headers}"
        connection.sendall(f"{head}\r\n\r\n".encode())
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, answer.getheader("Connection")


# One request, followed

TEXT = {"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["secret"]}]}
INFER = "/v2/models/embed_text/infer"


def headers_of(served: Served, path: str, request_id: str | None, body: object = None) -> str:
    """The id that an answer has."""
    headers = {"Authorization": "Bearer x"}
    if request_id is not None:
        headers["X-Request-Id"] = request_id
    sent = None if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    answer = urllib3.request(method, served.url + path, body=sent, headers=headers, retries=False)
    return answer.headers["X-Request-Id"]


@pytest.mark.parametrize("path", [INFER, "/v2", "/no/such/path", "/health/live", "/v1/models/x"])
def test_an_id_comes_back_with_every_answer(served: Served, path: str) -> None:
    body = TEXT if path == INFER else None
    assert headers_of(served, path, "0af7651916cd43dd8448eb211c80319c", body) == (
        "0af7651916cd43dd8448eb211c80319c"
    )
    made = {headers_of(served, path, None, body) for _ in range(3)}
    assert len(made) == 3 and all(re.fullmatch("[0-9a-f]{32}", one) for one in made)


@pytest.mark.parametrize("bad", ["", "a b", "a" * 129, 'x"}', "ü", "a,b", "a\tb"])
def test_an_id_that_could_forge_a_line_is_replaced(served: Served, bad: str) -> None:
    assert re.fullmatch("[0-9a-f]{32}", headers_of(served, "/v2", bad.encode().decode("latin-1")))


def last_id(served: Served) -> str:
    """The id that came to the model with the last request."""
    followed = served.upstream.entries[-1]
    assert followed is not None
    return followed.id


def test_triton_and_the_clients_exceptions_have_the_id(served: Served) -> None:
    headers_of(served, INFER, "my-id.1", TEXT)
    assert last_id(served) == "my-id.1"
    body = {"model": "radapter", "input": ["a"]}
    assert headers_of(served, "/v1/embeddings", "my-id.2", body) == "my-id.2"
    assert last_id(served) == "my-id.2"
    served.upstream.error = Refused(400, "no_labels", "no labels")
    with Client(served.url, api_key="x") as client, pytest.raises(Exception) as failed:
        client.embed_texts(["a"])
    assert failed.value.request_id == last_id(served)  # type: ignore[attr-defined]


def test_a_line_a_request_in_json(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(api_keys=keys, log="json") as served:
        headers_of(served, INFER, "my-id", TEXT)
        headers_of(served, "/health/live", None)
        headers_of(served, "/v2/models/no/infer", None, TEXT)
        urllib3.request("GET", f"{served.url}/v2", headers={"Authorization": "Bearer wrong"})
        headers_of(served, "/v1/embeddings", None, {"model": "radapter", "input": ["secret"]})
    said = capsys.readouterr().err
    lines = [json.loads(one) for one in said.splitlines()]
    assert "secret" not in said and "wrong" not in said and "Bearer" not in said
    assert [(one["key"], one["task"], one["status"], one["code"]) for one in lines] == [
        ("free", "embed_text", 200, "ok"),
        ("free", None, 404, "unknown_model"),
        (None, None, 401, "unauthorized"),
        ("free", "embeddings", 200, "ok"),
    ]
    first = lines[0]
    assert (first["id"], first["release"]) == ("my-id", "1")
    assert first["bytes_in"] == len(json.dumps(TEXT)) and first["bytes_out"] > 0
    assert 0 <= first["queue_ms"] + first["model_ms"] <= first["ms"]
    assert lines[3]["release"] == "1"


def test_the_time_of_a_refusal_is_without_the_wait_for_its_body(
    keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(api_keys=keys, log="json", timeouts=Timeouts(discard=0.5)) as served:
        assert refused_at_once(served.port, "Content-Length: 9") == (401, "close")
    assert json.loads(capsys.readouterr().err)["ms"] < 400


def test_time_in_the_queue_and_in_the_model_are_told_apart(
    keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        serving(api_keys=keys, log="json", max_concurrent=1) as served,
        ThreadPoolExecutor(2) as threads,
    ):
        served.hold()
        asked = [threads.submit(headers_of, served, INFER, None, TEXT) for _ in range(2)]
        time.sleep(0.3)
        served.let_go()
        assert all(one.result() for one in asked)
    lines = [json.loads(one) for one in capsys.readouterr().err.splitlines()]
    ran, waited = sorted(lines, key=lambda one: float(one["queue_ms"]))
    assert ran["model_ms"] > 200 > 100 > ran["queue_ms"]
    assert waited["queue_ms"] > 200 > 100 > waited["model_ms"]


def test_a_line_a_request_in_words(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(api_keys=keys, log="line") as served:
        headers_of(served, INFER, "my-id", TEXT)
    [said] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"2\S+ my-id free embed_text 200 ok release 1, \d+ bytes in, \d+ out, [\d.]+ ms"
        r" \(queue [\d.]+, model [\d.]+\)",
        said,
    )
