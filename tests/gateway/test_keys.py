"""Keys, their limits, and what the gateway says of each request; and radapter-gateway: its
settings, and the process that it is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone, tzinfo
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3

from radapter_client import Client, RAdapterClientError, ServerUnavailable, Unauthorized
from radapter_serve.cli import gateway, serve
from radapter_serve.errors import RAdapterError
from radapter_serve.gateway import access
from radapter_serve.gateway.access import Keys, TokenBucket
from radapter_serve.gateway.run import GatewayServer
from radapter_serve.gateway.settings import Settings, Timeouts
from radapter_serve.gateway.upstream import LOG, Refused
from radapter_serve.server.config import free_ports
from tests.gateway.test_gateway import ALIVE, BODY, HEAD, heard
from tests.helpers.fake_clock import FakeClock
from tests.helpers.fake_upstream import INFER, TEXT, Served, serving, until
from tests.helpers.gateway import until_asked
from tests.helpers.small_release import png

EMBED_BODY = b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
POST = HEAD + b"Authorization: Bearer %s\r\n"


def line(name: str, key: str, limits: str = "") -> str:
    return f"{name}: {hashlib.sha256(key.encode()).hexdigest()} {limits}\n"


# Files of keys


def test_keys_let_in_and_are_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", LOG.name)
    keys = tmp_path / "keys"
    keys.write_text(f"# callers\n{line('ann', 'first')}\n")
    unauthorized = 401, "unauthorized"
    with serving(api_keys=keys) as served:
        for path in ("/v2", "/metrics", "/v2/models/classify/config", "/v2/models/image_encoder"):
            assert served.refusal(path) == unauthorized
        assert served.ask("/v2")[2]["WWW-Authenticate"] == "Bearer"
        assert served.refusal(INFER, TEXT) == unauthorized
        assert served.ask("/health/live")[0] == served.ask("/health/ready")[0] == 200
        digest = hashlib.sha256(b"first").hexdigest()
        wrong = "first", "Basic first", "Bearer", "Bearer second", f"Bearer {digest}"
        for secret in (*wrong, "Bearer first\xff"):
            assert served.refusal("/v2", Authorization=secret) == unauthorized
        assert served.ask("/v2", authorization="bearer first")[0] == 200
        with Client(served.url, api_key="first") as client:
            assert client.embed_texts(["abc"]).tolist() == [[3, 97]]
            keys.write_text(line("bob", "second"))
            with pytest.raises(Unauthorized):
                client.embed_texts(["abc"])
        assert served.ask("/v2", Authorization="Bearer second")[0] == 200
        for broken in (lambda: keys.write_text("bob second\n"), keys.unlink):
            broken()
            assert served.refusal("/v2", Authorization="Bearer second") == unauthorized
    assert caplog.messages[0] == f"{keys} has changed: 1 keys"


def test_a_key_in_a_trailer_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(line("ann", "first"))
    head = HEAD + b"Transfer-Encoding: chunked\r\nTrailer: Authorization\r\n\r\n"
    chunks = b"%x\r\n%s\r\n0\r\nAuthorization: Bearer first\r\n\r\n" % (len(BODY), BODY)
    with serving(api_keys=tmp_path / "keys") as served, served.connection(head + chunks) as it:
        assert b"401" in heard(it) and not served.upstream.asked


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ("at_once=0", "at_once: Input should be greater than 0"),
        *((limit, "Input should be") for limit in ("at_once=1.5", "requests_per_second=nan")),
        ("until=2027-02-30", "Input should be"),
        ("colour=red", "colour: Extra inputs are not permitted"),
        ("at_once=1 at_once=2", "comes twice"),
        ("at_once =1", "each line is `name: SHA-256 in hex`"),
    ],
)
def test_a_wrong_line_is_named(limits: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# keys\n{line('ann', 'a')}{line('bob', 'b', limits)}")
    with pytest.raises(RAdapterError, match=f"keys, line 3: .*{re.escape(why)}"):
        Keys(path)


def test_keys_that_could_not_be_read_once_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the process has no free descriptor when the file has just changed."""
    path = tmp_path / "keys"
    path.write_text(line("ann", "a"))
    keys = Keys(path)
    path.write_text(line("ann", "a") + line("bob", "b"))

    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as without:
        without.setattr(Path, "read_text", full)
        for _ in range(3):  # a key may be one that was taken out
            with pytest.raises(Refused):
                keys.check("Bearer a")
    assert [keys.check(f"Bearer {key}").name for key in "ab"] == ["ann", "bob"]
    said = [message for message in caplog.messages if message.startswith("no key is accepted")]
    assert len(said) == 1 and "Too many open files" in said[0]


