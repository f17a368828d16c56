"""What a browser may ask where there are no keys, and what callers learn of the machine."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from radapter_serve.errors import RAdapterError
from radapter_serve.gateway.errors import Refused
from radapter_serve.gateway.keys import Keys, new_key
from radapter_serve.gateway.middleware import BrowserRule
from radapter_serve.release.release import TASKS
from tests.gateway.test_gateway import HEAD, INFER, TEXT, ask, digest, heard, refusal, talking
from tests.helpers.fake_server import release
from tests.helpers.fake_upstream import config, serving

LOCAL = "localhost:8080"


async def passed(scope: Any, receive: Any, send: Any) -> None:
    """The app behind a middleware."""


def passes(middleware: Any, scope: dict[str, Any]) -> bool:
    """True if a middleware lets a request in."""
    try:
        asyncio.run(middleware({"type": "http", **scope}, None, None))
    except Refused as error:
        assert error.status in (403, 431)
        return False
    return True


@pytest.mark.parametrize(
    ("given", "lets_in"),
    [
        *(
            ({"Host": host}, True)
            for host in (LOCAL, "LOCALHOST", "127.9.9.9", "[::1]:8080", "box")
        ),
        *(({"Host": host}, False) for host in ("evil.example", "localhost.evil.example", "", "[")),
        *(({"Host": host}, False) for host in ("127.0.0.1.evil.example:8080", "10.0.0.1")),
        ({}, False),
        ({"Host": LOCAL, "Origin": f"http://{LOCAL}"}, True),
        *(
            ({"Host": LOCAL, "Origin": origin}, False)
            for origin in ("http://evil.example", "http://localhost:3000", "null", "http://[")
        ),
        *(({"Host": LOCAL, "Sec-Fetch-Site": site}, True) for site in ("none", "same-origin")),
        *(({"Host": LOCAL, "Sec-Fetch-Site": site}, False) for site in ("same-site", "cross-site")),
    ],
)
def test_what_a_browser_may_ask_on_this_machine(given: dict[str, str], lets_in: bool) -> None:
    headers = [(name.lower().encode(), value.encode()) for name, value in given.items()]
    assert passes(BrowserRule(passed, "box"), {"headers": headers}) == lets_in


def test_two_hosts_are_none() -> None:
    assert not passes(BrowserRule(passed, "box"), {"headers": [(b"host", b"localhost")] * 2})


@pytest.mark.parametrize(
    "path", ["/v2", "/v2/models/classify/config", "/v1/models", "/metrics", "/health/live", "/no"]
)
def test_the_rule_holds_for_all_paths(path: str) -> None:
    with serving() as served:
        assert ask(served, path, Host="evil.example")[0] == 403
        assert ask(served, path, Origin="http://evil.example")[0] == 403
        assert ask(served, path)[0] in (200, 404)


def test_the_rule_is_not_for_callers_with_keys_nor_names_where_everybody_may_come(
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys"
    key = new_key(keys, "ann")
    with serving(api_keys=keys) as served:
        given = {"Host": "models.example.org", "Origin": "http://other.example"}
        assert ask(served, "/v2", Authorization=f"Bearer {key}", **given)[0] == 200
    with serving(no_api_keys=True) as served:
        assert ask(served, "/v2", Host="models.example.org")[0] == 200
        assert refusal(served, INFER, TEXT, Origin="http://other.example") == (403, "unauthorized")
        assert not served.upstream.asked


def test_a_key_in_a_trailer_lets_nobody_in(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"ann: {digest('first')}\n")
    body = json.dumps(TEXT).encode()
    head = (
        HEAD.replace(b"Content-Length: 10", b"Transfer-Encoding: chunked\r\nTrailer: Authorization")
        + b"\r\n"
    )
    chunks = b"%x\r\n%s\r\n0\r\nAuthorization: Bearer first\r\n\r\n" % (len(body), body)
    with serving(api_keys=keys) as served, talking(served, head + chunks) as it:
        assert b"401" in heard(it) and not served.upstream.asked


# What callers learn of the machine


@pytest.mark.parametrize(
    ("fact", "shown"),
    [
        ("local-dir:/srv/my secret/base", "local-dir:base"),
        ("local-dir:runs/secret/base", "local-dir:base"),
        ("imagefolder:/data/secret/photos", "imagefolder:photos"),
        ("/srv/secret/base/", "base"),
        ("~/secret/base", "base"),
        ("ranges found by /srv/secret/base", "ranges found by ..."),
        ("hf-hub:organisation/name", "hf-hub:organisation/name"),
        ("ViT-B-32", "ViT-B-32"),
        ("sha256:00", "sha256:00"),
    ],
)
def test_no_path_of_the_server_is_told(fact: str, shown: str) -> None:
    facts = {
        "version": 1,
        "embed_dim": 4,
        "architecture": fact,
        "made": [{"by": fact}],
        "templates": ["a /photo/ of {}"],
    }
    told = json.loads(config("classify", facts).config()["parameters"]["release"]["string_value"])
    assert told == {**facts, "architecture": shown, "made": [{"by": shown}]}


def test_no_list_of_models_tells_a_path() -> None:
    with serving() as served:
        facts = release(1) | {"architecture": "local-dir:/srv/secret/base"}
        served.upstream.configs = {task: config(task, facts) for task in TASKS}
        for path in (
            "/v1/models",
            "/v1/models/radapter",
            "/v2/models/classify/config",
            "/v2/models/classify",
        ):
            status, told, _ = ask(served, path)
            assert status == 200 and "secret" not in json.dumps(told)


# Files of keys


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_file_of_keys_that_is_no_plain_file_is_refused_and_not_waited_for(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "keys"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    for use in (Keys, lambda path: new_key(path, "ann")):
        with pytest.raises(RAdapterError, match=f"cannot read the keys {path}: ") as refused:
            use(path)
        assert "\n" not in str(refused.value)


def test_a_file_of_keys_that_becomes_a_pipe_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = new_key(path, "ann")
    keys = Keys(path)
    keys.check(f"Bearer {key}")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(Refused):
        keys.check(f"Bearer {key}")
