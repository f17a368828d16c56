"""Images by URL: from hosts that are allowed and public, and from no others whatever a caller or a host tries."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import urllib3

from radapter_serve.errors import RAdapterError
from radapter_serve.gateway import fetch
from radapter_serve.gateway.errors import Refused
from radapter_serve.gateway.fetch import Fetcher, Unfetched, is_public
from radapter_serve.gateway.run import command
from radapter_serve.gateway.settings import Settings
from tests.helpers.fake_upstream import serving
from tests.helpers.small_release import png
from tests.helpers.stand_ins import http_server

PNG = png(1, 9, 7)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        *((private, False) for private in ("127.0.0.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254")),
        *((private, False) for private in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "198.18.0.1")),
        *((private, False) for private in ("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1")),
        *((way_in, False) for way_in in ("::ffff:127.0.0.1", "::ffff:93.184.216.34", "64:ff9b::7f00:1")),
        *((way_in, False) for way_in in ("2002:7f00:1::", "2001:0:7f00:1::")),
        *((way_in, False) for way_in in ("::127.0.0.1", "fec0::1", "::ffff:0:7f00:1", "64:ff9b:1::7f00:1")),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def get(url: str, *hosts: str, resolve: Callable[..., Any] | None = None, take: Any = lambda size: None) -> bytes:
    async def ask() -> bytes:
        return await Fetcher(hosts, resolve)(url, take)

    return asyncio.run(ask())


async def nobody(host: str, port: int) -> list[str]:
    raise AssertionError("a name was looked up that is not allowed")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://b.example/x.png", "is on 'b.example'; images are fetched from a.example, c.example:81"),
        ("http://a.example.evil.example/", "is on"),
        ("http://a.example./", "is on"),
        ("http://evil.example#@a.example/", "is on"),
        ("http://evil.example?a.example", "is on"),
        ("http://a.example:22/", "is on 'a.example:22'"),
        ("https://a.example:80/", "is on 'a.example:80'"),
        ("http://c.example/", "is on 'c.example'"),
        ("http://127.0.0.1/", "is on"),
        ("http://[::1]/", "is on"),
        ("http://2130706433/", "is on"),
        ("http:///x", "is on ''"),
        ("http://a.example:x/", "is no URL"),
        ("http://[a.example/", "is no URL"),
        ("http://a.example:99999/", "is no URL"),
        ("http://user:key@a.example/", "signs that are not allowed"),
        ("http://a.example\\@evil.example/", "signs that are not allowed"),
        ("http://a.example/\u00fc", "signs that are not allowed"),
        ("http://a.example/a\tb", "signs that are not allowed"),
        ("http://a.example/\r\nHost: x", "signs that are not allowed"),
        ("ftp://a.example/", "is no URL of http or https"),
        ("file:///etc/passwd", "is no URL of http or https"),
        ("gopher://a.example/", "is no URL of http or https"),
    ],
)
def test_urls_that_are_refused_before_a_name_is_looked_up(url: str, message: str) -> None:
    with pytest.raises(Unfetched, match=message):
        get(url, "A.example", "c.example:81", resolve=nobody)


@pytest.mark.parametrize(
    "addresses", [[], ["127.0.0.1"], ["169.254.169.254"], ["93.184.216.34", "10.0.0.1"], ["::ffff:10.0.0.1"]]
)
def test_names_that_lead_into_the_private_network(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return addresses

    monkeypatch.setattr(asyncio, "open_connection", nobody)
    with pytest.raises(Unfetched, match=r"^is on a host that is not in the public network$"):
        get("http://a.example/", "a.example", resolve=resolve)


@pytest.fixture
def here_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")


async def here(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def test_an_image_comes(here_is_public: None) -> None:
    took: list[int] = []
    with http_server(200, PNG) as (url, seen):
        host = f"a.example:{port_of(url)}"
        assert get(f"http://{host}/x/y.png?z=1#part", host, resolve=here, take=took.append) == PNG
    assert sum(took) == len(PNG)
    assert seen[0][:2] == ("GET", "/x/y.png?z=1") and seen[0][2]["Host"] == host
    assert not {"authorization", "cookie"} & {name.lower() for name in seen[0][2]}


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (404, {}, "is answered with HTTP status 404"),
        (500, {}, "is answered with HTTP status 500"),
        (206, {}, "is answered with HTTP status 206"),
        (200, {"Content-Encoding": "gzip"}, "compressed"),
        (302, {"Location": "http://evil.example/"}, "is on 'evil.example'"),
        (302, {"Location": "//evil.example/"}, "is on 'evil.example'"),
        (302, {"Location": "file:///etc/passwd"}, "is no URL of http or https"),
        (302, {"Location": "http://[x"}, "cannot be had"),
        (302, {"Location": "/again"}, "more than 3 redirects"),
        (302, {}, "more than 3 redirects"),
        (200, {"X": "y" * 200_000}, "headers that are too large"),
    ],
)
def test_answers_that_are_refused(here_is_public: None, status: int, headers: dict[str, str], message: str) -> None:
    with http_server(status, b"x", headers) as (url, seen):
        host = f"a.example:{port_of(url)}"
        with pytest.raises(Unfetched, match=message):
            get(f"http://{host}/", host, resolve=here)
    assert len(seen) <= 4


def test_a_redirect_is_followed_and_looked_up_again(here_is_public: None) -> None:
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

    with http_server(200, PNG) as (url, _):
        host = f"b.example:{port_of(url)}"
        moved = {"Location": f"http://{host}/there"}
        with http_server(200, PNG, first=[(301, b"", moved)] * 2) as (first, _):
            start = f"a.example:{port_of(first)}"
            assert get(f"http://{start}/", start, host, resolve=here) == PNG
            with pytest.raises(Unfetched, match="not in the public network"):
                get(f"http://{start}/", start, host, resolve=resolve)
    assert asked == ["a.example", "b.example"]


@contextlib.contextmanager
def raw_server(*parts: bytes | float, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """A server on a port that sends these bytes to whoever comes, with waits of so many seconds between, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        end = threading.Event()

        def run() -> None:
            while not end.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    connection.settimeout(5)
                    with context.wrap_socket(connection, server_side=True) if context else connection as it:
                        it.recv(1000)
                        for part in parts:
                            if isinstance(part, bytes):
                                it.sendall(part)
                            elif end.wait(part):
                                break

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            end.set()
            thread.join()


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([OK + b"Content-Length: 5\r\n\r\nabc"], "is cut off"),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n"], "is cut off"),
        ([OK], "is cut off"),
        ([b""], "is cut off"),
        ([b"SSH-2.0-OpenSSH\r\n"], "cannot be had"),
        ([OK + b"Content-Length: -1\r\n\r\n"], "cannot be had"),
        ([b"HTTP/1.1 101 x\r\nUpgrade: y\r\nConnection: upgrade\r\n\r\n"], "cannot be had"),
        ([CHUNKED + b"1\r\nx\r\n0\r\n", *[b"X: y\r\n" * 8000] * 20], "is answered with trailers"),
        ([CHUNKED, *[b"1;%s\r\nx\r\n" % (b"y" * 50_000)] * 40, b"0\r\n\r\n"], "far more bytes than"),
        ([OK + b"\r\n" + b"x" * 50_000] * 10, "has more than 400000 bytes"),
        ([part for _ in range(100) for part in (b"x", 0.05)], "cannot be had"),
        ([OK, *(part for _ in range(100) for part in (b"X: y\r\n", 0.05))], "does not come within 1 s"),
        ([OK + b"\r\n", *(part for _ in range(100) for part in (b"x", 0.05))], "does not come within 1 s"),
        ([30.0], "does not come within 1 s"),
    ],
)
def test_hosts_that_do_not_behave(
    here_is_public: None, monkeypatch: pytest.MonkeyPatch, parts: list[Any], message: str
) -> None:
    monkeypatch.setattr(fetch, "PATIENCE", 1.0)
    monkeypatch.setattr(fetch, "MAX_BYTES", 400_000)
    with raw_server(*parts) as port:
        begun = time.monotonic()
        with pytest.raises(Unfetched, match=message):
            get(f"http://a.example:{port}/", f"a.example:{port}", resolve=here)
        assert time.monotonic() - begun < 5