@pytest.mark.parametrize(
    ("day", "works"), [("2026-01-30", True), ("2026-01-31", True), ("2026-02-01", False)]
)
def test_a_key_works_until_the_end_of_its_last_day(
    day: str, works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            assert tz == timezone.utc
            return datetime.fromisoformat(f"{day}T23:59:59+00:00")

    monkeypatch.setattr(access, "datetime", Clock)
    path = tmp_path / "keys"
    path.write_text(line("ann", "a", "until=2026-01-31"))
    if works:
        assert Keys(path).check("Bearer a").name == "ann"
        return
    with pytest.raises(Refused, match="this key ended with 2026-01-31"):
        Keys(path).check("Bearer a")


def test_a_key_works_until_it_is_exchanged(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(line("ann", "old"))
    keys = Keys(path)
    assert keys.check("Bearer old").name == "ann"
    # In place, and by one of equal length, so that file and size stay as they were
    before = path.stat()
    path.write_text(path.read_text().replace(line("ann", "old")[:70], line("ann", "new")[:70]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert keys.check("Bearer new").name == "ann"
    with pytest.raises(Refused):
        keys.check("Bearer old")


# Limits


def test_a_bucket_gives_out_its_limit_and_what_it_held() -> None:
    clock = FakeClock()
    bucket = TokenBucket(3, 1, clock.monotonic)
    assert [bucket.take() for _ in range(3)] == [0, 0, 0]
    seconds = bucket.take()
    assert seconds == pytest.approx(1 / 3)
    clock.now += 0.9 * seconds
    assert bucket.take() == pytest.approx(0.1 * seconds)
    clock.now += 0.1 * seconds
    assert bucket.take() == 0
    # A full bucket gives more than it holds, once, and has a debt then.
    clock.now += 60
    assert bucket.take(5) == 0
    assert bucket.take(5) == pytest.approx(5 / 3)
    slow = TokenBucket(0.5, 60, clock.monotonic)
    assert (slow.take(), slow.take()) == (0, 120)
    clock.now += 30
    assert slow.take() == 90


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(
        line("slow", "s", "requests_per_second=0.5")
        + line("few", "f", "at_once=2")
        + line("photos", "p", "images_per_minute=2")
        + line("free", "x")
    )
    return path


@pytest.fixture
def served(keys: Path) -> Iterator[Served]:
    with serving(api_keys=keys) as served:
        yield served


def test_a_key_that_asks_too_much_is_refused_alone(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        slow, free, few, photos = (
            stack.enter_context(Client(served.url, api_key=key, retries=0, batch_size=1))
            for key in "sxfp"
        )
        slow.embed_texts(["a"])
        with pytest.raises(
            ServerUnavailable, match="slow may send 0.5 requests per sec"
        ) as refused:
            slow.embed_texts(["a"])
        assert (refused.value.code, refused.value.retry_after) == ("rate_limited", 2)
        assert slow.release().version == 1  # no inference
        photos.embed_images([b"\x01", b"\x02"])
        with pytest.raises(ServerUnavailable, match="photos may send 2 images a minute") as refused:
            photos.classify(png(0), ["a"])
        assert 20 < refused.value.retry_after <= 30
        photos.embed_texts(["texts are no images"])
        served.hold()
        threads = stack.enter_context(ThreadPoolExecutor(3))
        calls = [threads.submit(few.embed_texts, ["a"]) for _ in range(3)]
        until(lambda: any(call.done() for call in calls))
        served.let_go()
        assert len([call for call in calls if call.exception()]) == 1
        # Examples are sent with the first image alone.
        label = np.array([[b"a"]], object)
        served.upstream.outputs = {"label": label, "score": np.ones((1, 1), np.float32)}
        free.classify(png(0), examples={"a": [png(2), png(3)], "b": png(4)})
    text = served.metrics(Authorization="Bearer x")
    for metric in (
        'images_total{key="photos"} 2.0',
        'images_total{key="free"} 4.0',
        'requests_total{code="rate_limited",key="photos"} 1.0',
        'requests_total{code="ok",key="photos"} 3.0',
    ):
        assert f"radapter_gateway_key_{metric}" in text


def test_limits_that_change_hold_from_the_next_request_on(keys: Path, served: Served) -> None:
    for limit, status in (("at_once=1", 429), ("at_once=2", 200), ("at_once=1", 429)):
        keys.write_text(line("few", "f", limit))
        served.hold()
        with ThreadPoolExecutor(1) as thread:
            asked = len(served.upstream.asked)
            first = thread.submit(served.ask, INFER, TEXT, Authorization="Bearer f")
            until(lambda: len(served.upstream.asked) > asked)  # noqa: B023
            second = served.connection(POST % b"f" + EMBED_BODY)
            with second as it:
                if status == 200:
                    until(lambda: len(served.upstream.asked) > asked + 1)  # noqa: B023
                else:
                    assert b"HTTP/1.1 429" in heard(it)
                served.let_go()
                assert status == 429 or b"HTTP/1.1 200" in heard(it)
            assert first.result()[0] == 200


def test_unfinished_bodies_of_a_key_are_as_many_as_its_requests_may_be(keys: Path) -> None:
    """Others are refused at their headers, from whatever address they come."""
    with (
        serving(api_keys=keys, max_concurrent=2, max_queue=1, max_connections=12) as served,
        contextlib.ExitStack() as stack,
    ):
        begun = 0
        for key, most in ((b"x", 3), (b"f", 2)):
            for number in range(8):
                address = f"127.0.0.{2 + number % 4}"
                head = POST % key + b"Content-Length: 9\r\n\r\n"
                it = stack.enter_context(served.connection(head, address))
                if number >= most:
                    assert b"HTTP/1.1 429" in heard(it)
                    continue
                begun += 1
                until(lambda: len(served.connections.receiving) == begun)  # noqa: B023
        assert len(served.connections.receiving) == 5
        assert served.ask(INFER, TEXT, Authorization="Bearer p")[0] == 200


# Bodies of refused requests


def test_the_body_of_a_refused_request_is_read_within_limits(keys: Path) -> None:
    """A short one is, and the connection goes on; one that is long, late or waited for ends it."""
    with serving(api_keys=keys, timeouts=Timeouts(idle=1)) as served:
        size = 2**19
        with served.connection(HEAD + b"Content-Length: %d\r\n\r\n" % size) as it:
            assert b"HTTP/1.1 401" in heard(it)
            it.sendall(bytes(size) + ALIVE)
            assert b"HTTP/1.1 200" in heard(it)
        with contextlib.ExitStack() as stack:
            refused = []
            for headers in (
                *(b"Content-Length: 9\r\n", b"Transfer-Encoding: chunked\r\n"),
                b"Content-Length: 9\r\nExpect: 100-continue\r\n",
                b"Content-Length: %d\r\n" % 2**30,
            ):
                refused.append(stack.enter_context(served.connection(HEAD + headers + b"\r\n")))
                assert b"HTTP/1.1 401" in heard(refused[-1])
            with contextlib.suppress(ConnectionError):
                refused[-1].sendall(bytes(2**22))
            for it in refused:
                with contextlib.suppress(ConnectionError):
                    assert it.recv(1) == b""


# One request, followed


def test_an_id_comes_back_with_every_answer_and_in_exceptions(served: Served) -> None:
    def answered(path: str, body: Any = None, **headers: str) -> str:
        return str(served.ask(path, body, Authorization="Bearer x", **headers)[2]["X-Request-Id"])

    embeddings = {"model": "radapter", "input": ["a"]}
    for path, body in ((INFER, TEXT), ("/v1/embeddings", embeddings), ("/v2", None), ("/no", None)):
        assert answered(path, body, X_Request_Id="0af7651916cd43dd-8448") == "0af7651916cd43dd-8448"
        new = {answered(path, body) for _ in range(2)}
        assert len(new) == 2 and all(re.fullmatch("[0-9a-f]{32}", secret) for secret in new)
    for forged in ("", "a b", "a" * 129, 'x"}', "\xc3\xbc", "a,b", "a\tb"):
        assert re.fullmatch("[0-9a-f]{32}", answered("/v2", X_Request_Id=forged))
    served.upstream.error = Refused(400, "no_labels", "no labels")
    with Client(served.url, api_key="x") as client, pytest.raises(RAdapterClientError) as failed:
        client.embed_texts(["a"])
    entry = served.upstream.entries[-1]  # Triton's
    assert failed.value.request_id == entry.id


def test_a_line_a_request(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = {"Authorization": "Bearer x"}
    with serving(api_keys=keys, log="json", max_concurrent=1) as served:
        served.ask(INFER, TEXT, X_Request_Id="my-id", **free)
        served.ask("/health/live", **free)
        served.ask("/v2/models/no/infer", TEXT, **free)
        served.ask("/v2", Authorization="Bearer wrong")
        served.ask("/v1/embeddings", {"model": "radapter", "input": ["a secret"]}, **free)
        said = capsys.readouterr().err
        # One runs, and the other waits in the queue.
        served.hold()
        with ThreadPoolExecutor(2) as threads:
            for _ in range(2):
                threads.submit(served.ask, INFER, TEXT, **free)
            until(lambda: "radapter_gateway_waiting 1.0" in served.metrics(**free))
            time.sleep(0.5)
            served.let_go()
    lines = [json.loads(line) for line in said.splitlines()]
    assert "secret" not in said and "wrong" not in said and "Bearer" not in said
    assert [(line["key"], line["task"], line["status"], line["code"]) for line in lines] == [
        ("free", "embed_text", 200, "ok"),
        ("free", None, 404, "unknown_model"),
        (None, None, 401, "unauthorized"),
        ("free", "embeddings", 200, "ok"),
    ]
    first = lines[0]
    assert list(first) == [
        *("time", "id", "key", "task", "release", "adapter", "alpha", "code", "status"),
        *("bytes_in", "bytes_out", "ms", "queue_ms", "model_ms", "encoder_ms"),
    ]
    assert (first["id"], first["release"], lines[3]["release"]) == ("my-id", "1", "1")
    assert first["bytes_in"] == len(BODY) and first["bytes_out"] > 0
    assert 0 <= first["queue_ms"] + first["model_ms"] <= first["ms"]
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    times = [line for line in lines if line["task"]]
    ran, waited = sorted(times, key=lambda line: float(line["queue_ms"]))
    assert ran["model_ms"] > 500 > ran["queue_ms"]
    assert waited["queue_ms"] > 500 > waited["model_ms"]


# The command


NONE = Path("none.pem")
NONSENSE = Path(__file__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "host 0.0.0.0 lets others in, and there are no keys; make one"),
        ({"host": "no.such.host.invalid"}, "--host 'no.such.host.invalid'"),
        ({"host": "192.0.2.1", "no_api_keys": True}, "cannot listen on 192.0.2.1 port 0"),
        ({"port": 70000}, "port is 70000"),
        ({"timeout": float("inf")}, "--timeout is inf"),
        ({"max_queue": -1}, "--max-queue is -1; allowed are 0 and more"),
        ({"max_connections_per_address": 0}, "--max-connections-per-address is 0; allowed are 1"),
        ({"max_memory": 1.0}, "--max-memory is 1 MiB; allowed are 64 MiB"),
        ({"tls_key": NONE}, "--tls-certificate and --tls-key go together"),
        ({"tls_certificate": NONE, "tls_key": NONE}, "give two PEM files that belong together"),
        ({"tls_certificate": NONSENSE, "tls_key": NONSENSE}, "give two PEM files"),
        ({"api_keys": NONSENSE, "no_api_keys": True}, "--api-keys FILE or --no-api-keys, not"),
        ({"api_keys": NONE}, "cannot read the keys none.pem: No such file or directory; make"),
        ({"api_keys": NONSENSE}, f"{NONSENSE}, line 1: each line is `name: SHA-256 in hex`"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RAdapterError, match=re.escape(message)):
        GatewayServer(Settings(**{"port": 0, **options}))
    assert Settings(host="localhost").check() == "127.0.0.1"
    for others in ({"no_api_keys": True}, {"api_keys": NONSENSE}):
        assert Settings(host="0.0.0.0", **others).check() == "0.0.0.0"


def test_a_new_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    new = ["--api-keys", str(file), "--new-key"]
    assert gateway.main([*new, "ann"]) == 0
    first = capsys.readouterr().out.strip()
    assert file.read_text() == f"ann: {hashlib.sha256(first.encode()).hexdigest()}\n"
    assert len(first) > 40 and file.stat().st_mode & 0o777 == 0o600
    file.write_text(file.read_text().rstrip())
    assert gateway.main([*new, "bob"]) == 0
    second = capsys.readouterr().out.strip()
    assert first != second
    for key in (first, second):
        Keys(file).check(f"Bearer {key}")
    for arguments, message in (
        ([*new, "bob"], "has a key bob already"),
        ([*new, "a: b"], "a name has 1 to 64 letters"),
        (["--new-key", "ann"], "--api-keys FILE"),
    ):
        assert gateway.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert len(file.read_text().splitlines()) == 2


def test_keys_that_are_made_at_once_are_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_and_wait(path: Path) -> str:
        text = read(path)
        time.sleep(0.05)
        return text

    read = access._text
    monkeypatch.setattr(access, "_text", read_and_wait)
    file = tmp_path / "keys"
    names = [f"name{number}" for number in range(5)]
    with ThreadPoolExecutor(len(names)) as pool:
        made = list(pool.map(partial(access.new_key, file), names))
    keys = Keys(file)
    assert [keys.check(f"Bearer {key}").name for key in made] == names


def test_a_gateway_without_triton_lives_on_and_stops_in_order() -> None:
    port, nobody, _ = free_ports()
    flags = ["--port", str(port), "--server", f"127.0.0.1:{nobody}"]

    def status(path: str) -> int | None:
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            url = f"http://127.0.0.1:{port}{path}"
            return urllib3.request("GET", url, retries=False, timeout=20).status
        return None

    def ask() -> None:
        until(lambda: status("/health/live") == 200, 60)
        assert status("/health/ready") == 503
        assert status("/health/live") == 200

    assert until_asked(partial(gateway.main, flags), ask) == 0


def test_a_gateway_that_could_not_start_is_refused_before_the_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags, message in (
            (["--api-keys", "keys"], "--api-keys needs a gateway: --gateway-port PORT"),
            (["--gateway-port", "0", "--gateway-host", "::"], "host :: lets others in"),
            (
                ["--gateway-port", str(taken.getsockname()[1])],
                "--gateway-port or --http-port of radapter-serve",
            ),
        ):
            assert serve.main([str(tmp_path), "--engine", "triton", *flags]) == 2
            assert message in capsys.readouterr().err
        port = str(taken.getsockname()[1])
        assert gateway.main(["--port", port, "--no-api-keys", "--host", "127.0.0.1"]) == 2
        assert f"port {port}: Address already in use; choose another with --port" in (
            capsys.readouterr().err
        )