def test_a_host_that_closes_where_it_is_done(here_is_public: None) -> None:
    with raw_server(OK + b"\r\n" + PNG[:10], 0.1, PNG[10:]) as port:
        assert get(f"http://a.example:{port}/", f"a.example:{port}", resolve=here) == PNG
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(PNG), PNG)
    with raw_server(OK + chunked) as port:
        assert get(f"http://a.example:{port}/", f"a.example:{port}", resolve=here) == PNG


def test_no_memory_for_an_image(here_is_public: None) -> None:
    def take(size: int) -> None:
        raise Refused(429, "overloaded", "no room")

    with raw_server(OK + b"\r\n" + PNG) as port, pytest.raises(Refused, match="no room"):
        get(f"http://a.example:{port}/", f"a.example:{port}", resolve=here, take=take)


def test_https_needs_a_certificate_of_the_host(
    here_is_public: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("a.example").configure_cert(context)
    with raw_server(OK + b"\r\n" + PNG, context=context) as port:
        hosts = (f"a.example:{port}", f"b.example:{port}")
        with pytest.raises(Unfetched, match="cannot be had"):
            get(f"https://{hosts[0]}/", *hosts, resolve=here)
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert get(f"https://{hosts[0]}/", *hosts, resolve=here) == PNG
        with pytest.raises(Unfetched, match="cannot be had"):
            get(f"https://{hosts[1]}/", *hosts, resolve=here)
    moved = OK.replace(b"200 OK", b"302 x") + b"Location: http://a.example:%d/\r\n\r\n"
    with raw_server(moved % 80, context=context) as port, pytest.raises(Unfetched, match="another protocol than https"):
        get(f"https://a.example:{port}/", f"a.example:{port}", "a.example", resolve=here)


# Through the gateway


def ask(url: str, given: Any) -> tuple[int, Any]:
    answer = urllib3.request("POST", f"{url}/v1/embeddings", json={"model": "radapter", "input": given}, timeout=20)
    return answer.status, json.loads(answer.data)


def test_nothing_is_fetched_unless_hosts_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_resolve", nobody)
    with serving() as served:
        status, answer = ask(served.url, ["a", "https://a.example/x.png"])
        assert (status, answer["error"]["param"]) == (400, "input[1]")
        assert "--image-hosts" in answer["error"]["message"] and '"modality": "text"' in answer["error"]["message"]
        assert not served.upstream.asked


def test_images_by_url_through_the_gateway(here_is_public: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_resolve", here)
    with http_server(200, PNG) as (url, _), http_server(404, b"") as (missing, _):
        hosts = tuple(f"a.example:{port_of(one)}" for one in (url, missing))
        with serving(image_hosts=hosts, max_body=0.001) as served:
            status, answer = ask(served.url, ["abc", f"http://{hosts[0]}/1", f"http://{hosts[0]}/2"])
            assert status == 200
            assert [one["embedding"] for one in answer["data"]] == [[3, 97], *[[len(PNG), PNG[0]]] * 2]
            status, answer = ask(served.url, [f"http://{hosts[0]}/1", f"http://{hosts[1]}/2"])
            assert (status, answer["error"]["param"]) == (400, "input[1]")
            assert answer["error"]["message"] == "input[1] is answered with HTTP status 404"
            many = [f"http://{hosts[0]}/1"] * (1100 // len(PNG) + 1)
            assert ask(served.url, many)[0] == 413
            assert "body_bytes 0.0" in urllib3.request("GET", f"{served.url}/metrics").data.decode()


def test_hosts_as_settings() -> None:
    settings = Settings(image_hosts=("a.example", "b.example:81"))
    settings.check()
    assert command(settings)[-3:] == ["--image-hosts", "a.example", "b.example:81"]
    for host in ("http://a.example", "a.example/x", "*.example", "a.example:x", ""):
        with pytest.raises(RAdapterError, match="--image-hosts"):
            Settings(image_hosts=(host,)).check()
